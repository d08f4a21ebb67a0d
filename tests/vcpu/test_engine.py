"""The engine: decoding, blocks, chaining, self-modifying code, repetition, counting. What each instruction
computes is the differential tests' business; here it is how instructions are found, joined and interrupted.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vcpu.flat import CODE, Flat, compile_c
from tests.vcpu.guest import REGISTERS, Guest, assemble
from vcpu import _core, optable
from vcpu._core import lib

MakeGuest = Callable[..., Guest]
PROGRAM = Path(__file__).parent / "programs" / "loops.c"
DATA = 0x200000


@pytest.fixture
def flat() -> Iterator[Flat]:
    machine = Flat(ram=4 << 20)
    yield machine
    machine.close()


def run(machine: Flat, source: str, budget: int = 100_000, **registers: int) -> int:
    return machine.run(assemble(source + "\nhlt\n", CODE)[0], budget, **registers)


# ---- the table ----


def test_every_form_of_a_row_has_a_handler() -> None:
    index = {8: 0, 16: 1, 32: 2, 64: 3, 0: 2}
    for row in optable.load():
        names = optable.handlers(row)
        for bits in (16, 32, 64):
            for size in row.sizes(bits) if row.valid(bits) else ():
                for form in row.forms():
                    assert (form or "r", index[size]) in names, (row.key, bits, size, form)


@pytest.mark.parametrize(
    "line, reason",
    [
        ("00 /r | ADD | Eb,Gb", "four columns"),
        ("00 /r | ADD | Eb,Gb | nonsense", "attribute 'nonsense'"),
        ("00 /9 | ADD | Eb,Gb | ", "encoding word '/9'"),
        ("00 /r | ADD | Kb | ", "operand 'Kb'"),
        ("00 /r | ADD | Eb | mod=x", "flags 'x'"),
    ],
)
def test_a_bad_row_is_named(line: str, reason: str) -> None:
    with pytest.raises(optable.TableError, match=f"t.tab:1: .*{re.escape(reason)}"):
        optable.parse("t.tab", line)


def test_handlers_end_in_jumps() -> None:
    """A handler that calls the next one would use up the stack; gcc makes jumps of them if it can."""
    if not shutil.which("objdump"):
        pytest.skip("no objdump")
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", _core.__file__], capture_output=True, text=True, check=True
    ).stdout
    name, seen = "", 0
    for line in text.splitlines():
        if line.endswith(">:"):
            name = line.split("<")[1][:-2]
            seen += name.startswith("op_")
        elif name.startswith("op_"):
            assert not re.search(r"\bcall +\*(?!.*\(%rip\))", line), (
                f"{name}: {line}"
            )  # through (%rip): the C library
    assert seen > 800


# ---- programs ----


@pytest.mark.parametrize("which, rounds", [(0, 200), (1, 1), (2, 5000), (3, 1)])
def test_c_programs_compute_what_the_host_computes(flat: Flat, which: int, rounds: int) -> None:
    assert (
        flat.run(compile_c(PROGRAM.read_text(), "-mgeneral-regs-only"), rdi=which, rsi=rounds)
        == lib.EXIT_DEBUG
    )
    assert flat.get("rax") == _host_result(which, rounds)


def _host_result(which: int, rounds: int) -> int:
    from cffi import FFI

    cached = Path(__file__).parent.parent.parent / "build" / "loops.so"
    if not cached.exists():
        cached.parent.mkdir(exist_ok=True)
        subprocess.run(
            ["gcc", "-O1", "-shared", "-fPIC", "-x", "c", str(PROGRAM), "-o", str(cached)], check=True
        )
    host = FFI()
    host.cdef("long entry(long, long);")
    return int(host.dlopen(str(cached)).entry(which, rounds)) & (1 << 64) - 1


def test_budget_is_exact(flat: Flat) -> None:
    code = assemble("l: inc rax\n inc rbx\n inc rcx\n jmp l", CODE)[0]
    flat.write(CODE, code)
    for budget in (1, 2, 3, 5, 7, 400, 1001):
        flat.set(rip=CODE, rax=0, rbx=0, rcx=0)
        before = flat.instructions
        assert lib.core_run(flat.cpu, budget) == lib.EXIT_BUDGET
        assert flat.instructions - before == budget
        assert flat.get("rax") == (budget + 3) // 4


def test_one_at_a_time_is_the_same_as_blocks(flat: Flat) -> None:
    code = compile_c(PROGRAM.read_text(), "-mgeneral-regs-only")
    flat.run(code, rdi=0, rsi=1)
    whole = [flat.get(name) for name in [*REGISTERS, "rip", "rflags"]], flat.instructions
    flat.reset()
    before = flat.instructions
    flat.set(rdi=0, rsi=1)
    while lib.core_run(flat.cpu, 1) == lib.EXIT_BUDGET:
        pass
    assert [flat.get(name) for name in [*REGISTERS, "rip", "rflags"]] == whole[0]
    assert flat.instructions - before == whole[1]


def test_random_bytes_stop_the_guest_not_the_process(flat: Flat) -> None:
    """With an empty IDT any fault is a triple fault; blocks and single steps must agree where it is."""
    rng = random.Random(1)
    for _ in range(150):
        code, values = (
            rng.randbytes(48),
            [rng.choice((rng.getrandbits(64), DATA + rng.getrandbits(12))) for _ in REGISTERS],
        )
        ends = []
        for step in (1, 200):
            flat.clear()
            flat.arch.idtr.limit = 0
            flat.write(CODE, code)
            flat.set(**dict(zip(REGISTERS, values, strict=True)) | {"rsp": 0x78000})
            left = 200
            while left and lib.core_run(flat.cpu, step) == lib.EXIT_BUDGET:
                left -= step
            ends.append([flat.get(name) for name in [*REGISTERS, "rip", "rflags"]])
        assert ends[0] == ends[1], code.hex()


# ---- decoding ----


@pytest.mark.parametrize(
    "code, length",
    [
        ("66" * 14 + "90", 15),
        ("2e3e26366467f3f2" + "90", 9),
        ("48b8" + "11" * 8, 10),
        ("c8000000", 4),
        ("67488d8411" + "00" * 4, 9),
        ("64a1" + "00" * 8, 10),
        ("0f1f8400" + "00" * 4, 8),
        ("f3480fb8c1", 5),
        ("4866" + "05" + "0000", 5),
        ("6648" + "05" + "00" * 4, 7),
    ],
)
def test_instruction_lengths(flat: Flat, code: str, length: int) -> None:
    """SDM vol. 2 section 2; a REX in front of a legacy prefix is ignored (section 2.2.1)."""
    flat.write(CODE, bytes.fromhex(code))
    flat.set(rip=CODE, rax=DATA, rcx=DATA)
    flat.arch.gpr[REGISTERS["rbp"]] = DATA
    assert lib.core_run(flat.cpu, 1) == lib.EXIT_BUDGET
    assert flat.get("rip") == CODE + length


@pytest.mark.parametrize(
    "code, vector",
    [
        ("66" * 15 + "90", 13),  # 16 bytes: #GP(0)
        ("f0" + "90", 6),
        ("f001c8", 6),
        ("f0488b00", 6),
        ("f0f9", 6),  # LOCK
        ("06", 6),
        ("27", 6),
        ("60", 6),
        ("62c0", 6),
        ("82c001", 6),
        ("9a", 6),
        ("c4e0", 6),
        ("c5f8", 6),
        ("ce", 6),
        ("d6", 6),
        ("ea", 6),
        ("0f0b", 6),
        ("0fffc0", 6),
        ("0fb9c0", 6),
        ("8dc0", 6),
        ("0fc7c8", 6),
        ("c6c8", 6),
        ("fed0", 6),
        ("fff8", 6),
        ("0fbac0", 6),
        ("0f24c0", 6),
        ("0f3838", 6),
        ("0f3a00", 6),
    ],
)
def test_invalid_encodings_in_64_bit_mode(make_guest: MakeGuest, code: str, vector: int) -> None:
    guest = make_guest("long")
    guest.write(0x8000, bytes.fromhex(code) + b"\x00" * 8)
    guest.set(rax=0xA000)
    guest.resume(1)
    assert guest.vector == vector


def test_instruction_across_two_pages(flat: Flat) -> None:
    """Also after its second half was changed, and when another instruction comes before it in the page."""
    code = assemble("mov rbx, 1\n mov rax, 0x1122334455667788\n hlt", CODE)[0]
    at = CODE + 0x1000 - 10
    flat.run(code, at=at)
    assert flat.get("rax") == 0x1122334455667788
    flat.write(CODE + 0x1000, b"\xaa")
    flat.run(at=at, rax=0)
    assert flat.get("rax") == int.from_bytes(code[9:10] + b"\xaa" + code[11:17], "little")


# ---- code that changes ----


def test_code_that_changes_the_next_instruction(flat: Flat) -> None:
    """The next instruction already is the new one, in the same block too (APM vol. 2 section 7.6.1)."""
    run(
        flat,
        """
        lea rdi, [rip + target]
        mov byte ptr [rdi + 1], 77
        target: mov al, 1
    """,
    )
    assert flat.get("rax") & 0xFF == 77


def test_loop_that_rewrites_itself(flat: Flat) -> None:
    run(
        flat,
        """
        xor ecx, ecx
        lea rdi, [rip + target + 1]
        again: mov [rdi], ecx
        target: mov eax, 0
        add rdx, rax
        inc ecx
        cmp ecx, 50
        jne again
    """,
    )
    assert flat.get("rdx") == sum(range(50))


@pytest.mark.parametrize(
    "store",
    [
        "mov byte ptr [rdi], 0x90",
        "lock inc byte ptr [rdi]",
        "xchg [rdi], al",
        "stosb",
        "push rax",
        "movups [rdi], xmm0",
        "call next\nnext:",
    ],
)
def test_each_kind_of_store_into_code_is_seen(flat: Flat, store: str) -> None:
    """The routine's line is written beside the code in execution: its block is dropped, the run goes on."""
    before = int(flat.block.blocks_dropped)
    run(
        flat,
        f"""
        lea rdi, [rip + routine + 1]
        call routine
        lea rsp, [rdi + 8]
        {store}
        mov rsp, 0x80000
        call routine
        jmp out
        routine: ret
        .fill 16, 1, 0x90
        out:
    """,
    )
    assert flat.get("rip") > CODE
    assert int(flat.block.blocks_dropped) > before


