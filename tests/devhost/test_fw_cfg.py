"""fw_cfg as its specification has it (QEMU docs/specs/fw_cfg), and what guests do to it that they should not.

The table loader's script is run here by an interpreter of our own.
"""

from __future__ import annotations

import struct
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.contract.config import Boot, Drive, Machine, Media
from coordinator.contract.segment import Segment
from coordinator.contract.state import pack, unpack
from devhost.dma import SegmentDma
from devhost.firmware import acpi, fw_cfg
from devhost.firmware.fw_cfg import FwCfg, FwCfgRecord
from devhost.memory import MemoryMap
from tests.devhost.ide.rig import Memory

RAM = 1 << 20
DESCRIPTOR, BUFFER = 0x1000, 0x2000
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16


def machine(**changes: object) -> Machine:
    return Machine(**{"name": "test", "vcpus": 3, "ram": 5 << 30, "uuid": str(UUID), **changes})  # type: ignore[arg-type]


UUID = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


class Rig:
    def __init__(self, subject: Machine | None = None) -> None:
        self.memory = Memory(RAM)
        self.chip = FwCfg(self.memory)
        if subject is not None:
            fw_cfg.describe(self.chip, subject)
            fw_cfg.set_boot_order(self.chip, subject, subject.boot.order)
            fw_cfg.add_acpi(self.chip, acpi.build(subject))

    def item(self, key: int, length: int) -> bytes:
        self.chip.write(0, 2, key)
        return self.chip.read_string(1, 1, length)

    def dma(self, control: int, length: int = 0, address: int = BUFFER) -> int:
        """Run a descriptor; returns the control word afterwards."""
        self.memory.write(DESCRIPTOR, struct.pack(">IIQ", control, length, address))
        self.start(DESCRIPTOR)
        return int.from_bytes(self.memory.read(DESCRIPTOR, 4), "big")

    def start(self, address: int) -> None:
        for offset, word in ((4, address >> 32), (8, address & 0xFFFF_FFFF)):
            self.chip.write(offset, 4, int.from_bytes(word.to_bytes(4, "big"), "little"))

    def files(self) -> dict[str, bytes]:
        """By the directory at key 19h: big-endian count, then size, key, reserved, name."""
        (count,) = struct.unpack(">I", self.item(0x19, 4))
        directory = self.item(0x19, 4 + 64 * count)[4:]
        found = {}
        for size, key, reserved, name in struct.iter_unpack(">IHH56s", directory):
            assert reserved == 0
            found[name.rstrip(b"\0").decode()] = self.item(key, size)
        return found


def test_signature_and_interface() -> None:
    """Key 0 is "QEMU"; key 1 has bit 0, and bit 1 as the DMA interface is there, which shows "QEMU CFG"."""
    rig = Rig()
    assert rig.item(0, 4) == b"QEMU" and rig.item(1, 4) == b"\x03\0\0\0"
    shown = b"".join(rig.chip.read(offset, 4).to_bytes(4, "little") for offset in (4, 8))
    assert shown == b"QEMU CFG"
    assert bytes(rig.chip.read(4 + i, 1) for i in range(8)) == b"QEMU CFG"


def test_items_end_in_zeros() -> None:
    rig = Rig()
    assert rig.item(0, 8) == b"QEMU\0\0\0\0"


@pytest.mark.parametrize("key", [0x0B, 0x18, 0x1FFF, 0x3FFF, 0x7FFF, 0xBFFF, 0xFFFE, 0xFFFF])
def test_selector_out_of_range(key: int) -> None:
    """CVE-2016-1714: such an item is empty, by port and by DMA; writes to it go nowhere."""
    rig = Rig(machine())
    assert rig.item(key, 16) == bytes(16)
    rig.chip.write(1, 1, 0x55)
    rig.memory.write(BUFFER, b"\xaa" * 16)
    assert rig.dma(key << 16 | SELECT | READ, 16) == 0
    assert rig.memory.read(BUFFER, 16) == bytes(16)
    assert rig.dma(key << 16 | SELECT | WRITE, 16) == ERROR
    assert rig.item(0, 4) == b"QEMU"


def test_dma_reads_skips_and_selects() -> None:
    rig = Rig()
    rig.chip.add_file("opt/x", bytes(range(64)))
    assert rig.dma(0x20 << 16 | SELECT | READ, 8) == 0
    assert rig.memory.read(BUFFER, 8) == bytes(range(8))
    assert rig.dma(SKIP, 8) == 0
    assert rig.dma(READ, 4) == 0
    assert rig.memory.read(BUFFER, 4) == bytes(range(16, 20))
    assert rig.chip.read(1, 1) == 20  # the port goes on where DMA stopped
    assert rig.dma(WRITE, 4) == ERROR


def test_dma_past_the_end_of_an_item() -> None:
    rig = Rig()
    rig.memory.write(BUFFER, b"\xaa" * 16)
    assert rig.dma(SELECT | SKIP, 0xFFFF_FFFF) == 0
    assert rig.dma(READ, 8) == 0
    assert rig.memory.read(BUFFER, 16) == bytes(8) + b"\xaa" * 8


@pytest.fixture(scope="module")
def real() -> Rig:
    """Over a real segment, whose C functions look at the addresses."""
    segment = Segment.create(vcpus=1, ram=RAM)
    MemoryMap(segment).publish()
    rig = Rig(machine())
    rig.memory = SegmentDma(segment, segment.host(0))  # type: ignore[assignment]
    rig.chip._dma = rig.memory
    return rig


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0, 0xFFFF_FFFF),
        (0xA0000 - 8, 0x30000),
        (RAM - 4, 0xFFFF_FFFF),
        (RAM, 64),
        (1 << 32, 1 << 20),
        ((1 << 64) - 1, 0xFFFF_FFFF),
        ((1 << 64) - 0x10000, 0x20000),
    ],
)
def test_dma_to_anywhere(real: Rig, address: int, length: int) -> None:
    """Holes swallow; nothing wraps round to address 0, nothing raises."""
    real.memory.write(0x500, b"low memory")
    real.dma(SELECT | READ, length, address)
    if address:
        assert real.memory.read(0x500, 10) == b"low memory"


