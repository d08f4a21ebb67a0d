"""The ACPI tables against the specification: by hand at their offsets, and by iasl where it is installed.

Offsets and values are those of ACPI 6.4 (5.2.x) and the HPET specification 1.0a, written here anew.
"""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path

import pytest

from coordinator.contract.config import Machine
from devhost.firmware import acpi, aml
from tests.support.tools import require_tool

BASE = 0x0FF0_0000


def machine(vcpus: int = 2, vga: bool = True, serials: int = 1) -> Machine:
    return Machine(name="test", vcpus=vcpus, ram=256 << 20, vga=vga, serials=serials)


class Memory:
    """The linked tables at their address, reached as an operating system does: from the RSDP on."""

    def __init__(self, subject: Machine) -> None:
        tables = acpi.build(subject)
        self.bytes = tables.blob.linked(BASE)
        self.rsdp = tables.rsdp(BASE)

    def table(self, address: int) -> bytes:
        at = address - BASE
        (length,) = struct.unpack_from("<I", self.bytes, at + 4)
        return self.bytes[at : at + length]

    def tables(self) -> dict[str, bytes]:
        """By signature; FACS and DSDT through the FADT."""
        (rsdt_at,) = struct.unpack_from("<I", self.rsdp, 16)
        rsdt = self.table(rsdt_at)
        found = {"RSDT": rsdt}
        for (pointer,) in struct.iter_unpack("<I", rsdt[36:]):
            table = self.table(pointer)
            found[table[:4].decode()] = table
        facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
        found["FACS"], found["DSDT"] = self.table(facs), self.table(dsdt)
        return found


def test_root_pointer() -> None:
    """5.2.5.3: signature, checksum over 20 bytes, revision 0."""
    rsdp = Memory(machine()).rsdp
    assert len(rsdp) == 20 and rsdp[:8] == b"RSD PTR " and sum(rsdp) & 0xFF == 0 and rsdp[15] == 0


def test_all_tables_are_linked_and_sum_to_zero() -> None:
    tables = Memory(machine()).tables()
    assert tables.keys() == {"RSDT", "FACP", "APIC", "HPET", "FACS", "DSDT"}
    for name, table in tables.items():
        if name != "FACS":  # 5.2.10: it has no checksum
            assert sum(table) & 0xFF == 0, name
    assert (len(tables["FACS"]), tables["FACS"][:4]) == (64, b"FACS")


def test_facs_is_on_its_boundary() -> None:
    """5.2.10: 64 bytes."""
    (facs,) = struct.unpack_from("<I", Memory(machine()).tables()["FACP"], 36)
    assert facs % 64 == 0


def test_fadt() -> None:
    """5.2.9, table 5.9."""
    fadt = Memory(machine()).tables()["FACP"]
    assert len(fadt) == 244 and fadt[8] == 3
    assert struct.unpack_from("<H", fadt, 46) == (9,)  # SCI_INT
    assert struct.unpack_from("<I", fadt, 48) == (0,)  # SMI_CMD: always in ACPI mode
    ports = struct.unpack_from("<8I", fadt, 56)  # PM1a_EVT PM1b_EVT PM1a_CNT PM1b_CNT PM2 PM_TMR GPE0 GPE1
    assert ports == (0x600, 0, 0x604, 0, 0, 0x608, 0x60C, 0)
    assert list(fadt[88:92]) == [4, 2, 0, 4]  # lengths of PM1_EVT, PM1_CNT, PM2_CNT, PM_TMR
    assert fadt[92] == 4 and fadt[108] == 0x32  # GPE0_BLK_LEN, CENTURY
    level2, level3 = struct.unpack_from("<HH", fadt, 96)
    assert level2 > 100 and level3 > 1000  # no C2, no C3
    assert struct.unpack_from("<H", fadt, 109) == (3,)  # IAPC_BOOT_ARCH: legacy devices, 8042
    (flags,) = struct.unpack_from("<I", fadt, 112)
    assert flags & 1 and flags & 1 << 10 and not flags & 1 << 4  # WBINVD, RESET_REG_SUP, power button fixed
    assert fadt[116:128] == struct.pack("<BBBBQ", 1, 8, 0, 1, 0xCF9) and fadt[128] == 0x0E
    assert fadt[148:160] == struct.pack("<BBBBQ", 1, 32, 0, 0, 0x600)  # X_PM1a_EVT_BLK
    assert fadt[208:220] == struct.pack("<BBBBQ", 1, 32, 0, 0, 0x608)  # X_PM_TMR_BLK


def test_fadt_says_that_there_is_no_display() -> None:
    """IAPC_BOOT_ARCH bit 2, VGA Not Present."""
    assert struct.unpack_from("<H", Memory(machine(vga=False)).tables()["FACP"], 109) == (7,)