def test_dma_into_code(flat: Flat) -> None:
    code, labels = assemble("again: mov eax, 1\n hlt", CODE)
    flat.run(code)
    flat.write(CODE + 1, (2).to_bytes(4, "little"))
    flat.run(at=labels["again"])
    assert flat.get("rax") == 2


# ---- strings ----


def test_rep_movs_repeats_a_pattern_where_it_overlaps(flat: Flat) -> None:
    flat.write(DATA, b"abc")
    run(flat, "rep movsb", rsi=DATA, rdi=DATA + 3, rcx=10_000)
    assert flat.read(DATA, 10_003) == (b"abc" * 3335)[:10_003]
    assert (flat.get("rsi"), flat.get("rdi"), flat.get("rcx")) == (DATA + 10_000, DATA + 10_003, 0)


def test_rep_movs_backwards_and_misaligned(flat: Flat) -> None:
    data = random.Random(2).randbytes(9000)
    flat.write(DATA + 1, data)
    run(flat, "std\n rep movsq\n cld", rsi=DATA + 1 + 8984, rdi=DATA + 0x8003 + 8984, rcx=1124)
    assert flat.read(DATA + 0x8003, 8992) == data[:8992]


@pytest.mark.parametrize("op, size", [("stosb", 1), ("stosw", 2), ("stosd", 4), ("stosq", 8)])
def test_rep_stos(flat: Flat, op: str, size: int) -> None:
    run(flat, f"rep {op}", rax=0x1122334455667788, rdi=DATA + 3, rcx=3000)
    pattern = (0x1122334455667788).to_bytes(8, "little")[:size]
    assert flat.read(DATA + 3, 3000 * size + 1) == pattern * 3000 + b"\0"


