"""What is in RAM and in the registers when the guest's first instruction runs.

With firmware: the image in ROM, the CPU at its reset vector. Without (-kernel): a Linux bzImage, a
multiboot kernel or a plain ELF file, with what firmware would have left behind.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.boot import bzimage, elf, multiboot
from coordinator.contract import messages
from coordinator.contract.config import Machine
from coordinator.contract.errors import ConfigError
from coordinator.contract.segment import Segment
from coordinator.machine import Loader

#: firmware is mapped below 4 GiB; its last 128 KiB also below 1 MiB
FIRMWARE_UNIT, LARGEST_FIRMWARE = 64 << 10, 8 << 20


def read_firmware(path: Path) -> bytes:
    """A firmware image; ConfigError when it cannot be one."""
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"firmware {path}: {error.strerror}") from None
    if not image or len(image) % FIRMWARE_UNIT or len(image) > LARGEST_FIRMWARE:
        raise ConfigError(
            f"firmware {path}: {len(image)} bytes; a firmware image is a multiple of 64 KiB, at most 8 MiB"
        )
    if not any(image[-16:]):
        raise ConfigError(f"firmware {path}: nothing at the reset vector; this is no firmware image")
    return image


def firmware_loader(image: bytes) -> Loader:
    """The image goes to the start of the ROM; vCPU 0 starts at the reset vector by itself."""

    def load(segment: Segment) -> messages.LoadCpu | None:
        segment.rom[: len(image)] = memoryview(image)
        return None

    return load


def kernel_loader(machine: Machine, kernel: Path, initrd: str | None, append: str) -> Loader:
    """Recognises the kernel's format; ConfigError when it has none."""
    try:
        image = kernel.read_bytes()
    except OSError as error:
        raise ConfigError(f"-kernel {kernel}: {error.strerror}") from None
    if multiboot.recognise(image):
        return multiboot.loader(machine, image, kernel.name, initrd, append)
    if bzimage.recognise(image):
        return bzimage.loader(machine, image, _read_initrd(initrd), append)
    if elf.recognise(image):
        if initrd is not None or append:
            raise ConfigError("-initrd and -append: a plain ELF kernel takes neither")
        return elf.loader(machine, image)
    raise ConfigError(
        f"-kernel {kernel}: neither a Linux bzImage, nor a multiboot kernel, nor an x86 ELF file"
    )


def _read_initrd(initrd: str | None) -> bytes:
    if initrd is None:
        return b""
    try:
        return Path(initrd).read_bytes()
    except OSError as error:
        raise ConfigError(f"-initrd {initrd}: {error.strerror}") from None
