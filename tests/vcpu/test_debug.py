"""Single step and breakpoints: SDM vol. 3 chapter 17."""

from collections.abc import Callable

import pytest

from tests.vcpu.guest import (
    CODE,
    CODE64,
    DATA,
    DATA32,
    DB,
    GP,
    HANDLERS,
    RF,
    SCRATCH,
    TF,
    UD,
    USER_CODE32,
    Guest,
)

Make = Callable[..., Guest]


# ---- single step and breakpoints ----


def test_single_step(make_guest: Make) -> None:
    for mode in ("real", "legacy", "long"):
        guest = make_guest(mode)
        guest.run(
            {
                "real": "pushf\n pop ax\n or ax, 0x100\n push ax\n popf\n nop\n nop",
                "legacy": "pushfd\n or dword ptr [esp], 0x100\n popfd\n nop\n nop",
                "long": "pushfq\n or dword ptr [rsp], 0x100\n popfq\n nop\n nop",
            }[mode]
        )
        assert guest.vector == DB and guest.dr(6) == 0xFFFF4FF0  # BS
        popf = guest.labels["end_of_code"] - 2
        assert guest.stack()[0] == popf + 1  # the instruction behind POPF has run
        assert guest.stack()[2] & TF and not guest.rflags & TF


def test_mov_ss_delays_the_single_step_trap(make_guest: Make) -> None:
    guest = make_guest("legacy")
    guest.run(
        f"mov eax, {DATA32}\n pushfd\n or dword ptr [esp], 0x100\n popfd\n mov ss, eax\n"
        "shadow: inc ecx\nbehind: nop"
    )
    assert guest.vector == DB and guest.stack()[0] == guest.labels["behind"] and guest.rcx == 1


@pytest.mark.parametrize(
    ("rw", "length", "at", "code", "hit"),
    [
        (1, 0, 0, "mov byte ptr [{0}], 1", True),
        (1, 0, 0, "mov al, [{0}]", False),
        (3, 0, 0, "mov al, [{0}]", True),
        (1, 0, 1, "mov dword ptr [{0}], 1", True),
        (1, 0, 4, "mov dword ptr [{0}], 1", False),
        (1, 3, 0, "mov byte ptr [{0} + 3], 1", True),
        (1, 1, 0, "mov byte ptr [{0} + 2], 1", False),
        (1, 2, 0, "mov byte ptr [{0} + 7], 1", True),
        (3, 3, 0, "add dword ptr [{0}], 1", True),
        (3, 0, 0, "push [{0}]", True),
    ],
)
def test_data_breakpoint(make_guest: Make, rw: int, length: int, at: int, code: str, hit: bool) -> None:
    """A trap: the access has been made. LEN 0, 1, 2, 3 = 1, 2, 8, 4 bytes (section 17.2.4)."""
    guest = make_guest("long")
    guest.set(dr1=DATA + at, dr7=0x400 | 1 << 2 | rw << 20 | length << 22)
    guest.run(f"nop\n {code.format(DATA)}\nbehind: nop")
    assert (guest.vector == DB) == hit
    if hit:
        assert guest.dr(6) == 0xFFFF0FF2
        assert guest.stack()[0] == guest.labels["behind"]
        assert not guest.stack()[2] & RF


def test_instruction_breakpoint_and_rf(make_guest: Make) -> None:
    """A fault before the instruction; IRET with RF in the image steps over it once."""
    guest = make_guest("long")
    guest.write(
        HANDLERS + DB * 16, bytes.fromhex("ffc1814c2410000001 00 48cf".replace(" ", ""))
    )  # inc ecx; or [rsp+16], RF; iretq
    guest.set(dr0=CODE + 2, dr7=0x401)
    guest.run("nop\n nop\n inc edx\n inc edx\n inc edx")
    assert guest.done and (guest.rcx, guest.rdx) == (1, 3)
    assert guest.dr(6) == 0xFFFF0FF1


def test_general_detect(make_guest: Make) -> None:
    """DR7.GD: any MOV of a debug register is #DB with BD, and GD is cleared (section 17.2.4)."""
    guest = make_guest("long")
    guest.set(dr7=0x2400)
    guest.run("nop\n mov rax, dr0")
    assert guest.vector == DB and guest.dr(6) == 0xFFFF2FF0 and guest.dr(7) == 0x400
    assert guest.stack()[0] == CODE + 1


def test_moves_of_debug_registers(make_guest: Make) -> None:
    guest = make_guest("long")
    guest.run(
        "mov rax, -1\n mov dr3, rax\n mov eax, eax\n mov dr6, rax\n mov rbx, dr6\n"
        "mov ecx, 0\n mov dr7, rcx\n mov rdx, dr7\n"
        "mov rsi, dr4"
    )
    assert guest.done
    assert (guest.rbx, guest.rdx, guest.rsi, guest.dr(3)) == (0xFFFFEFFF, 0x400, 0xFFFFEFFF, 2**64 - 1)
    guest = make_guest("long")
    guest.run("mov rax, 0x100000000\n mov dr7, rax")
    assert guest.vector == GP
    guest = make_guest("long")
    guest.set(cr4=guest.cr4 | 8)
    guest.run("mov rax, dr5")
    assert guest.vector == UD


@pytest.mark.parametrize(("mask", "vector"), [(0, DB), (TF, None)])
def test_single_step_into_syscall(make_guest: Make, mask: int, vector: int | None) -> None:
    """By TF as SYSCALL leaves it: FMASK keeps the trap out of the kernel, SYSRET has it at its target."""
    guest = make_guest("long", 3)
    guest.arch.star, guest.arch.lstar, guest.arch.fmask = (USER_CODE32 & ~3) << 48 | CODE64 << 32, DATA, mask
    guest.set(efer=guest.efer | 1, rflags=2 | TF)
    guest.write(DATA, bytes.fromhex("ffc7480f07"))  # inc edi; sysretq
    guest.run("syscall\n inc esi")
    assert guest.vector == DB and guest.dr(6) == 0xFFFF4FF0
    if vector is None:
        assert guest.rdi == 1 and guest.rsi == 0 and guest.stack()[0] == CODE + 2
    else:
        assert guest.rdi == 0 and guest.stack()[0] == DATA


@pytest.mark.parametrize(("dr7", "rflags", "rcx"), [(0x400, 2 | TF, 4), (0x10401, 2, 2)])
def test_repeated_instructions_trap_behind_an_iteration(
    make_guest: Make, dr7: int, rflags: int, rcx: int
) -> None:
    """Section 17.3.1.1: TF, and a data breakpoint, between the iterations."""
    guest = make_guest("long")
    guest.set(rcx=5, rsi=0x9000, rdi=SCRATCH, dr0=SCRATCH + 2, dr7=dr7, rflags=rflags)
    guest.run("rep movsb")
    assert guest.vector == DB and guest.rcx == rcx and guest.stack()[0] == CODE
