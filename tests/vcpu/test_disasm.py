"""The disassembler against Capstone, and texts as the manuals spell them."""

from __future__ import annotations

import random

import pytest

from vcpu.disasm import disassemble

capstone = pytest.importorskip("capstone")
MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
STARTS = [bytes.fromhex(text) for text in ("", "", "0f", "660f", "f30f", "f20f", "0f38", "660f38", "660f3a")]
#: Capstone: UD0 and UD1 without ModRM; branches with 66h as AMD has them, 16 bits
DIFFERENT = {"ud0", "ud1"}


@pytest.mark.parametrize("bits", MODES)
def test_lengths_are_capstones(bits: int) -> None:
    other = capstone.Cs(capstone.CS_ARCH_X86, MODES[bits])
    rng, compared = random.Random(bits), 0
    for _ in range(6000):
        data = rng.choice(STARTS) + rng.randbytes(15)
        ours = list(disassemble(data, 0x1000, bits))[:2]
        theirs = next(other.disasm(data, 0x1000), None)
        if theirs is None or len(ours) < 2 or ours[0][1].startswith("db ") or theirs.mnemonic in DIFFERENT:
            continue
        if bits == 64 and b"\x66" in data[: theirs.size] and theirs.mnemonic[0] in "jc":
            continue
        assert ours[1][0] - 0x1000 == theirs.size, (data.hex(), ours[0][1], theirs.mnemonic, theirs.op_str)
        compared += 1
    assert compared > 2500


@pytest.mark.parametrize(
    "bits, code, text",
    [
        (64, "4889e5", "mov rbp, rsp"),
        (64, "4c8b0425281c0000", "mov r8, qword [0x1c28]"),
        (64, "65488b0425c0fb0100", "mov rax, qword gs:[0x1fbc0]"),
        (64, "f3aa", "rep stosb"),
        (64, "f348ab", "rep stosq"),
        (64, "f2ae", "repne scasb"),
        (64, "f0480fb10e", "lock cmpxchg qword [rsi], rcx"),
        (64, "488d05f9ffffff", "lea rax, [rip - 0x7]"),
        (64, "40b601", "mov sil, 0x1"),
        (64, "b601", "mov dh, 0x1"),
        (64, "0f20d8", "mov rax, cr3"),
        (64, "7402", "je 0x1004"),
        (64, "e8fbffffff", "call 0x1000"),
        (64, "660f6fc1", "movdqa xmm0, xmm1"),
        (64, "f20f5844c808", "addsd xmm0, qword [rax + rcx*8 + 0x8]"),
        (64, "4898", "cdqe"),
        (64, "90", "nop"),
        (64, "6aff", "push 0xffffffffffffffff"),
        (64, "06", "db 0x06"),
        (32, "c7042478563412", "mov dword [esp], 0x12345678"),
        (32, "ea785634120800", "jmpf 0x8:0x12345678"),
        (32, "668ed8", "mov ds, ax"),
        (16, "8b4002", "mov ax, word [bx + si + 0x2]"),
        (16, "66b878563412", "mov eax, 0x12345678"),
        (16, "ebfe", "jmp 0x1000"),
        (16, "26a13412", "mov ax, es:[0x1234]"),
        (16, "e3fe", "jcxz 0x1000"),
    ],
)
def test_text(bits: int, code: str, text: str) -> None:
    assert next(disassemble(bytes.fromhex(code), 0x1000, bits)) == (0x1000, text)


def test_what_is_cut_off_ends_it() -> None:
    assert [at for at, _ in disassemble(b"\x90\xe8\x00", 0x10, 64)] == [0x10]
