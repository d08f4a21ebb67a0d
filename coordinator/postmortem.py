"""What a dead vCPU has left: copied out of the segment, made exact as far as it can be, and told.

How exact, by where it was killed (enum vcpu_place in segment.h):

- outside of the guest, in HLT, in an access that a device host had: everything.
- in the guest: general and vector registers and status flags are those of the operation that was under way or
  has just been; RIP is that of the first byte of the block in execution (a run of instructions without a
  branch inside), x87 registers and MXCSR those of the last time that it left the guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from coordinator.contract._segment import ffi, lib
from coordinator.contract.counters import EXIT_NAMES
from coordinator.contract.segment import Segment
from coordinator.paging import Tables
from coordinator.registers import describe

if TYPE_CHECKING:
    from coordinator.crew import Crew

PLACES = {
    lib.PLACE_OUTSIDE: "outside of the guest, between two instructions",
    lib.PLACE_GUEST: "in the guest, in a block of instructions; RIP is that of its first",
    lib.PLACE_ACCESS: "in an access that a device host had to answer",
    lib.PLACE_ASLEEP: "asleep, in HLT or waiting for SIPI",
}
SPACES = ("port", "address", "INTA")
LONGEST_INSTRUCTION = 15
#: instructions shown before RIP, and from it on
BEFORE, AFTER = 5, 10


def copy_block(segment: Segment, index: int) -> Any:
    """A ``struct vcpu_block`` of its own, with RIP and RFLAGS worked out."""
    from vcpu import _core  # which needs nothing of this process, but takes a moment to load

    block = ffi.new("struct vcpu_block *", segment.vcpu(index)[0])
    theirs = _core.ffi.cast("struct vcpu_block *", int(ffi.cast("uintptr_t", block)))
    block.arch.rflags = _core.lib.core_last_rflags(theirs)
    block.lazy = 0
    if block.place == lib.PLACE_ACCESS and block.exits_noted:
        block.arch.rip = block.exit_log[(block.exits_noted - 1) % lib.SEG_EXIT_SLOTS].rip
    return block


def report(crew: Crew, index: int, block: Any, cause: str) -> str:
    """The whole of it, for a person: ends with a newline."""
    assert crew.segment is not None
    return (
        f"{cause}\n"
        f"It was {PLACES.get(block.place, 'nobody knows where')},"
        f" after {block.instructions} instructions.\n\n"
        f"{describe(block.arch)}\n"
        f"Code:\n{''.join(line + chr(10) for line in code(crew.segment, block))}\n"
        f"Last exits, the last one last:\n{''.join(line + chr(10) for line in exits(crew.segment, block))}"
    )


def read_linear(segment: Segment, tables: Tables, linear: int, length: int) -> bytes:
    """Up to the first page that is not mapped."""
    data = b""
    while len(data) < length:
        at = linear + len(data) & (1 << 64) - 1
        gpa = tables.translate(at)
        if gpa is None:
            break
        data += segment.dma_read(gpa, min(length - len(data), 4096 - at % 4096))
    return data


def code(segment: Segment, block: Any) -> Iterator[str]:
    """Instructions around RIP, which is marked ``=>``; ``|`` marks those that follow it in its block, where
    the vCPU was somewhere in there."""
    from vcpu.disasm import disassemble

    arch, tables = block.arch, Tables(segment, block.arch)
    bits = 64 if arch.seg[1].attr & 0x2000 else 32 if arch.seg[1].attr & 0x4000 else 16
    base = 0 if bits == 64 else int(arch.seg[1].base)
    rip = int(arch.rip)
    for at, text in _before(segment, tables, base, rip, bits):
        yield f"   {at:#018x}  {text}"
    data = read_linear(segment, tables, base + rip, AFTER * LONGEST_INSTRUCTION)
    if not data:
        yield f"=> {rip:#018x}  (no memory is mapped there)"
    within = block.place == lib.PLACE_GUEST
    for number, (at, text) in enumerate(disassemble(data, rip, bits)):
        if number == AFTER:
            return
        yield f"{'=>' if number == 0 else ' |' if within else '  '} {at:#018x}  {text}"
        within = within and not _ends_block(text)


def _ends_block(text: str) -> bool:
    word = text.split()[0]
    return word.startswith(("j", "call", "ret", "int", "iret", "sys", "loop", "hlt")) or word in ("db", "ud2")


def _before(
    segment: Segment, tables: Tables, base: int, rip: int, bits: int
) -> list[tuple[int, str]]:
    """Code cannot be read backwards: of the places from which reading comes to RIP, the farthest."""
    from vcpu.disasm import disassemble

    for distance in range(min(rip, BEFORE * LONGEST_INSTRUCTION), 0, -1):
        data = read_linear(segment, tables, base + rip - distance, distance)
        if len(data) < distance:
            continue
        rows = list(disassemble(data + bytes(LONGEST_INSTRUCTION), rip - distance, bits))
        before = [row for row in rows if row[0] < rip]
        if len(before) < len(rows) and rows[len(before)][0] == rip:
            if not any(text.startswith("db") for _, text in before):
                return before[-BEFORE:]
    return []


def exits(segment: Segment, block: Any) -> Iterator[str]:
    """What it left the guest for, oldest first."""
    noted = int(block.exits_noted)
    for number in range(max(0, noted - lib.SEG_EXIT_SLOTS), noted):
        entry = block.exit_log[number % lib.SEG_EXIT_SLOTS]
        name = EXIT_NAMES[entry.reason] if entry.reason < len(EXIT_NAMES) else str(entry.reason)
        what = ""
        if entry.reason == lib.EXIT_IO:
            verb = "write" if entry.write else "read"
            what = f" {verb} of {SPACES[entry.space % 3]} {entry.addr:#x}, {entry.width} bytes"
            what += f" ({segment.device_name(entry.device % lib.SEG_MAX_DEVICES)})"
        seconds, ns = divmod(int(entry.guest_ns), 10**9)
        yield f"   {seconds:>6}.{ns:09d} s  {entry.instructions:>14}  rip {entry.rip:#018x}  {name}{what}"
