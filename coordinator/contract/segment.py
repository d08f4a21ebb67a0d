"""The segment from Python: create, attach, typed access, views, counters.

Layout: segment.h. What several processes may do at once goes through the C library (fabric.h); plain
fields are reached as ``segment.header``, ``segment.vcpu(i)``, ``segment.host(i)``, ``segment.fabric``,
``segment.regs[i]`` and ``segment.ports[i]``, which are cffi structs and arrays over the mapping.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from coordinator.contract._segment import ffi, lib
from coordinator.contract.errors import SegmentError
from coordinator.contract.ring import Ring
from coordinator.contract.state_area import Output, StateArea

PAGE: int = lib.SEG_PAGE
NO_OFFSET: int = lib.SEG_NO_OFFSET
#: in a shadow: reading the register would have an effect now, so it is a sync access
SHADOW_ASK: int = lib.SEG_SHADOW_ASK
ATTN_CONTROL: int = lib.ATTN_CONTROL
#: 1 GHz: one tick a nanosecond
DEFAULT_TSC_KHZ = 1_000_000
#: index 0 of registers, hazards and devices means "none"
FIRST_INDEX = 1


class RegionLike(Protocol):
    """A memory region as ``struct map_region`` has it."""

    @property
    def gpa(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def flags(self) -> int: ...
    @property
    def read_offset(self) -> int: ...
    @property
    def write_offset(self) -> int: ...
    @property
    def host(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def first_reg(self) -> int: ...
    @property
    def regs(self) -> int: ...


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _layout(vcpus: int, ram: int, vram: int, rom: int) -> dict[str, int]:
    """Offsets of every part, and the whole size; each part begins on a page."""
    pages = (ram + vram + rom) // PAGE
    stride = 65536  # struct cpu maps the block at the front of a reservation of this size (vcpu/core/cpu.h)
    host_stride = _pages(ffi.sizeof("struct host_block"))
    state_stride = lib.SEG_STATE_ROOM + lib.SEG_OUTPUT_ROOM
    parts = (
        ("vcpu_offset", stride * vcpus),
        ("host_offset", host_stride * lib.SEG_MAX_HOSTS),
        ("ports_offset", 2 * lib.SEG_PORTS),
        ("regs_offset", ffi.sizeof("struct reg_desc") * lib.SEG_MAX_REGS),
        ("shadow_offset", 8 * lib.SEG_MAX_SHADOWS),
        ("maps_offset", 2 * ffi.sizeof("struct memory_map")),
        ("fabric_offset", ffi.sizeof("struct fabric")),
        ("code_offset", ffi.sizeof("struct code_log")),
        ("state_offset", state_stride * lib.SEG_MAX_HOSTS),
        ("dirty_offset", pages),
        ("code_mask_offset", 8 * pages),
        ("guest", ram + vram + rom),
    )
    layout = {
        "vcpu_stride": stride, "host_stride": host_stride, "state_stride": state_stride, "guest_pages": pages
    }  # fmt: skip
    at = _pages(ffi.sizeof("struct seg_header"))
    for name, size in parts:
        layout[name] = at
        at += _pages(size)
    layout["vram"] = layout["guest"] + ram
    layout["rom"] = layout["vram"] + vram
    layout["size"] = at
    return layout


class Segment:
    """One mapping of a machine's segment. ``fd`` is the memfd; the mapping lives as long as this."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory = ffi.from_buffer("char[]", self._map, require_writable=True)
        #: ``struct seg_header *``, also the address of the segment
        self.header: Any = ffi.cast("struct seg_header *", self._memory)
        error = lib.seg_process_init()
        if error:
            raise SegmentError(f"this kernel has no expedited membarrier: {os.strerror(-error)}")

    # ---- life ----------------------------------------------------------------------------------
    @classmethod
    def create(
        cls, vcpus: int, ram: int, vram: int = 0, rom: int = 0, hosts: int = 1, tsc_khz: int = DEFAULT_TSC_KHZ
    ) -> Segment:
        """A new segment in a sealed memfd: no process can change its size. Sizes are bytes, multiples
        of a page. Guest time is 0 and stands still; vCPUs count as parked."""
        if not 1 <= vcpus <= lib.SEG_MAX_VCPUS:
            raise SegmentError(f"{vcpus} vCPUs: 1 to {lib.SEG_MAX_VCPUS} are possible")
        if not 1 <= hosts <= lib.SEG_MAX_HOSTS:
            raise SegmentError(f"{hosts} device hosts: 1 to {lib.SEG_MAX_HOSTS} are possible")
        if ram <= 0 or any(size < 0 or size % PAGE for size in (ram, vram, rom)):
            raise SegmentError(f"memory sizes {ram}, {vram}, {rom} are not multiples of {PAGE}")
        layout = _layout(vcpus, ram, vram, rom)
        try:
            fd = os.memfd_create("atoll-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, layout["size"])
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            segment = cls(fd, layout["size"])
        except (OSError, ValueError) as error:
            raise SegmentError(f"cannot create guest memory of {ram >> 20} MiB: {error}") from None
        header = segment.header
        for name, value in layout.items():
            setattr(header, name, value)
        header.magic, header.layout, header.vcpus, header.hosts = lib.SEG_MAGIC, lib.SEG_LAYOUT, vcpus, hosts
        header.ram_size, header.vram_size, header.rom_size = ram, vram, rom
        header.next_device = header.next_reg = header.next_hazard = FIRST_INDEX
        segment.allocate_device("lapic")  # SEG_DEVICE_LAPIC
        segment.allocate_device("ioapic")  # SEG_DEVICE_IOAPIC
        lib.guest_time_set(header, 0, 0, tsc_khz)
        lib.ioapic_reset(header)
        for index in range(vcpus):
            segment.vcpu(index).parked = 1
        return segment

    @classmethod
    def attach(cls, fd: int) -> Segment:
        """Map a segment that another process made; SegmentError where it is not one of ours."""
        size = os.fstat(fd).st_size
        if size < ffi.sizeof("struct seg_header"):
            raise SegmentError(f"segment of {size} bytes is too short for a header")
        segment = cls(fd, size)
        header = segment.header
        if header.magic != lib.SEG_MAGIC:
            raise SegmentError(f"segment has magic {header.magic:#x}, not {lib.SEG_MAGIC:#x}")
        if header.layout != lib.SEG_LAYOUT:
            raise SegmentError(f"segment has layout {header.layout}, this build knows {lib.SEG_LAYOUT}")
        if header.size != size:
            raise SegmentError(f"segment has {size} bytes, its header says {header.size}")
        expected = _layout(header.vcpus, header.ram_size, header.vram_size, header.rom_size)
        for name, value in expected.items():
            if getattr(header, name) != value:
                raise SegmentError(f"segment's {name} is {getattr(header, name)}, this build expects {value}")
        return segment

    def close(self) -> None:
        """Forget the descriptor. The mapping itself goes with the last view of it."""
        os.close(self.fd)

    # ---- parts ---------------------------------------------------------------------------------
    def _at(self, kind: str, offset: int) -> Any:
        return ffi.cast(kind, self._memory + offset)

    @property
    def vcpus(self) -> int:
        return int(self.header.vcpus)

    @property
    def ram_size(self) -> int:
        return int(self.header.ram_size)

    @property
    def guest_offset(self) -> int:
        """Segment offset of guest memory: RAM begins here."""
        return int(self.header.guest)

    @property
    def guest_address(self) -> int:
        """Host address of guest memory in this process, for C."""
        return int(ffi.cast("uintptr_t", self._memory)) + self.guest_offset

    def empty_memory(self) -> None:
        """RAM and video RAM become holes of the memfd (madvise(2), MADV_REMOVE): they read as zero and take
        no room. vCPUs must not be running."""
        self._map.madvise(mmap.MADV_REMOVE, self.guest_offset, self.rom_offset - self.guest_offset)

    @property
    def vram_offset(self) -> int:
        return int(self.header.vram)

    @property
    def rom_offset(self) -> int:
        return int(self.header.rom)

    def vcpu(self, index: int) -> Any:
        """``struct vcpu_block *``."""
        if not 0 <= index < self.vcpus:
            raise IndexError(f"vCPU {index} of {self.vcpus}")
        return self._at("struct vcpu_block *", self.header.vcpu_offset + self.header.vcpu_stride * index)

    def host(self, index: int) -> Any:
        """``struct host_block *``."""
        if not 0 <= index < lib.SEG_MAX_HOSTS:
            raise IndexError(f"device host {index}")
        return self._at("struct host_block *", self.header.host_offset + self.header.host_stride * index)

    def state(self, host: int) -> StateArea:
        """The committed state of a device host."""
        return StateArea(self.header, host)

    def output(self, host: int) -> Output:
        """What a device host has for the coordinator."""
        return Output(self.header, host)

    def ring(self, host: int) -> Ring:
        """The posted ring of a device host, from the host's end."""
        return Ring(self.header, host)

    @property
    def fabric(self) -> Any:
        return self._at("struct fabric *", self.header.fabric_offset)

    @property
    def ports(self) -> Any:
        """``uint16_t[]``: register descriptor of each port, 0 = unclaimed."""
        return self._at("uint16_t *", self.header.ports_offset)

    @property
    def port_map(self) -> npt.NDArray[np.uint16]:
        """The same as an array."""
        return self.view(int(self.header.ports_offset), 2 * lib.SEG_PORTS).view(np.uint16)

    @property
    def regs(self) -> Any:
        """``struct reg_desc[]``."""
        return self._at("struct reg_desc *", self.header.regs_offset)

    def view(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes of the segment, writable and shared."""
        return np.frombuffer(self._map, dtype=np.uint8, count=size, offset=offset)

    @property
    def ram(self) -> npt.NDArray[np.uint8]:
        return self.view(self.guest_offset, self.ram_size)

    @property
    def vram(self) -> npt.NDArray[np.uint8]:
        return self.view(self.vram_offset, int(self.header.vram_size))

    @property
    def rom(self) -> npt.NDArray[np.uint8]:
        return self.view(self.rom_offset, int(self.header.rom_size))

    @property
    def dirty(self) -> npt.NDArray[np.uint8]:
        """One byte a page of guest memory."""
        return self.view(int(self.header.dirty_offset), int(self.header.guest_pages))

    # ---- allocation: several device hosts may do so at once --------------------------------------
    def _allocate(self, word: str, limit: int, what: str) -> int:
        index = int(lib.seg_allocate(ffi.addressof(self.header, word), limit))
        if index >= limit:
            raise SegmentError(f"the segment has no room for another {what} ({limit} in all)")
        return index

    def allocate_device(self, name: str) -> int:
        """A device id; ``name`` is what tables and traces call it."""
        index = self._allocate("next_device", lib.SEG_MAX_DEVICES, "device")
        encoded = name.encode()[: lib.SEG_NAME_LEN - 1]
        ffi.memmove(self.header.device_name[index], encoded + b"\0", len(encoded) + 1)
        return index

    def allocate_register(self) -> int:
        """Index of an unused register descriptor."""
        return self._allocate("next_reg", lib.SEG_MAX_REGS, "register")

    def allocate_shadow(self) -> int:
        return self._allocate("next_shadow", lib.SEG_MAX_SHADOWS, "shadow register")

    def allocate_hazard(self) -> int:
        return self._allocate("next_hazard", lib.SEG_MAX_HAZARDS, "hazard")

    def allocate_time_source(self, mul: int, div: int, mask: int) -> int:
        """A counter that is ``(guest ns - offset) * mul / div & mask`` while it runs."""
        index = self._allocate("next_time_source", lib.SEG_MAX_TIME_SOURCES, "time source")
        lib.time_source_shape(self.header, index, mul, div, mask)
        return index

    def device_name(self, index: int) -> str:
        name: bytes = ffi.string(self.header.device_name[index])
        return name.decode() or f"device{index}"

    # ---- registers -----------------------------------------------------------------------------
    def storing_shadows(self, host: int, storing: bool) -> None:
        """Around the shadows of one event of device host ``host``: vCPUs see all of them or none."""
        lib.ring_storing(self.header, host, storing)

    def set_shadow(self, index: int, value: int) -> None:
        lib.seg_shadow_set(self.header, index, value & NO_OFFSET)

    def set_time_source(self, index: int, running: bool, offset_ns: int, frozen: int) -> None:
        lib.time_source_set(self.header, index, running, offset_ns & NO_OFFSET, frozen & NO_OFFSET)

    def time_source(self, index: int) -> int:
        """Its value now."""
        return int(lib.time_source_read(self.header, index))

    # ---- time ----------------------------------------------------------------------------------
    def guest_now(self) -> int:
        """Guest time in ns."""
        return int(lib.guest_now(self.header))

    def guest_tsc(self) -> int:
        return int(lib.guest_tsc(self.header))

    def time_runs(self) -> bool:
        return bool(self.header.time.running)

    def start_time(self) -> None:
        lib.guest_time_start(self.header)

    def stop_time(self) -> None:
        lib.guest_time_stop(self.header)

    def set_time(self, guest_ns: int, wall_ns: int, tsc_khz: int = DEFAULT_TSC_KHZ) -> None:
        """Only while time stands still. ``wall_ns`` is UNIX time at guest time 0."""
        lib.guest_time_set(self.header, guest_ns, wall_ns, tsc_khz)

    # ---- attention -----------------------------------------------------------------------------
    def attend(self, vcpu: int, bits: int) -> None:
        """Raise ATTN_* bits at a vCPU, and wake it."""
        lib.vcpu_attend(self.header, vcpu, bits)

    def call(self, vcpu: int) -> None:
        """A control message has been sent to this vCPU: make it leave the guest and read it."""
        lib.seg_call(self.header, vcpu)

    def break_locks(self, pid: int) -> None:
        """Process ``pid`` has died: free what it held."""
        lib.seg_break_locks(self.header, pid)

    def lost(self, vcpu: int) -> None:
        """The process of a vCPU has died: nobody waits for it, and it has been sent no command."""
        lib.vcpu_lost(self.header, vcpu)

    def mend_ring(self, host: int, dead: Iterable[int], doorbell: int) -> bool:
        """Fill what dead vCPUs have drawn of a host's ring and not filled; False: not all yet, ask again."""
        return not lib.ring_mend(self.header, host, sum(1 << vcpu for vcpu in set(dead)), doorbell)

    # ---- map -----------------------------------------------------------------------------------
    def publish_map(self, regions: Iterable[RegionLike]) -> None:
        """Put a memory map in force; returns when every vCPU has it."""
        regions = list(regions)
        if len(regions) > lib.SEG_MAX_REGIONS:
            raise SegmentError(f"memory map of {len(regions)} regions: {lib.SEG_MAX_REGIONS} are possible")
        fresh = ffi.new("struct memory_map *")
        fresh.count = len(regions)
        for slot, region in zip(fresh.region, regions, strict=False):
            slot.gpa, slot.size, slot.flags = region.gpa, region.size, region.flags
            slot.read_offset, slot.write_offset = region.read_offset, region.write_offset
            slot.host, slot.device = region.host, region.device
            slot.first_reg, slot.regs = region.first_reg, region.regs
        if lib.seg_map_publish(self.header, fresh, -1):
            raise SegmentError("memory map is not sorted, overlaps, or names memory that is not there")

    def republish_map(self) -> None:
        """Let every vCPU see changes of the port map."""
        lib.seg_map_republish(self.header, -1)

    def memory_map(self) -> list[Any]:
        """The regions in force (``struct map_region``), sorted by address."""
        maps = self._at("struct memory_map *", self.header.maps_offset)
        current = maps[self.header.map_version & 1]
        return [current.region[i] for i in range(current.count)]

    # ---- guest memory --------------------------------------------------------------------------
    def dma_read(self, gpa: int, length: int) -> bytes:
        """Guest-physical memory; holes read as FFh."""
        data = bytearray(length)
        lib.seg_dma_read(self.header, gpa & NO_OFFSET, ffi.from_buffer(data, require_writable=True), length)
        return bytes(data)

    def dma_write(self, gpa: int, data: bytes | bytearray | memoryview) -> int:
        """Store, then mark dirty and code pages; returns how many bytes landed in RAM."""
        return int(lib.seg_dma_write(self.header, gpa & NO_OFFSET, ffi.from_buffer(data), len(data)))

    def dma_span(self, gpa: int, length: int, write: bool = True) -> memoryview | None:
        """A view of ``length`` contiguous bytes, or None; ``dma_written`` after bytes have landed."""
        room = ffi.new("uint64_t *")
        offset = lib.seg_dma_span(self.header, gpa & NO_OFFSET, length, write, room)
        if offset == NO_OFFSET or room[0] < length:
            return None
        return memoryview(self._map)[offset : offset + length]

    def dma_written(self, gpa: int, length: int) -> None:
        """Bytes have landed through a ``dma_span`` that began at ``gpa``."""
        room = ffi.new("uint64_t *")
        offset = lib.seg_dma_span(self.header, gpa & NO_OFFSET, length, 1, room)
        if offset != NO_OFFSET:
            lib.seg_written(self.header, offset, length)

    def written(self, offset: int, length: int) -> None:
        """A device has stored into guest memory at segment offset ``offset``: mark dirty and code pages."""
        lib.seg_written(self.header, offset, length)

    # ---- interrupts ----------------------------------------------------------------------------
    def pin_set(self, pin: int, source: int, level: bool) -> None:
        """Level that ``source`` (0-31) drives at an IOAPIC pin."""
        lib.pin_set(self.header, pin, source, level)

    def pic_intr(self, level: bool) -> None:
        """INTR of the 8259 pair, wired to LINT0 of every vCPU."""
        lib.pic_intr_set(self.header, level)

    def reset_fabric(self) -> None:
        """IOAPIC after RESET#; pins keep the levels that their sources drive."""
        lib.ioapic_reset(self.header)

    def msi(self, addr: int, data: int) -> bool:
        """Message-signalled interrupt; False: nobody took it."""
        return bool(lib.fabric_msi(self.header, addr, data))

    def post_interrupt(self, vcpu: int, mode: int, vector: int) -> None:
        """An interrupt message at one vCPU; ``mode`` is a delivery mode (SDM vol. 3 table 11-18)."""
        lib.fabric_post(self.header, vcpu, mode, vector, 0)

    # ---- counters ------------------------------------------------------------------------------
    def count_roundtrip(self, host: int, device: int) -> None:
        """One sync access served (only the host itself counts)."""
        block = self.host(host)
        block.sync_served += 1
        if 0 <= device < lib.SEG_MAX_DEVICES:
            block.roundtrips[device] += 1