@pytest.mark.parametrize("vcpus", [1, 4, 32])
def test_madt(vcpus: int) -> None:
    """5.2.12: every local APIC, the IOAPIC, the overrides of IRQ 0 and of level interrupts, NMI at LINT1."""
    madt = Memory(machine(vcpus)).tables()["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries: dict[int, list[bytes]] = {}
    at = 44
    while at < len(madt):
        entries.setdefault(madt[at], []).append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert at == len(madt)
    assert [struct.unpack("<BBBBI", entry)[2:] for entry in entries[0]] == [(i, i, 1) for i in range(vcpus)]
    assert [struct.unpack("<BBBBII", entry)[4:] for entry in entries[1]] == [(0xFEC0_0000, 0)]
    overrides = {entry[3]: struct.unpack_from("<IH", entry, 4) for entry in entries[2]}
    assert overrides == {0: (2, 0), 5: (5, 0xD), 9: (9, 0xD), 10: (10, 0xD), 11: (11, 0xD)}
    assert entries[4] == [b"\x04\x06\xff\x00\x00\x01"]


def test_hpet() -> None:
    """HPET 1.0a, 3.2.4: hardware id 8086A201h - three timers, 64 bits, legacy replacement."""
    hpet = Memory(machine()).tables()["HPET"]
    assert len(hpet) == 56
    assert struct.unpack_from("<IBBBBQ", hpet, 36) == (0x8086A201, 0, 0, 0, 0, 0xFED0_0000)


@pytest.mark.parametrize(
    ("length", "encoded"),
    [(0, "01"), (62, "3f"), (63, "4104"), (0xFFD, "4fff"), (0xFFE, "810001"), (0xFFFFC, "8fffff")],
)
def test_package_length(length: int, encoded: str) -> None:
    """20.2.4: the length counts its own bytes; 6 bits, or 4 and 8, 16 or 24 more."""
    assert aml.package_length(length).hex() == encoded


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("\\", b"\\\0"),
        ("\\_SB", b"\\_SB_"),
        ("A.B", b"\x2eA___B___"),
        ("\\_SB.PCI0.ISA", b"\\\x2f\x03_SB_PCI0ISA_"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    """20.2.2: segments are padded with underscores; prefixes for two and for many."""
    assert aml.name_string(path) == encoded


def test_eisa_id() -> None:
    """19.3.4: PNP0A03 is the DWORD 030AD041h."""
    assert aml.eisa_id("PNP0A03") == b"\x0c\x41\xd0\x0a\x03"


@pytest.fixture
def listing(tmp_path: Path) -> str:
    """The DSDT as iasl disassembles it - and compiles again."""
    require_tool("iasl")
    (tmp_path / "dsdt.aml").write_bytes(Memory(machine(vcpus=3, serials=2)).tables()["DSDT"])
    subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, check=True, capture_output=True)
    text = (tmp_path / "dsdt.dsl").read_text()
    done = subprocess.run(["iasl", "-p", "again", "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "0 Errors" in done.stdout, done.stdout + done.stderr
    return text


def test_dsdt_by_iasl(listing: str) -> None:
    """What a PC's namespace must have."""
    for device in (
        "PCI0",
        "ISA",
        "LNKA",
        "LNKD",
        "HPET",
        "C000",
        "C002",
        "COM1",
        "COM2",
        "KBD",
        "MOU",
        "RTC",
    ):
        assert re.search(rf"Device \({device}\)", listing), device
    assert "C003" not in listing
    assert re.search(r"_S5.{,60}Package \(0x04\).{,60}Zero,\s*Zero,\s*Zero,\s*Zero", listing, re.DOTALL)
    assert "OperationRegion (P60C, PCI_Config, 0x60, 0x04)" in listing
    routes = re.findall(r"0x([0-9A-F]{8}),\s+(Zero|One|0x0[23]),\s+(LNK[A-D]),\s+Zero", listing)
    assert len(routes) == 31 * 4
    pins = {"Zero": 0, "One": 1, "0x02": 2, "0x03": 3}
    for address, pin, link in routes:  # the board's wiring: slots rotate the pins
        slot = int(address, 16) >> 16
        assert link == "LNK" + "ABCD"[(slot - 1 + pins[pin]) % 4]


@pytest.mark.parametrize("name", ["FACP", "APIC", "HPET", "FACS", "RSDT"])
def test_data_tables_by_iasl(tmp_path: Path, name: str) -> None:
    """iasl knows the layout of each and finds nothing wrong."""
    require_tool("iasl")
    (tmp_path / "table.aml").write_bytes(Memory(machine()).tables()[name])
    done = subprocess.run(["iasl", "-d", "table.aml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    text = (tmp_path / "table.dsl").read_text()
    assert "Incorrect checksum" not in text + done.stderr and "Unknown" not in text, text


def test_serial_ports_are_those_of_the_machine() -> None:
    assert b"COM2" not in Memory(machine(serials=1)).bytes
