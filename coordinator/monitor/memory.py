"""``x`` and ``xp``: memory as numbers, characters or instructions. /COUNT FORMAT SIZE as in QEMU."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from coordinator import postmortem
from coordinator.contract import messages
from coordinator.contract.errors import UsageError
from coordinator.machine import Vm
from coordinator.monitor.registers import register
from coordinator.paging import Tables

SIZES = {"b": 1, "h": 2, "w": 4, "g": 8}
PAGE = 4096
MOST_BYTES = 1 << 20
LONGEST_INSTRUCTION = 15


class Format(msgspec.Struct, frozen=True):
    count: int
    letter: str
    size: int


def parse_format(text: str) -> Format:
    match = re.fullmatch(r"(\d*)([xduocsi]?)([bhwg]?)([xduoci]?)", text)
    if match is None or (match[2] and match[4]):
        raise UsageError(f"/{text} is not a format; say for example /4xw or /10i")
    letter, size = match[2] or match[4] or "x", SIZES[match[3] or "w"]
    if letter == "c":
        size = 1
    count = int(match[1] or 1)
    if count * size > MOST_BYTES:
        raise UsageError(f"/{text} is more than {MOST_BYTES} bytes")
    return Format(count, letter, size)


def parse_address(vm: Vm, cpu: int, text: str) -> int:
    """A number, a register ($rip), or a sum of these."""
    total = 0
    for sign, term in re.findall(r"([+-]?)\s*([^+\s-]+)", text):
        if term.startswith("$"):
            value = register(vm, cpu, term[1:])
        else:
            try:
                value = int(term, 0)
            except ValueError:
                raise UsageError(f"'{term}' is not an address") from None
        total += -value if sign == "-" else value
    return total & 0xFFFF_FFFF_FFFF_FFFF


async def _read_virtual(vm: Vm, cpu: int, address: int, length: int) -> bytes:
    """Through the CPU's page tables; stops at the first page that is not mapped."""
    assert vm.segment is not None
    if (loss := vm.loss(cpu)) is not None:
        return postmortem.read_linear(vm.segment, Tables(vm.segment, loss.block.arch), address, length)
    data = b""
    while len(data) < length:
        at = address + len(data)
        piece = min(length - len(data), PAGE - at % PAGE)
        gpa = await vm.paused_command(f"vcpu{cpu}", messages.Translate(serial=vm.next_serial(), linear=at))
        if gpa is None:
            return data
        data += vm.segment.dma_read(gpa, piece)
    return data


async def dump_virtual(vm: Vm, cpu: int, suffix: str, where: str) -> str:
    shape, address = parse_format(suffix), parse_address(vm, cpu, where)
    data = await _read_virtual(vm, cpu, address, _length(shape))
    return _show(vm, cpu, shape, address, data) if data else f"Cannot access memory at {address:#x}\n"


async def dump_physical(vm: Vm, suffix: str, where: str) -> str:
    assert vm.segment is not None
    shape, address = parse_format(suffix), parse_address(vm, 0, where)
    return _show(vm, 0, shape, address, vm.segment.dma_read(address, _length(shape)))


def _length(shape: Format) -> int:
    return shape.count * (LONGEST_INSTRUCTION if shape.letter == "i" else shape.size)


def _show(vm: Vm, cpu: int, shape: Format, address: int, data: bytes) -> str:
    lines = _instructions if shape.letter == "i" else _numbers
    return "".join(line + "\n" for line in lines(vm, cpu, shape, address, data))


def _numbers(vm: Vm, cpu: int, shape: Format, address: int, data: bytes) -> Iterator[str]:
    size = shape.size
    items = [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data) - size + 1, size)]
    row = 16 // size
    for start in range(0, len(items), row):
        words = " ".join(_number(shape, item) for item in items[start : start + row])
        yield f"{address + start * size:016x}: {words}"


def _number(shape: Format, value: int) -> str:
    bits = 8 * shape.size
    match shape.letter:
        case "x":
            return f"0x{value:0{2 * shape.size}x}"
        case "o":
            return f"0{value:o}"
        case "u":
            return str(value)
        case "d":
            return str(value - (1 << bits) if value >> bits - 1 else value)
        case _:
            return repr(chr(value)) if 0x20 <= value < 0x7F else f"'\\x{value:02x}'"


def _instructions(vm: Vm, cpu: int, shape: Format, address: int, data: bytes) -> Iterator[str]:
    from vcpu.disasm import disassemble

    assert vm.segment is not None
    loss = vm.loss(cpu)
    code = (loss.block if loss is not None else vm.segment.vcpu(cpu)).arch.seg[1]
    bits = 64 if code.attr & 0x2000 else 32 if code.attr & 0x4000 else 16
    for index, (at, text) in enumerate(disassemble(data, address, bits)):
        if index == shape.count:
            return
        yield f"0x{at:08x}:  {text}"
