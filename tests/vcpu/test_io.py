"""Ports and memory-mapped registers: classes of access, splitting, messages; the PIC's vector."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from coordinator.contract._segment import lib
from coordinator.contract.counters import vcpu_counters
from coordinator.contract.segment import Segment
from tests.contract.conftest import RAM, Region, ram_at
from tests.vcpu.guest import assemble
from vcpu.core import Core
from vcpu.exits import Exit
from vcpu.load import load

CODE, STACK, BUFFER = 0x8000, 0x7000, 0x10000
MMIO, IOAPIC = 0xFEB00000, 0xFEC00000
SYNC, POSTED, SHADOW, TIME = range(4)

#: (space, addr, width, count, write, data)
Request = tuple[int, int, int, int, bool, bytes]


class Machine:
    """One vCPU in flat 32-bit mode, and a device host made of a list of replies."""

    def __init__(self) -> None:
        self.segment = Segment.create(vcpus=1, ram=RAM)
        self.device = self.segment.allocate_device("chip")
        self.doorbell = os.eventfd(0, os.EFD_NONBLOCK)
        self.core = Core(self.segment.fd, 0, self._sync, (self.doorbell,))
        self.requests: list[Request] = []
        #: bytes that reads get, one reply each; then zeros
        self.replies: list[bytes] = []
        self.before_reply: Callable[[], None] = lambda: None
        self.held = False
        self.ring = self.segment.ring(0)
        self.publish([])

    def publish(self, regions: list[Region]) -> None:
        self.segment.publish_map([ram_at(self.segment, 0, RAM), *regions])

    def _sync(self, io: Any) -> bool:
        assert self.core.block.parked
        if self.held:
            self.core.leave()
            return False
        size = io.width * io.count
        data = bytes(io.data[0:size]) if io.write else b""
        self.requests.append((io.space, io.addr, io.width, io.count, bool(io.write), data))
        self.before_reply()
        if not io.write:
            reply = self.replies.pop(0) if self.replies else b""
            io.data[0:size] = reply.ljust(size, b"\0")
        return True

    def register(self, **fields: int) -> int:
        """A descriptor; returns its index."""
        index = self.segment.allocate_register()
        desc = self.segment.regs[index]
        desc.device, desc.widths, desc.length = self.device, 1, 1
        for name, value in fields.items():
            setattr(desc, name, value)
        return index

    def map_port(self, port: int, span: int = 1, **fields: int) -> None:
        """One register of ``span`` ports, as the bus of a device host describes it."""
        for within in range(span):
            self.segment.ports[port + within] = self.register(length=span, within=within, **fields)

    def run(self, source: str, budget: int = 1000) -> Exit:
        code, labels = assemble(source + "\nend_of_code: jmp end_of_code\n", CODE, 32)
        self.segment.dma_write(CODE, code)
        self.core.power_on()
        load(self.core.arch, "flat32", {"rip": CODE, "rsp": STACK, "rflags": 2})
        self.core.state_changed()
        reason = self.core.run(budget)
        self.finished = self.core.arch.rip == labels["end_of_code"]
        return reason

    @property
    def eax(self) -> int:
        return int(self.core.arch.gpr[0])

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        counters: dict[str, dict[str, int]] = vcpu_counters(self.segment, 0)["accesses"]
        counters.pop("lapic", None)
        return counters


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    yield made
    made.core.close()
    made.segment.close()
    os.close(made.doorbell)


# ---- ports ----
def test_unclaimed_ports_read_as_ones_and_swallow_writes(machine: Machine) -> None:
    machine.run("mov dx, 0x300\n in eax, dx\n mov ebx, eax\n out dx, eax\n xor eax, eax\n in al, 0x99")
    assert machine.finished
    assert (machine.core.arch.gpr[3], machine.eax) == (0xFFFFFFFF, 0xFF)
    assert machine.requests == []
    assert machine.counts == {"nobody": {"nobody": 9}}


def test_sync_port(machine: Machine) -> None:
    machine.map_port(0x1F7)
    machine.replies = [b"\x50"]
    machine.run("mov dx, 0x1f7\n in al, dx\n mov ah, al\n mov al, 0xec\n out dx, al")
    assert machine.requests == [(0, 0x1F7, 1, 1, False, b""), (0, 0x1F7, 1, 1, True, b"\xec")]
    assert machine.eax & 0xFFFF == 0x50EC
    assert machine.counts == {"chip": {"sync": 2}}
    assert machine.core.block.exits[Exit.IO] == 2


def test_wide_accesses_are_split_into_what_the_registers_take(machine: Machine) -> None:
    """Bytes at 60h and 61h; nobody at 62h and 63h; a word at 100h; a dword at CFCh, reached in part."""
    machine.map_port(0x60)
    machine.map_port(0x61)
    machine.map_port(0x100, 2, widths=2)
    machine.map_port(0xCFC, 4, widths=7)
    machine.replies = [b"\x11", b"\x22"]
    machine.run("in eax, 0x60")
    assert machine.eax == 0xFFFF2211
    assert [request[1:3] for request in machine.requests] == [(0x60, 1), (0x61, 1)]
    machine.requests.clear()
    reads = ("mov dx, 0xcfc", "in eax, dx", "in ax, dx", "mov dx, 0xcfe", "in ax, dx", "in eax, dx")
    machine.run("\n".join((*reads, "mov dx, 0x100", "in eax, dx")))
    expected = [(0xCFC, 4), (0xCFC, 2), (0xCFE, 2), (0xCFE, 2), (0x100, 2)]
    assert [request[1:3] for request in machine.requests] == expected


def test_a_data_port_takes_more_bytes_than_it_has_addresses(machine: Machine) -> None:
    """ATA/ATAPI-6 7.5: the data register at 1F0h is 16 bits (32 with a PIO32 host), features is at 1F1h."""
    machine.map_port(0x1F0, widths=6)
    machine.map_port(0x1F1)
    machine.run("mov dx, 0x1f0\n in eax, dx\n in ax, dx\n inc dx\n in al, dx")
    assert [request[1:3] for request in machine.requests] == [(0x1F0, 4), (0x1F0, 2), (0x1F1, 1)]


def test_the_end_of_the_port_space_wraps(machine: Machine) -> None:
    machine.map_port(0)
    machine.run("mov dx, 0xffff\n in ax, dx")
    assert [request[1:3] for request in machine.requests] == [(0, 1)]


def test_posted_writes_go_to_the_ring_and_reads_stay_behind_them(machine: Machine) -> None:
    machine.map_port(0x3F8, write_class=POSTED)
    tickets = []
    machine.before_reply = lambda: tickets.append(machine.core.block.io.ticket)
    machine.run("mov dx, 0x3f8\n mov al, 0x41\n out dx, al\n mov al, 0x42\n out dx, al\n in al, dx")
    assert [machine.ring.take(), machine.ring.take()] == [(0, 0x3F8, 1, 0x41), (0, 0x3F8, 1, 0x42)]
    assert tickets == [2]
    assert machine.counts == {"chip": {"posted": 2, "sync": 1}}


def test_a_posted_write_wakes_a_sleeping_host(machine: Machine) -> None:
    machine.map_port(0x3F8, write_class=POSTED)
    machine.ring.sleeping(True)
    machine.run("mov dx, 0x3f8\n out dx, al\n out dx, al")
    assert os.eventfd_read(machine.doorbell) == 1


def test_shadow_reads_unless_a_posted_write_of_the_group_is_unapplied(machine: Machine) -> None:
    hazard, shadow = machine.segment.allocate_hazard(), machine.segment.allocate_shadow()
    machine.map_port(0x3F6, read_class=SHADOW, shadow=shadow, read_hazard=hazard)
    machine.map_port(0x1F6, write_class=POSTED, write_hazard=hazard)
    machine.segment.set_shadow(shadow, 0x58)
    source = "mov dx, 0x3f6\n in al, dx"
    machine.run(source)
    assert (machine.eax & 0xFF, machine.requests) == (0x58, [])
    machine.replies = [b"\x99"]
    machine.run("mov dx, 0x1f6\n out dx, al\n" + source)
    assert machine.eax & 0xFF == 0x99
    machine.ring.take()
    machine.ring.applied()
    machine.run(source)
    assert machine.eax & 0xFF == 0x58
    assert machine.counts == {"chip": {"shadow": 2, "sync": 1, "posted": 1}}


def test_no_shadow_is_read_while_the_host_stores_those_of_an_event(machine: Machine) -> None:
    shadow = machine.segment.allocate_shadow()
    machine.map_port(0x3F6, read_class=SHADOW, shadow=shadow)
    machine.segment.set_shadow(shadow, 0x58)
    machine.segment.storing_shadows(0, True)
    machine.replies = [b"\x99"]
    machine.run("mov dx, 0x3f6\n in al, dx")
    assert machine.eax & 0xFF == 0x99
    machine.segment.storing_shadows(0, False)
    machine.run("mov dx, 0x3f6\n in al, dx")
    assert machine.eax & 0xFF == 0x58


def test_time_register_in_every_width(machine: Machine) -> None:
    """ACPI PM timer (ACPI 4.8.3.3): 24 bits at 3.579545 MHz."""
    source = machine.segment.allocate_time_source(3_579_545, 10**9, 0xFFFFFF)
    machine.segment.set_time_source(source, True, 0, 0)
    machine.map_port(0x608, 4, widths=7, read_class=TIME, time_source=source)
    machine.segment.set_time(2 * 10**9, 0)
    ticks = 2 * 3_579_545
    machine.run("mov dx, 0x608\n in eax, dx")
    assert machine.eax == ticks
    machine.run("xor eax, eax\n mov dx, 0x60a\n in ax, dx")
    assert machine.eax == ticks >> 16
    machine.run("xor eax, eax\n mov dx, 0x609\n in al, dx")
    assert machine.eax == ticks >> 8 & 0xFF
    assert machine.requests == []


# ---- string I/O ----
def test_rep_ins_is_one_message(machine: Machine) -> None:
    machine.map_port(0x1F0, 2, widths=6)
    sector = bytes(range(256)) * 2
    machine.replies = [sector]
    machine.run(f"mov dx, 0x1f0\n mov edi, {BUFFER}\n mov ecx, 256\n cld\n rep insw")
    assert machine.requests == [(0, 0x1F0, 2, 256, False, b"")]
    assert machine.segment.dma_read(BUFFER, 512) == sector
    assert machine.core.arch.gpr[1] == 0
    assert machine.core.arch.gpr[7] == BUFFER + 512


def test_rep_ins_in_real_mode_goes_by_pages_up_to_the_end_of_the_segment(machine: Machine) -> None:
    """As firmware reads sectors; 16-bit offsets wrap, and an item across the wrap is beyond the limit."""
    machine.map_port(0x1F0, 2, widths=6)
    source = "mov dx, 0x1f0\n mov di, 0xfe00\n mov cx, 0x700\n cld\n rep insw\n end: jmp end"
    code, _ = assemble(source, CODE, 16)
    machine.segment.dma_write(CODE, code)
    machine.core.power_on()
    arch = machine.core.arch
    arch.seg[1].base, arch.rip = 0, CODE
    # ES: FE00h is at 20600h, its segment ends at 207FFh
    arch.seg[0].base, arch.seg[0].selector = 0x10800, 0x1080
    machine.core.state_changed()
    sizes = iter((0x100, 0x400, 0x200))
    machine.replies = [bytes([n]) * (2 * size) for n, size in enumerate(sizes, 1)]
    machine.core.run(6)
    assert [request[3] for request in machine.requests] == [0x100, 0x400, 0x200]
    assert machine.segment.dma_read(0x20600, 0x200) == b"\1" * 0x200
    assert machine.segment.dma_read(0x10800, 0x800) == b"\2" * 0x800
    assert machine.segment.dma_read(0x11000, 0x400) == b"\3" * 0x400
    assert (arch.gpr[1], arch.gpr[7]) == (0, 0xC00)


def test_rep_outs_carries_its_data(machine: Machine) -> None:
    machine.map_port(0x1F0, 4, widths=6)
    data = os.urandom(12)
    machine.segment.dma_write(BUFFER, data)
    machine.run(f"mov dx, 0x1f0\n mov esi, {BUFFER}\n mov ecx, 3\n cld\n rep outsd")
    assert machine.requests == [(0, 0x1F0, 4, 3, True, data)]


def test_string_output_to_a_posted_port(machine: Machine) -> None:
    machine.map_port(0x402, write_class=POSTED)
    machine.segment.dma_write(BUFFER, b"hello")
    machine.run(f"mov dx, 0x402\n mov esi, {BUFFER}\n mov ecx, 5\n cld\n rep outsb")
    assert bytes(entry[3] for _ in range(5) if (entry := machine.ring.take())) == b"hello"


# ---- memory ----
def test_holes_read_as_ones(machine: Machine) -> None:
    machine.run(f"mov eax, [{MMIO}]\n mov [{MMIO}], eax")
    assert (machine.finished, machine.eax) == (True, 0xFFFFFFFF)


def test_registers_of_a_window(machine: Machine) -> None:
    """As an HPET's: configuration sync, main counter (F0h, 64 bits) a function of time."""
    first = machine.register(offset=0x10, length=8, widths=12)
    source = machine.segment.allocate_time_source(1, 10, 2**64 - 1)
    machine.register(offset=0xF0, length=8, widths=12, read_class=TIME, time_source=source)
    machine.publish([Region(MMIO, 0x1000, lib.REGION_MMIO, device=machine.device, first_reg=first, regs=2)])
    machine.segment.set_time_source(source, False, 0, 0x1122334455667788)
    machine.replies = [b"\1\0\0\0"]
    reads = f"mov eax, [{MMIO + 0x10}]\n mov ebx, [{MMIO + 0xF0}]\n mov ecx, [{MMIO + 0xF4}]\n"
    machine.run(reads + f"mov [{MMIO + 0x10}], ebx")
    assert (machine.eax, machine.core.arch.gpr[3], machine.core.arch.gpr[1]) == (1, 0x55667788, 0x11223344)
    assert machine.requests == [
        (1, MMIO + 0x10, 4, 1, False, b""), (1, MMIO + 0x10, 4, 1, True, bytes.fromhex("88776655")),
    ]  # fmt: skip