@pytest.mark.parametrize("descriptor", [RAM - 8, RAM, 0xA0000, 1 << 40, (1 << 64) - 16, (1 << 64) - 3])
def test_descriptor_anywhere(real: Rig, descriptor: int) -> None:
    """A hole reads as ones: select key FFFFh, read 4 GiB to the last address."""
    real.start(descriptor)
    real.chip.write(0, 2, 0)
    assert real.chip.read_string(1, 1, 4) == b"QEMU"


accesses = st.lists(
    st.tuples(st.booleans(), st.integers(0, 11), st.sampled_from((1, 2, 4)), st.integers(0, 0xFFFF_FFFF)),
    max_size=30,
)


@given(accesses)
def test_any_access_in_any_order(steps: list[tuple[bool, int, int, int]]) -> None:
    """Never raises; reads fit their width; a record goes round."""
    rig = Rig(machine())
    for write, offset, width, value in steps:
        if write:
            rig.chip.write(offset, width, value & (1 << 8 * width) - 1)
        else:
            assert 0 <= rig.chip.read(offset, width) < 1 << 8 * width
    copy = Rig(machine()).chip
    copy.load(unpack(pack(rig.chip.save()), FwCfgRecord))
    assert copy.read_string(1, 1, 8) == rig.chip.read_string(1, 1, 8)


# ---- what firmware learns ---------------------------------------------------------------------------
def test_description() -> None:
    rig = Rig(machine(boot=Boot(menu=True)))
    assert rig.item(0x02, 16) == UUID.bytes
    assert struct.unpack("<Q", rig.item(0x03, 8)) == (5 << 30,)
    assert rig.item(0x05, 2) == rig.item(0x0F, 2) == b"\x03\0"
    assert rig.item(0x0E, 2) == b"\x01\0"
    assert rig.item(0x8002, 4) == b"\x01\0\0\0"  # IRQ 0 at pin 2
    e820 = list(struct.iter_unpack("<QQI", rig.files()["etc/e820"]))
    assert e820 == [(0, 3 << 30, 1), (4 << 30, 2 << 30, 1)]


def test_boot_order() -> None:
    """Paths as Open Firmware spells them: ide@1,1, channel, drive."""
    disk = Drive(id="hd", index=1, media=Media.DISK, file="/d")
    cd = Drive(id="cd", index=2, media=Media.CDROM)
    rig = Rig(machine(drives=(disk, cd), boot=Boot(order="dc")))
    assert (
        rig.files()["bootorder"]
        == b"/pci@i0cf8/ide@1,1/drive@1/disk@0\n/pci@i0cf8/ide@1,1/drive@0/disk@1\n\0"
    )


class Loader:
    """The table loader: 128-byte commands, names of 56 bytes, numbers little-endian."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.memory: dict[str, bytearray] = {}
        self.places: dict[str, int] = {}
        self.free = {1: 0x7FE_0000, 2: 0xF_0000}  # high memory, F segment
        script = files["etc/table-loader"]
        assert len(script) % 128 == 0
        for at in range(0, len(script), 128):
            (kind,) = struct.unpack_from("<I", script, at)
            {1: self.allocate, 2: self.add_pointer, 3: self.add_checksum}[kind](script[at + 4 : at + 128])

    @staticmethod
    def name(field: bytes) -> str:
        return field.rstrip(b"\0").decode()

    def allocate(self, body: bytes) -> None:
        name, align, zone = struct.unpack_from("<56sIB", body)
        assert align and align & align - 1 == 0
        place = -(-self.free[zone] // align) * align
        self.memory[self.name(name)] = bytearray(self.files[self.name(name)])
        self.places[self.name(name)] = place
        self.free[zone] = place + len(self.files[self.name(name)])

    def add_pointer(self, body: bytes) -> None:
        where, target, at, size = struct.unpack_from("<56s56sIB", body)
        field = self.memory[self.name(where)]
        value = int.from_bytes(field[at : at + size], "little") + self.places[self.name(target)]
        assert (
            self.places[self.name(target)]
            <= value
            < self.places[self.name(target)] + len(self.memory[self.name(target)])
        )
        field[at : at + size] = value.to_bytes(size, "little")

    def add_checksum(self, body: bytes) -> None:
        where, at, start, length = struct.unpack_from("<56sIII", body)
        data = self.memory[self.name(where)]
        assert start <= at < start + length <= len(data)
        data[at] = (data[at] - sum(data[start : start + length])) & 0xFF


def test_table_loader_links_the_tables() -> None:
    subject = machine()
    loader = Loader(Rig(subject).files())
    rsdp, tables = loader.memory["etc/acpi/rsdp"], loader.memory["etc/acpi/tables"]
    base = loader.places["etc/acpi/tables"]
    assert 0xE0000 <= loader.places["etc/acpi/rsdp"] < 0x100000 and loader.places["etc/acpi/rsdp"] % 16 == 0
    assert rsdp[:8] == b"RSD PTR " and sum(rsdp) & 0xFF == 0
    assert bytes(tables) == acpi.build(subject).blob.linked(base)  # the same as a boot without firmware gets
    (rsdt,) = struct.unpack_from("<I", rsdp, 16)
    assert tables[rsdt - base : rsdt - base + 4] == b"RSDT"