def test_a_rep_counts_once(flat: Flat) -> None:
    before = flat.instructions
    run(flat, "rep stosb", rdi=DATA, rcx=20_000)
    assert flat.instructions - before == 2


def test_rep_faults_in_the_middle(make_guest: MakeGuest) -> None:
    """Registers stand at the item that faulted (SDM vol. 2, REP)."""
    guest = make_guest("long")
    guest.set_pte(0xD000, 0)
    guest.set(rdi=0xC800, rcx=0x1000, rax=0x55)
    guest.run("rep stosb")
    assert guest.vector == 14 and guest.cr2 == 0xD000
    assert (guest.rdi, guest.rcx) == (0xD000, 0x800)


def test_compare_leaves_flags_alone_where_it_faults(make_guest: MakeGuest) -> None:
    guest = make_guest("long")
    guest.set_pte(0xD000, 0)
    guest.set(rdi=0xCFF0, rcx=0x100, rax=0)
    guest.run("stc\n repe scasb")
    assert guest.vector == 14
    assert guest.stack()[3] & 1  # RFLAGS pushed: the stack has error code, rip, cs, rflags


# ---- modes ----


@pytest.mark.parametrize(
    "mode, expected", [("real", 0x1234), ("protected", 0x11121234), ("long", 0x11121234)]
)
def test_default_operand_size(make_guest: MakeGuest, mode: str, expected: int) -> None:
    guest: Guest = make_guest(mode)
    guest.set(rax=0x11110000 if mode == "real" else 0)
    code = {"real": "b83412", "protected": "b834121211", "long": "b834121211"}[mode]
    guest.write(0x8000, bytes.fromhex(code))
    guest.resume(1)
    assert guest.rax & 0xFFFF == expected & 0xFFFF
    assert guest.rax == (0x11111234 if mode == "real" else expected)