def test_a_window_that_reads_as_memory_and_is_written_to_a_device(machine: Machine) -> None:
    offset = machine.segment.guest_offset + 0x20000
    flags = lib.REGION_READ | lib.REGION_MMIO
    machine.publish([Region(MMIO, 0x1000, flags, offset, device=machine.device)])
    machine.segment.ram[0x20004] = 0x77
    machine.run(f"movzx eax, byte ptr [{MMIO + 4}]\n mov byte ptr [{MMIO + 4}], 5")
    assert machine.eax == 0x77
    assert machine.requests == [(1, MMIO + 4, 1, 1, True, b"\5")]
    assert machine.segment.ram[0x20004] == 0x77


def test_rom_is_not_written(machine: Machine) -> None:
    machine.publish([Region(MMIO, 0x1000, lib.REGION_READ, machine.segment.guest_offset + 0x20000)])
    machine.segment.ram[0x20000] = 0x33
    machine.run(f"mov byte ptr [{MMIO}], 5\n movzx eax, byte ptr [{MMIO}]")
    assert (machine.eax, machine.segment.ram[0x20000]) == (0x33, 0x33)


def test_ioapic_is_answered_in_the_vcpu(machine: Machine) -> None:
    machine.publish([Region(IOAPIC, 0x1000, lib.REGION_IOAPIC)])
    machine.run(f"mov dword ptr [{IOAPIC}], 1\n mov eax, [{IOAPIC + 0x10}]")
    assert machine.eax == 0x0017_0011
    assert machine.requests == []
    assert machine.counts == {"ioapic": {"memory": 2}}


