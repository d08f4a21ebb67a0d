"""Boot without firmware: layout, start state, and images that are none.

Expected values from Linux's boot.rst and zero-page.rst, Multiboot 0.6.96, gABI, SDM 3A 11.11.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.boot import elf, kernel_loader, multiboot, platform, read_firmware
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.messages import LoadCpu
from coordinator.contract.segment import Segment
from tests.coordinator.boot import images
from tests.coordinator.boot.images import MIB, machine


class Loaded:
    """RAM and start state after the loader of ``image``."""

    def __init__(
        self,
        folder: Path,
        image: bytes,
        subject: Machine | None = None,
        initrd: str | None = None,
        append: str = "",
    ) -> None:
        kernel = folder / "kernel"
        kernel.write_bytes(image)
        self.machine = subject or machine()
        load = kernel_loader(self.machine, kernel, initrd, append)
        self.segment = Segment.create(vcpus=2, ram=self.machine.ram)
        start = load(self.segment)
        assert isinstance(start, LoadCpu)
        self.mode, self.registers = start.mode, start.registers

    def at(self, address: int, length: int) -> bytes:
        return bytes(self.segment.ram[address : address + length])

    def u(self, fmt: str, address: int) -> int:
        value: int = struct.unpack("<" + fmt, self.at(address, struct.calcsize(fmt)))[0]
        return value

    def linear(self, address: int) -> int:
        """Through the page tables that CR3 points to (SDM 3A 4.5)."""
        table = self.registers["cr3"]
        for shift in (39, 30, 21):
            entry = self.u("Q", table + 8 * (address >> shift & 0x1FF))
            assert entry & 3 == 3
            table = entry & 0xF_FFFF_FFFF_F000
            if entry & 0x80:
                return table | address & (1 << shift) - 1
        raise AssertionError("no large page")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


# ---- Linux ---------------------------------------------------------------------------------------------
def test_linux(folder: Path) -> None:
    """64-bit boot protocol: entry at 200h of the payload, RSI = boot parameters, identity-mapped."""
    payload = bytes(range(256)) * 16
    linux = Loaded(folder, images.bzimage(payload), append="console=ttyS0 quiet")
    assert (linux.mode, linux.registers["rip"]) == ("long", 16 * MIB + 0x200)
    assert linux.at(16 * MIB, 4096) == payload
    page = linux.registers["rsi"]
    assert (
        linux.at(page + 0x202, 4) == b"HdrS"
        and linux.u("B", page + 0x210) == 0xFF
        and linux.u("B", page + 0x211) & 1
    )
    assert linux.at(linux.u("I", page + 0x228), 20) == b"console=ttyS0 quiet\0"
    assert linux.u("Q", page + 0x258) == 16 * MIB  # the header is copied
    assert linux.u("II"[0], page + 0x218) == linux.u("I", page + 0x21C) == 0  # no initrd
    for address in (0, 16 * MIB + 0x200, 0xFEE0_0000, 0xFFFF_FFFF):
        assert linux.linear(address) == address


def test_memory_map(folder: Path) -> None:
    """INT 15h E820h: conventional memory, the BIOS's, extended memory, the ACPI tables."""
    linux = Loaded(folder, images.bzimage())
    page = linux.registers["rsi"]
    count = linux.u("B", page + 0x1E8)
    entries = list(struct.iter_unpack("<QQI", linux.at(page + 0x2D0, 20 * count)))
    assert entries == [
        (0, 0x9FC00, 1), (0x9FC00, 0x400, 2), (0xF0000, 0x10000, 2),
        (MIB, 63 * MIB - 0x10000, 1), (64 * MIB - 0x10000, 0x10000, 3),
    ]  # fmt: skip
    ends = [start + size for start, size, _ in entries]
    assert all(end <= start for end, (start, _, _) in zip(ends, entries[1:], strict=False))


def test_memory_above_4_gib() -> None:
    """-m 4608: 3 GiB below, 1.5 GiB above."""
    entries = platform.memory(machine(4608 * MIB)).e820()
    assert entries[-1] == (4 << 30, 1536 * MIB, 1) and entries[-2] == (0xC000_0000 - 0x10000, 0x10000, 3)


def test_acpi_root_is_where_firmware_puts_it(folder: Path) -> None:
    """boot_params.acpi_rsdp_addr, and a 16-byte boundary in the BIOS's 64 KiB (ACPI 5.2.5.1)."""
    linux = Loaded(folder, images.bzimage())
    rsdp = linux.u("Q", linux.registers["rsi"] + 0x70)
    assert 0xE0000 <= rsdp < MIB and rsdp % 16 == 0
    assert linux.at(rsdp, 8) == b"RSD PTR " and sum(linux.at(rsdp, 20)) & 0xFF == 0
    rsdt = linux.u("I", rsdp + 16)
    assert linux.at(rsdt, 4) == b"RSDT" and sum(linux.at(rsdt, linux.u("I", rsdt + 4))) & 0xFF == 0