def test_rip_wraps_in_16_bit_code(make_guest: MakeGuest) -> None:
    """JMP short over FFFFh: IP has 16 bits. Without an override nothing faults (limit FFFFh)."""
    guest: Guest = make_guest("real")
    guest.write(0xFFFE, bytes.fromhex("eb10"))
    guest.set(rip=0xFFFE)
    guest.resume(1)
    assert guest.rip == 0x10


def test_real_mode_limit(make_guest: MakeGuest) -> None:
    """A word at FFFFh: #GP in DS, #SS in SS (SDM vol. 3 section 20.1.1)."""
    guest: Guest = make_guest("real")
    guest.set(rbx=0xFFFF, rbp=0xFFFF)
    guest.run("mov ax, [bx]")
    assert guest.vector == 13
    guest = make_guest("real")
    guest.set(rbx=0xFFFF, rbp=0xFFFF)
    guest.run("mov ax, [bp]")
    assert guest.vector == 12


def test_branch_beyond_the_limit(make_guest: MakeGuest) -> None:
    """66h JMP to 12345678h in 16-bit code: #GP, rip at the jump, nothing pushed by CALL."""
    for code in ("66e970563412", "66e870563412"):
        guest: Guest = make_guest("real")
        stack = guest.rsp
        guest.write(0x8000, bytes.fromhex(code))
        guest.resume(1)
        assert guest.vector == 13
        assert guest.stack()[0] == 0x8000
        assert guest.rsp == stack - 6


def test_ret_to_a_non_canonical_address(make_guest: MakeGuest) -> None:
    guest: Guest = make_guest("long")
    guest.run("mov rax, 0x800000000000\n push rax\n bad: ret")
    assert guest.vector == 13
    assert guest.stack()[1] == guest.labels["bad"]


# ---- locked operations ----


@pytest.mark.parametrize("offset", [0, 3, 61, 0xFFD])
def test_locked_add_wherever_it_lies(flat: Flat, offset: int) -> None:
    flat.write(DATA + offset, (5).to_bytes(8, "little"))
    run(flat, "lock add qword ptr [rdi], 37\n lock xadd [rdi], rbx", rdi=DATA + offset, rbx=8)
    assert int.from_bytes(flat.read(DATA + offset, 8), "little") == 50
    assert flat.get("rbx") == 42


# ---- flags that are not computed must not be missed ----


@pytest.mark.parametrize(
    "source, flags",
    [
        ("mov al, 0xff\n add al, 1\n mov ecx, 7\n xor edx, edx\n pushf\n pop rbx", 0x46),
        ("mov al, 0xff\n add al, 1\n mov ebx, 3\n inc ebx\n pushf\n pop rbx", 0x03),  # INC keeps CF
        (
            "mov eax, 1\n shr eax, 1\n mov cl, 0\n shl ebx, cl\n pushf\n pop rbx",
            0x47,
        ),  # a shift by 0 keeps all
        ("xor eax, eax\n sub eax, 1\n rol edx, 1\n pushf\n pop rbx", 0x96),  # ROL writes CF and OF alone
        ("mov eax, 5\n cmp eax, 6\n lea ecx, [rax + 1]\n sbb edx, edx\n pushf\n pop rbx", 0x97),
    ],
)
def test_flags_seen_through_other_instructions(flat: Flat, source: str, flags: int) -> None:
    run(flat, source)
    assert flat.get("rbx") & 0x8D7 == flags