def test_a_map_that_changes_under_an_access_is_in_force_behind_it(machine: Machine) -> None:
    """The write to the register moves RAM; the next store must not use the TLB entry of before."""
    machine.map_port(0x92)
    machine.before_reply = lambda: machine.segment.publish_map([
        ram_at(machine.segment, 0, BUFFER), ram_at(machine.segment, BUFFER, 0x1000, 0x40000)
    ])  # fmt: skip
    machine.run(f"mov byte ptr [{BUFFER}], 1\n out 0x92, al\n mov byte ptr [{BUFFER}], 2")
    assert machine.finished
    assert (machine.segment.ram[BUFFER], machine.segment.ram[0x40000]) == (1, 2)


# ---- leaving ----
def test_a_held_access_counts_as_not_begun(machine: Machine) -> None:
    machine.map_port(0x1F7)
    machine.held = True
    assert machine.run("mov dx, 0x1f7\n mov al, 0x77\n in al, dx\n nop") is Exit.CONTROL
    assert machine.core.arch.rip == CODE + 6  # at the IN
    assert machine.eax & 0xFF == 0x77
    machine.held = False
    machine.replies = [b"\x50"]
    machine.core.run(20)
    assert machine.eax & 0xFF == 0x50
    assert len(machine.requests) == 1