def test_screen_info(folder: Path) -> None:
    """Mode 3, 80 x 25, VGA, 16 lines a character; nothing where there is no display."""
    linux = Loaded(folder, images.bzimage())
    page = linux.registers["rsi"]
    assert [linux.u("B", page + at) for at in (6, 7, 0xE, 0xF)] == [3, 80, 25, 1] and linux.u(
        "H", page + 0x10
    ) == 16
    without = Loaded(folder, images.bzimage(), machine(vga=False))
    assert without.at(without.registers["rsi"], 0x40) == bytes(0x40)


def test_initrd(folder: Path) -> None:
    """As high as the kernel allows, on a page, clear of kernel and ACPI tables."""
    (folder / "initrd").write_bytes(b"initrd" * 1000)
    for limit in (0x7FFF_FFFF, 48 * MIB - 1):
        linux = Loaded(folder, images.bzimage(initrd_max=limit), initrd=str(folder / "initrd"))
        page = linux.registers["rsi"]
        at, size = linux.u("I", page + 0x218), linux.u("I", page + 0x21C)
        assert linux.at(at, size) == b"initrd" * 1000
        assert at % 4096 == 0 and 24 * MIB <= at and at + size <= min(limit + 1, 64 * MIB - 0x10000)


def test_mtrrs(folder: Path) -> None:
    """Write-back by default; A0000h-BFFFFh and the PCI hole uncached."""
    registers = Loaded(folder, images.bzimage()).registers
    assert registers["mtrr_def_type"] == 0xC06
    assert (registers["mtrr_base0"], registers["mtrr_mask0"]) == (0xC000_0000, 0xFF_C000_0800)
    assert (registers["mtrr_fixed"], registers["mtrr_fixed2"]) == (0x0606_0606_0606_0606, 0)


def test_descriptors(folder: Path) -> None:
    """boot.rst: __BOOT_CS 10h, __BOOT_DS 18h, flat 4 GiB; for 32-bit code 20h."""
    linux = Loaded(folder, images.bzimage())
    table = linux.registers["gdt_base"]
    assert linux.registers["gdt_limit"] == 39
    assert [linux.u("Q", table + at) for at in (0x10, 0x18, 0x20)] == [
        0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_9B00_0000_FFFF,
    ]  # fmt: skip


