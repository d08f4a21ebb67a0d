"""Page tables read from outside, beside the vCPU's own walker."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator

import pytest

from coordinator.contract.errors import ConfigError
from coordinator.paging import Mapping, Tables
from tests.vcpu.guest import PSE, RAM, TABLES, Guest
from vcpu._core import lib

PRESENT_WRITABLE_USER = 7


@pytest.fixture(params=["legacy", "pae", "long"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    made = Guest(request.param)
    yield made
    made.close()


def walker(guest: Guest, linear: int) -> int | None:
    gpa = int(lib.core_translate(guest.cpu, linear))
    return None if gpa == lib.SEG_NO_OFFSET else gpa


def test_addresses_lead_where_the_vcpu_finds_them(guest: Guest) -> None:
    """Pages moved, taken away, and left as they are."""
    rng = random.Random(5)
    for page in rng.sample(range(0x100, 0x1F0), 40):
        linear = page << 12
        guest.set_pte(linear, rng.choice([0, rng.randrange(RAM >> 12) << 12 | PRESENT_WRITABLE_USER]))
    guest.changed()
    tables = Tables(guest.segment, guest.arch)
    asked = [rng.randrange(4 << 20) for _ in range(300)] + [1 << 47, 0xFFFF_FFFF, 1 << 30]
    limit = (1 << 64) - 1 if guest.mode == "long" else (1 << 32) - 1
    asked = [linear & limit for linear in asked]
    assert [tables.translate(linear) for linear in asked] == [walker(guest, linear) for linear in asked]
    mapped = [
        (each.linear + at, each.gpa + at) for each in tables.mappings() for at in range(0, each.size, 4096)
    ]
    assert len(mapped) > 200
    assert mapped == sorted(mapped)
    assert [gpa for _, gpa in mapped] == [walker(guest, linear) for linear, _ in mapped]


def test_neighbours_are_one() -> None:
    guest = Guest("long")
    tables = Tables(guest.segment, guest.arch)
    whole = tables.mappings()
    guest.set_pte(0x9000, 0)
    first, second = tables.mappings()[:2]
    assert whole[0].linear == first.linear == 0
    assert first == Mapping(0, 0, 0x9000) and second.linear == second.gpa == 0xA000
    guest.close()


def test_without_paging_an_address_is_itself() -> None:
    guest = Guest("protected")
    tables = Tables(guest.segment, guest.arch)
    assert tables.translate(0x12345) == 0x12345 and tables.mappings() == []
    guest.close()


def test_large_pages_of_32_bits() -> None:
    guest = Guest("legacy")
    guest.arch.cr4 |= PSE
    # 4 MiB page, PSE-36: bits 13 up are address bits 32 up (SDM vol. 3 table 4-4)
    guest.write(TABLES + 4 * 0x300, struct.pack("<I", 0x0040_0000 | 1 << 13 | 0x80 | 1))
    guest.changed()
    tables = Tables(guest.segment, guest.arch)
    linear = 0x300 << 22 | 0x12345
    assert tables.translate(linear) == walker(guest, linear) == 1 << 32 | 0x0041_2345
    guest.close()


def test_tables_that_never_end() -> None:
    """Each entry of a table leads to the table itself."""
    guest = Guest("long")
    guest.write(0x100000, struct.pack("<Q", 0x100000 | 3) * 512)
    guest.arch.cr3 = 0x100000
    guest.changed()
    with pytest.raises(ConfigError, match="page tables"):
        Tables(guest.segment, guest.arch).mappings()
    guest.close()