def test_an_exception_in_the_callback_is_raised_by_run(machine: Machine) -> None:
    machine.map_port(0x1F7)

    def fail() -> None:
        raise OSError("no such host")

    machine.before_reply = fail
    with pytest.raises(OSError, match="no such host"):
        machine.run("mov dx, 0x1f7\n in al, dx")
    assert machine.core.arch.rip == CODE + 4


# ---- the PIC ----
IDT, HANDLER = 0x6000, 0x9000


def interrupts(machine: Machine) -> None:
    """Every vector ends at HANDLER + 16 * vector."""
    for vector in range(256):
        at = HANDLER + 16 * vector
        gate = at & 0xFFFF | 0x20 << 16 | 0x8E00 << 32
        machine.segment.dma_write(IDT + 8 * vector, gate.to_bytes(8, "little"))
        machine.segment.dma_write(at, b"\xeb\xfe")
    gdt = 0x5000
    machine.segment.dma_write(gdt + 0x20, 0x00CF9B000000FFFF.to_bytes(8, "little"))


LOAD_TABLES = f"""
    sub esp, 16
    mov word ptr [esp], 0x7ff
    mov dword ptr [esp + 2], {IDT}
    lidt [esp]
    mov word ptr [esp], 0x27
    mov dword ptr [esp + 2], 0x5000
    lgdt [esp]
"""