def test_loading_again_is_a_fresh_start(folder: Path) -> None:
    """A reset: what the guest has overwritten is back, and translated code of those pages is dropped."""
    (folder / "kernel").write_bytes(images.bzimage())
    load = kernel_loader(machine(), folder / "kernel", None, "")
    segment = Segment.create(vcpus=2, ram=64 * MIB)
    first = load(segment)
    segment.ram[16 * MIB : 16 * MIB + 4096] = 0
    segment.dirty[:] = 0
    assert load(segment) == first
    assert (
        bytes(segment.ram[16 * MIB : 16 * MIB + 4096]) == b"\xf4" * 4096 and segment.dirty[16 * MIB // 4096]
    )


# ---- ELF and multiboot ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("bits", "mode"), [(32, "flat32"), (64, "long")])
def test_elf(folder: Path, bits: int, mode: str) -> None:
    """Segments at their physical addresses, the rest of memsz zero; the entry point follows its segment."""
    kernel = Loaded(folder, images.elf(bits, 2 * MIB, b"code" * 10, 0x2000, virtual=0xC000_0000))
    assert (kernel.mode, kernel.registers["rip"]) == (mode, 2 * MIB + 1)
    assert kernel.at(2 * MIB, 40) == b"code" * 10 and kernel.at(2 * MIB + 40, 0x2000 - 40) == bytes(
        0x2000 - 40
    )
    assert ("cr3" in kernel.registers) == (bits == 64)


def test_multiboot(folder: Path) -> None:
    """3.2: EAX magic, EBX information; 3.3: memory, command line, memory map, loader name."""
    kernel = Loaded(folder, images.multiboot(load_end=MIB + 0x60, bss_end=MIB + 0x3000), append="one two")
    assert (kernel.mode, kernel.registers["rip"], kernel.registers["rax"]) == (
        "flat32",
        MIB + 0x40,
        0x2BADB002,
    )
    info = kernel.registers["rbx"]
    assert kernel.u("I", info) == 0x24D
    assert (kernel.u("I", info + 4), kernel.u("I", info + 8)) == (639, (63 * MIB - 0x10000) >> 10)
    assert kernel.at(kernel.u("I", info + 16), 15) == b"kernel one two\0"
    assert kernel.u("I", info + 20) == 0
    length, at = kernel.u("I", info + 44), kernel.u("I", info + 48)
    assert [entry[:3] for entry in struct.iter_unpack("<IQQI", kernel.at(at, length))][0] == (20, 0, 0x9FC00)
    assert kernel.at(kernel.u("I", info + 64), 6) == b"atoll\0"
    assert kernel.at(MIB, 12) == bytes(8) + b"\x02\xb0\xad\x1b" and kernel.at(MIB + 0x60, 0x1000) == bytes(
        0x1000
    )


def test_multiboot_modules(folder: Path) -> None:
    """3.3: on pages, each with its words."""
    for name in ("first", "second"):
        (folder / name).write_bytes(name.encode() * 1000)
    words = f"{folder}/first a b,{folder}/second"
    kernel = Loaded(folder, images.multiboot(), initrd=words)
    info = kernel.registers["rbx"]
    count, at = kernel.u("I", info + 20), kernel.u("I", info + 24)
    modules = list(struct.iter_unpack("<IIII", kernel.at(at, 16 * count)))
    assert [kernel.at(start, end - start) for start, end, _, _ in modules] == [
        b"first" * 1000,
        b"second" * 1000,
    ]
    assert all(start % 4096 == 0 for start, *_ in modules)
    assert kernel.at(modules[0][2], 400).split(b"\0")[0].endswith(b"first a b")


def test_multiboot_elf(folder: Path) -> None:
    """Without address fields the ELF headers say them; it starts in 32-bit mode in any case."""
    header = images.multiboot(flags=3)[8:20]
    kernel = Loaded(folder, images.elf(64, MIB, b"\0" * 8 + header + bytes(8)))
    assert (kernel.mode, kernel.registers["rip"]) == ("flat32", MIB + 1)


def test_headers_on_the_page_below_1_mib(folder: Path) -> None:
    """Where GNU ld puts them for a kernel linked at 1 MiB."""
    kernel = Loaded(folder, images.elf(32, MIB - 4096, bytes(4096) + b"code", 0x2000))
    assert kernel.at(MIB, 4) == b"code"


# ---- what does not fit, and what is none ------------------------------------------------------------------
BAD = {
    "empty": b"",
    "text": b"#!/bin/sh\n" * 100,
    "elf of 4 bytes": b"\x7fELF",
    "elf header": images.elf()[:60],
    "elf program header": images.elf()[:100],
    "elf segment": images.elf()[:-1],
    "elf of another machine": images.elf()[:18] + b"\xb7\0" + images.elf()[20:],
    "elf big-endian": images.elf()[:5] + b"\x02" + images.elf()[6:],
    "elf without segments": images.elf()[:56] + b"\0\0" + images.elf()[58:],
    "elf far headers": images.elf()[:32] + b"\xff" * 8 + images.elf()[40:],
    "elf at 0": images.elf(address=0, size=0x9000),
    "elf over the boot data": images.elf(address=0x8000),
    "elf in the display": images.elf(address=0x9F000),
    "elf over the ACPI root pointer": images.elf(address=0xEF000),
    "elf beyond RAM": images.elf(address=64 * MIB - 0x2000),
    "elf beyond 4 GiB": images.elf(address=1 << 40),
    "elf at the end of the world": images.elf(address=(1 << 64) - 0x1000),
    "elf of 16 EiB": images.elf(size=(1 << 64) - 1),
    "elf32 of 4 GiB": images.elf(32, size=0xFFFF_FFFF),
    "bzimage cut": images.bzimage()[:0x240],
    "bzimage without its payload": images.bzimage()[:2048],
    "bzimage with half of it": images.bzimage()[:-16],
    "bzimage too old": images.bzimage(version=0x020B),
    "bzimage of 32 bits": images.bzimage(flags=0),
    "bzimage at 0": images.bzimage(base=0),
    "bzimage at the end of the world": images.bzimage(base=(1 << 64) - 1),
    "bzimage too large": images.bzimage(init_size=0xFFFF_FFFF),
    "multiboot cut": images.multiboot()[:24],
    "multiboot unknown feature": images.multiboot(flags=0x1_0008),
    "multiboot neither": images.multiboot(flags=0),
    "multiboot backwards": images.multiboot(load=MIB, load_end=MIB - 1),
    "multiboot longer than the file": images.multiboot(load_end=MIB + 0x1000),
    "multiboot beyond RAM": images.multiboot(bss_end=0xFFFF_FFFF),
    "multiboot over the boot data": images.multiboot(load=0x8000),
}


@pytest.mark.parametrize("name", BAD)
def test_images_that_are_none(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError) as error:
        Loaded(folder, BAD[name])
    assert "\n" not in str(error.value) and len(str(error.value)) < 200 + len(str(folder))


@given(st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_spoilt_images(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes changed or cut at random: a ConfigError or a start, nothing else. Loaders are run, too."""
    whole = data.draw(st.sampled_from([images.bzimage(), images.elf(), images.elf(32), images.multiboot()]))
    image = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 6))):
        if image:
            at = data.draw(st.one_of(st.integers(0, 0x80), st.integers(0x1F0, 0x26C)))
            image[at % len(image)] = data.draw(st.sampled_from((0x00, 0x01, 0x7F, 0x80, 0xFF)))
    kernel = tmp_path / "kernel"
    kernel.write_bytes(image)
    try:
        load = kernel_loader(machine(), kernel, None, "")
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert load(SPARE) is not None


SPARE = Segment.create(vcpus=2, ram=64 * MIB)


@pytest.mark.parametrize(
    ("ram", "image", "initrd", "message"),
    [
        (1, images.bzimage(), 0, "-m 1M is too little"),
        (16, images.bzimage(), 0, "the kernel does not fit into RAM: give at least -m 25M"),
        (
            25,
            images.bzimage(),
            2 * MIB,
            "the kernel with its initrd does not fit into RAM: give at least -m 27M",
        ),
        (8, images.elf(size=8 * MIB), 0, "give at least -m 10M"),
        (4, images.multiboot(), 4 * MIB, "a multiboot module does not fit into RAM: give at least -m 6M"),
    ],
)
def test_too_little_memory_says_how_much(
    folder: Path, ram: int, image: bytes, initrd: int, message: str
) -> None:
    """And with as much it does."""
    file = folder / "initrd"
    file.write_bytes(bytes(initrd))
    argument = str(file) if initrd else None
    with pytest.raises(ConfigError) as error:
        Loaded(folder, image, machine(ram * MIB), argument)
    assert message in str(error.value)
    if "-m 1M" not in message:
        Loaded(folder, image, machine(int(message.split("-m ")[1][:-1]) * MIB), argument)


def test_command_lines_and_initrds_that_do_not_go(folder: Path) -> None:
    def refused(match: str, image: bytes, initrd: str | None = None, append: str = "") -> None:
        with pytest.raises(ConfigError, match=match):
            Loaded(folder, image, initrd=initrd, append=append)

    refused("-append: 2048 bytes", images.bzimage(), append="x" * 2048)
    refused("-append", images.bzimage(command_line=0xFFFF_FFFF), append="x" * 0x10000)
    refused("-append", images.multiboot(), append="x" * 0x10000)
    refused("-initrd and -append", images.elf(), append="x")
    refused("No such file", images.bzimage(), initrd=str(folder / "none"))
    refused("No such file", images.multiboot(), initrd=str(folder / "none"))
    (folder / "module").write_bytes(b"m")
    refused("too many", images.multiboot(), initrd=",".join([str(folder / "module")] * 300))
    (folder / "big").write_bytes(bytes(20 * MIB))
    refused("-initrd: 20971520 bytes", images.bzimage(initrd_max=30 * MIB), initrd=str(folder / "big"))


def test_arguments_need_not_be_utf_8(folder: Path) -> None:
    linux = Loaded(folder, images.bzimage(), append=b"name=\xff".decode(errors="surrogateescape"))
    assert linux.at(linux.u("I", linux.registers["rsi"] + 0x228), 7) == b"name=\xff\0"


def test_a_file_that_cannot_be_read(folder: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        kernel_loader(machine(), folder / "none", None, "")
    with pytest.raises(ConfigError, match="directory"):
        kernel_loader(machine(), folder, None, "")


def test_parsers_take_what_recognise_takes() -> None:
    assert elf.parse(images.elf(32)).bits == 32
    assert multiboot.parse(images.multiboot()).entry == MIB + 0x40
    assert not multiboot.recognise(images.multiboot(header_at=8192))
    assert multiboot.recognise(images.multiboot(header_at=8192 - 12))


# ---- firmware ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "No such file"),
        (b"", "0 bytes"),
        (b"\xea" * 1000, "1000 bytes"),
        (b"\xea" * (64 << 10) * 129, "at most 8 MiB"),
        (b"\xea" * 0xFFF0 + bytes(16), "reset vector"),
    ],
)
def test_firmware_that_is_none(folder: Path, image: bytes | None, message: str) -> None:
    if image is not None:
        (folder / "bios").write_bytes(image)
    with pytest.raises(ConfigError, match=message):
        read_firmware(folder / "bios")
