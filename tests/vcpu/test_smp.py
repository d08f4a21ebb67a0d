"""Several vCPUs on one memory: atomic operations, and code that one vCPU changes while another runs it.

Each vCPU runs in a thread and with a mapping of its own, as its process would; run() releases the GIL.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.vcpu.flat import CODE, Flat
from tests.vcpu.guest import assemble
from vcpu._core import lib

CPUS = 4
DATA = 0x200000
MODIFIED = 0x280000
ROUNDS = 3000
BUDGET = 400_000_000  # an end for a guest that waits for ever; far above what the loops need


@pytest.fixture
def cpus() -> Iterator[list[Flat]]:
    first = Flat(ram=4 << 20, vcpus=CPUS)
    machines = [first, *(Flat(segment=first.segment, index=i) for i in range(1, CPUS))]
    yield machines
    for machine in machines:
        machine.close()


def run_together(machines: list[Flat], sources: list[str]) -> None:
    """Each its own program (rdi: its number), until HLT."""
    exits: dict[int, int] = {}

    def run(index: int, source: str) -> None:
        at = CODE + index * 0x10000
        code = assemble(source + "\nhlt\n", at)[0]
        exits[index] = machines[index].run(code, BUDGET, at, rdi=index)

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(sources)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert exits == dict.fromkeys(range(len(sources)), lib.EXIT_DEBUG)


@pytest.mark.parametrize(
    "step",
    [
        "lock inc qword ptr [rbx]",
        "mov eax, 1\n lock xadd [rbx], rax",
        "mov rax, [rbx]\n retry: lea rdx, [rax + 1]\n lock cmpxchg [rbx], rdx\n jne retry",
        "mov eax, 1\n wait: xchg [rbx + 64], eax\n test eax, eax\n jne wait\n"
        "inc qword ptr [rbx]\n mov dword ptr [rbx + 64], 0",
        "mov r9, rbx\n again: mov rax, [r9]\n mov rdx, [r9 + 8]\n mov rcx, rdx\n mov rbx, rax\n inc rbx\n"
        "lock cmpxchg16b [r9]\n jne again\n mov rbx, r9",
    ],
    ids=["inc", "xadd", "cmpxchg", "spinlock", "cmpxchg16b"],
)
def test_counter_of_all_vcpus(cpus: list[Flat], step: str) -> None:
    program = f"mov ebx, {DATA}\n mov esi, {ROUNDS}\n loop: {step}\n dec esi\n jne loop"
    run_together(cpus, [program] * CPUS)
    assert int.from_bytes(cpus[0].read(DATA, 8), "little") == CPUS * ROUNDS


@pytest.mark.parametrize("offset", [61, 0xFFC, 0xFFF])
def test_counter_across_lines_and_pages(cpus: list[Flat], offset: int) -> None:
    """A LOCK across two pages stops the others for its moment."""
    rounds = 300
    step = "lock add qword ptr [rbx], 0x101"
    program = f"mov ebx, {DATA + offset}\n mov esi, {rounds}\n loop: {step}\n dec esi\n jne loop"
    run_together(cpus, [program] * CPUS)
    assert int.from_bytes(cpus[0].read(DATA + offset, 8), "little") == CPUS * rounds * 0x101


# A routine `mov eax, imm32; ret` at MODIFIED. The writer puts round r into it, then announces r at DATA; the
# readers wait for the announcement, serialize, call, and must get at least r, which they report at
# DATA + 64 * number (SDM vol. 3 section 8.1.3).
WRITER = f"""
    mov ebx, {DATA}
    mov esi, {MODIFIED}
    mov ecx, 1
    next:
        mov [rsi + 1], ecx
        mov [rbx], ecx
        mov edx, 64
        seen: mov eax, [rbx + rdx]
            cmp eax, ecx
            jb pause
            add edx, 64
            cmp edx, {64 * CPUS}
            jne seen
        inc ecx
        cmp ecx, {ROUNDS}
        jne next
    hlt
    pause: pause
    jmp seen
"""
READER = f"""
    mov r8d, {DATA}
    mov r9d, {MODIFIED}
    shl rdi, 6
    xor r10d, r10d
    next:
        inc r10d
        wait: pause
        cmp [r8], r10d
        jb wait
        xor eax, eax
        cpuid
        call r9
        cmp eax, r10d
        jb wrong
        mov [r8 + rdi], eax
        cmp r10d, {ROUNDS - 1}
        jne next
    hlt
    wrong: ud2
"""


@pytest.mark.parametrize("place", [MODIFIED, MODIFIED + 0xFFE], ids=["in a page", "across two"])
def test_code_changed_by_another_vcpu(cpus: list[Flat], place: int) -> None:
    routine = assemble("mov eax, 0\n ret", place)[0]
    cpus[0].write(place, routine)
    programs = [text.replace(str(MODIFIED), str(place)) for text in [WRITER, *[READER] * (CPUS - 1)]]
    run_together(cpus, programs)
    assert all(int(cpu.block.code_events_seen) > 0 for cpu in cpus[1:])
