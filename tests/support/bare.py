"""Guests of our own that run on the bare machine: tests/guests/machine, built by the C compiler.

A guest is one C file next to the runtime in ``common``; the image is flat, with a multiboot header that
says its addresses, so that QEMU takes it as well. It prints "ok NAME" or "FAIL NAME: why" for each thing
it shows, and ends the machine through isa-debug-exit: status 33 when nothing failed.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from coordinator.contract.errors import ConfigError
from tests.support import products
from tests.support.launch import CONSOLE, Guest, Launcher

SOURCES = products.GUESTS / "machine"
PASSED = 33
#: tells a hang: a guest gives up waiting after 20 s by itself
SILENCE_SECONDS = 100.0
DEBUG_EXIT = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
FLAGS = (
    "-O2", "-std=gnu11", "-ffreestanding", "-fno-pic", "-no-pie", "-mno-red-zone", "-mgeneral-regs-only",
    "-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fcf-protection=none", "-static", "-nostdlib",
    "-Wall", "-Wextra", "-Werror",
)
LINK = ("-Wl,--build-id=none", "-Wl,--oformat=binary", "-Wl,-z,noexecstack")


def compile_image(name: str, inputs: Sequence[Path], arguments: Sequence[str]) -> Path:
    """What the compiler makes of ``arguments``, kept by the contents of ``inputs``."""
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        raise ConfigError(f"{compiler} not found: run `make setup`")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout

    def build(path: Path) -> None:
        result = subprocess.run(
            [compiler, "-o", str(path), *arguments], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise ConfigError(f"cannot compile the guest {name}:\n{result.stderr}")

    words = [word for word in arguments if not word.startswith(("/", "-I", "-Wl,-T"))]
    return products.product(f"{name}.bin", [version, *words, *products.source(*inputs)], build)


@cache
def image(name: str) -> Path:
    """The guest of SOURCES / NAME.c."""
    common = SOURCES / "common"
    units = [*sorted(common.glob("*.S")), *sorted(common.glob("*.c")), SOURCES / f"{name}.c"]
    inputs = [*units, common / "guest.h", common / "link.ld"]
    where = [f"-I{common}", f"-Wl,-T,{common / 'link.ld'}"]
    return compile_image(f"bare_{name}", inputs, [*FLAGS, *LINK, *where, *map(str, units)])


@cache
def firmware(name: str) -> Path:
    """The firmware image of SOURCES / NAME.S, 64 KiB."""
    unit = SOURCES / f"{name}.S"
    link = ["-nostdlib", "-static", "-Wl,-Ttext=0", "-Wl,-e,start", *LINK]
    return compile_image(f"bare_{name}", [unit], ["-m32", *link, str(unit)])


def start(
    launcher: Launcher,
    folder: Path,
    name: str,
    cpus: int = 1,
    options: Sequence[str] = (),
    ram: int = 64,
    reboot: bool = False,
) -> Guest:
    """The guest, begun; its console goes to a file in ``folder``."""
    machine = ["-smp", str(cpus), "-m", str(ram), *([] if reboot else ["-no-reboot"])]
    return start_firmware(launcher, folder, name, ["-kernel", str(image(name)), *machine, *options])


def start_firmware(launcher: Launcher, folder: Path, name: str, options: Sequence[str]) -> Guest:
    """A machine whose options say what runs on it."""
    return Guest(launcher, ["-machine", "pc", *CONSOLE, *DEBUG_EXIT, *options], folder / f"{name}.log")


def failures(guest: Guest) -> list[str]:
    """Follows the guest to its end: what failed, by its own words."""
    status = guest.wait(silence=SILENCE_SECONDS)
    failed = [line for line in guest.lines if line.startswith("FAIL")]
    if status != PASSED and not failed:
        failed.append(f"status {status}; last line: {guest.lines[-1:]}; {guest.errors()}")
    return failed
