"""What the subcommands share: options, sizes, opening images, progress."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from blockd import opening
from blockd.image import Image
from blockd.locks import lock_image
from blockd.opening import probe
from blockd.qcow2.backing import Chain, resolve
from blockd.qcow2.create import Options, create
from blockd.qcow2.image import Qcow2Image
from coordinator.contract.config import IMAGE_FORMATS
from coordinator.contract.errors import BlockError, UsageError
from coordinator.contract.nbd import is_network_name

#: bytes of a disk that are read at once
CHUNK = 2 << 20
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """Options of one subcommand; a wrong one is a UsageError."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(prog=f"atoll img {command}", description=about, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.split()[-1]}: {message}")

    def parse_intermixed_args(  # type: ignore[override]
        self, arguments: list[str]
    ) -> argparse.Namespace:
        """Behind ``--`` there are no options, also among intermixed ones: names are marked there by what no
        name has."""
        if "--" in arguments:
            at = arguments.index("--")
            arguments = [*arguments[:at], *("\0" + name for name in arguments[at + 1 :])]
        given = super().parse_intermixed_args(arguments)
        for name, value in vars(given).items():
            if isinstance(value, str):
                setattr(given, name, value.removeprefix("\0"))
        return given

    def format_option(
        self, flag: str = "-f", name: str = "format", about: str = "format of the image"
    ) -> None:
        self.add_argument(flag, dest=name, choices=IMAGE_FORMATS, help=about)

    def share_option(self, about: str = "also while another process writes it") -> None:
        self.add_argument("-U", "--force-share", action="store_true", help=about)

    def output_option(self) -> None:
        self.add_argument("--output", choices=("human", "json"), default="human")

    def quiet_option(self) -> None:
        self.add_argument("-q", dest="quiet", action="store_true", help="print errors only")

    def progress_option(self) -> None:
        self.add_argument("-p", dest="progress", action="store_true", help="show progress")

    def chain_option(self) -> None:
        self.add_argument(
            "--allow-backing",
            action="append",
            default=[],
            metavar="PLACE",
            help="a file or folder elsewhere that backing files may come from; * for any",
        )

    def ignored(self, *flags: str) -> None:
        """Options of qemu-img's that mean nothing here, with a value."""
        for flag in flags:
            self.add_argument(flag, help=argparse.SUPPRESS)


def size(text: str) -> int:
    """Bytes; a suffix of k, M, G, T, P or E counts in powers of 1024."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise UsageError(f"'{text}' is no size; a number with k, M, G, T, P or E is one")
    value = match[1]
    unit = _UNITS[match[2].lower()]
    result = int(float(value) * unit) if "." in value else int(value) * unit
    if result >= 1 << 63:
        raise UsageError(f"'{text}' is too large")
    return result


def human(value: float) -> str:
    """A size as qemu-img writes it: three digits and a unit."""
    number = float(value)
    for unit in ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"):
        if number < 1000 or unit == "Ei":
            break
        number /= 1024
    return f"{number:.3g} {unit}B"


def print_json(value: object) -> None:
    print(json.dumps(value, indent=4))


def open_image(
    file: str,
    image_format: str | None = None,
    read_only: bool = True,
    allowed: list[str] | None = None,
    **how: Any,
) -> Image:
    """An image; without a format, what it claims to be."""
    known = image_format or probe(file)
    if image_format is None and known == "raw" and not read_only:
        print(f"atoll img: warning: {file}: no format was given, and raw was guessed", file=sys.stderr)
    return opening.open_image(file, known, read_only, pad=True, chain=Chain(tuple(allowed or ())), **how)


def open_qcow2(file: str, image_format: str | None, read_only: bool, what: str, **how: Any) -> Qcow2Image:
    """An image that must be qcow2; ``what`` is asked of it."""
    image = open_image(file, image_format, read_only, **how)
    if not isinstance(image, Qcow2Image):
        image.close()
        raise BlockError(f"{file}: raw images have no {what}", errno.ENOTSUP)
    return image


def chunks(offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of a range in pieces that are worth a call, and no more memory than that."""
    for at in range(offset, offset + length, CHUNK):
        yield at, min(CHUNK, offset + length - at)


def refuse_to_create(file: str) -> None:
    """BlockError for an export, which only its server can make."""
    if is_network_name(file):
        raise BlockError(f"{file}: cannot be created over NBD", errno.ENOTSUP)


class Making:
    """Images that are being made: see ``discarded_on_failure``."""

    def __init__(self) -> None:
        #: file, and whether it was there before
        self._made: list[tuple[str, bool]] = []

    def raw(self, file: str, disk_size: int) -> None:
        existed = os.path.lexists(file)
        _make_raw(file, disk_size)
        self._made.append((file, existed))

    def qcow2(self, file: str, options: Options) -> None:
        """With its external data file, if it has one."""
        refuse_to_create(file)
        options.check()
        if options.data_file is not None:
            self.raw(resolve(file, options.data_file, ("*",), "data file"), options.size)
        existed = os.path.lexists(file)
        create(file, options)
        self._made.append((file, existed))

    def discard(self) -> None:
        for file, existed in self._made:
            with contextlib.suppress(OSError):
                if not stat.S_ISREG(os.stat(file).st_mode):
                    continue
                if existed:
                    os.truncate(file, 0)
                else:
                    os.unlink(file)


@contextlib.contextmanager
def discarded_on_failure() -> Iterator[Making]:
    """A half image is not left to be mistaken for a whole one: what was made within is removed if it is new,
    and emptied if it was overwritten."""
    making = Making()
    try:
        yield making
    except BaseException:
        making.discard()
        raise


def _make_raw(file: str, disk_size: int) -> None:
    """A raw image of zeroes; what was there is gone."""
    refuse_to_create(file)
    made = not os.path.lexists(file)
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock_image(fd, file, writable=True)  # what another process uses is not overwritten
            os.ftruncate(fd, 0)
            try:
                os.ftruncate(fd, disk_size)
            except OSError:
                if made:
                    os.unlink(file)
                raise
        finally:
            os.close(fd)
    except OSError as error:
        text = f"{file}: cannot be created: {os.strerror(error.errno or errno.EIO)}"
        raise BlockError(text, error.errno or errno.EIO) from None


@contextlib.contextmanager
def told_of(file: str) -> Iterator[None]:
    """An error of the operating system names the image that it is about."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        text = reason if reason.startswith(f"{file}:") else f"{file}: {reason}"
        raise BlockError(text, error.errno or errno.EIO) from None


class Progress:
    """A percentage on one line of standard output."""

    def __init__(self, wanted: bool, total: int) -> None:
        self._wanted = wanted
        self._total = total
        self._last = -1.0
        self.at(0)

    def at(self, done: int) -> None:
        if not self._wanted:
            return
        percent = 100.0 * done / self._total if self._total else 100.0
        if percent - self._last >= 1 or percent >= 100 > self._last:
            self._last = percent
            print(f"    ({percent:.2f}/100%)\r", end="", flush=True)

    def end(self) -> None:
        if self._wanted:
            self.at(self._total)
            print()