def vector_of(machine: Machine) -> int | None:
    offset = int(machine.core.arch.rip) - HANDLER
    return offset // 16 if 0 <= offset < 0x1000 else None


def test_pic_interrupts_through_lint0(machine: Machine) -> None:
    """Virtual wire mode: the vector comes from the PIC by a message; the host has lowered INTR by then."""
    interrupts(machine)
    machine.segment.pic_intr(True)
    machine.replies = [b"\x08"]
    machine.before_reply = lambda: machine.segment.pic_intr(False)
    machine.run(LOAD_TABLES + "sti\n nop\n nop")
    assert vector_of(machine) == 8
    assert machine.requests == [(2, 0, 1, 1, False, b"")]
    assert machine.core.block.exits[Exit.INTA] == 1


def test_pic_request_that_falls_before_it_is_taken_leaves_nothing(machine: Machine) -> None:
    interrupts(machine)
    machine.map_port(0x21)
    machine.segment.pic_intr(True)
    machine.before_reply = lambda: machine.segment.pic_intr(False)
    machine.run(LOAD_TABLES + "out 0x21, al\n sti\n nop\n nop")
    assert machine.finished
    assert machine.requests == [(0, 0x21, 1, 1, True, b"\0")]


def test_masked_lint0_blocks_the_pic_and_a_disabled_apic_does_not(machine: Machine) -> None:
    interrupts(machine)
    machine.segment.pic_intr(True)
    mask = "mov dword ptr [0xfee00350], 0x10700\n"
    machine.run(LOAD_TABLES + mask + "sti\n nop\n nop")
    assert machine.finished
    machine.replies = [b"\x70"]
    disable = "mov ecx, 0x1b\n rdmsr\n and eax, 0xfffff7ff\n wrmsr\n"
    machine.run(LOAD_TABLES + mask + disable + "sti\n nop\n nop")
    assert vector_of(machine) == 0x70


def test_a_held_interrupt_acknowledge_delivers_nothing(machine: Machine) -> None:
    interrupts(machine)
    machine.segment.pic_intr(True)
    machine.held = True
    assert machine.run(LOAD_TABLES + "sti\n nop\n nop") is Exit.CONTROL
    assert vector_of(machine) is None
    machine.held = False
    machine.replies = [b"\x20"]
    machine.core.run(20)
    assert vector_of(machine) == 0x20
