"""``atoll img create``: a new image."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

from blockd import opening
from blockd.files import unsafe_file
from blockd.hostfile import HostFile
from blockd.img import common
from blockd.qcow2.backing import Chain, plain_path, resolve
from blockd.qcow2.create import Options
from blockd.qcow2.operations import at_rest
from coordinator.contract.config import IMAGE_FORMATS
from coordinator.contract.errors import BlockError, UsageError

PREALLOCATION = ("off", "metadata", "falloc", "full")
RAW_PREALLOCATION = ("off", "falloc", "full")
_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_ON_OFF = {"on": True, "off": False, "true": True, "false": False, "yes": True, "no": False}


def parse_options(texts: list[str]) -> dict[str, str]:
    """-o name=value,...; a comma in a value is doubled."""
    result: dict[str, str] = {}
    for text in texts:
        for part in text.replace(",,", "\0").split(","):
            name, _, value = part.replace("\0", ",").partition("=")
            result[name] = value or "on"
    return result


def _version(name: str, value: str) -> int:
    if value not in _VERSIONS:
        raise UsageError(f"{name}={value} is unknown; choose 0.10 or 1.1")
    return _VERSIONS[value]


def _size(name: str, value: str) -> int:
    return common.size(value)


def _flag(name: str, value: str) -> bool:
    if value not in _ON_OFF:
        raise UsageError(f"{name}={value}: choose on or off")
    return _ON_OFF[value]


def _text(name: str, value: str) -> str:
    return value


#: qemu-img's name -> member of Options, what makes a value of its text, what it is
_OPTIONS: dict[str, tuple[str, Callable[[str, str], Any], str]] = {
    "backing_file": ("backing_file", _text, "file below the image"),
    "backing_fmt": ("backing_format", _text, "format of that file"),
    "cluster_size": ("cluster_size", _size, "512 to 2M (64k)"),
    "compat": ("version", _version, "0.10 or 1.1: version 2 or 3 of the format (1.1)"),
    "compression_type": ("compression", _text, "zlib or zstd (zlib)"),
    "data_file": ("data_file", _text, "file that the clusters lie in"),
    "data_file_raw": ("data_file_raw", _flag, "that file reads as the disk does (off)"),
    "extended_l2": ("extended_l2", _flag, "subclusters (off)"),
    "lazy_refcounts": ("lazy_refcounts", _flag, "mark the image; the writer here does not need it (off)"),
    "refcount_bits": ("refcount_bits", _size, "1 to 64 (16)"),
    "size": ("size", _size, "of the disk"),
}
_PREALLOCATION_ABOUT = "off, falloc, full, and for qcow2 metadata (off)"


def qcow2_options(disk_size: int, given: dict[str, str]) -> tuple[Options, str]:
    """Options of a new qcow2 image by qemu-img's names, and how it is to be preallocated."""
    options = Options(disk_size)
    for name, value in given.items():
        if name in _OPTIONS:
            member, parse, _ = _OPTIONS[name]
            setattr(options, member, parse(name, value))
        elif name != "preallocation" and not (name == "nocow" and not _flag(name, value)):
            raise BlockError(f"option {name}={value} is not supported", errno.ENOTSUP)
    preallocation = given.get("preallocation", "off")
    if preallocation not in PREALLOCATION:
        raise UsageError(f"preallocation={preallocation} is unknown; choose {', '.join(PREALLOCATION)}")
    return options, preallocation


def options_asked(texts: list[str], image_format: str) -> bool:
    """Print the options of a format when -o asks for them, as ``help`` or ``?``."""
    if not {"help", "?"} & set(parse_options(texts)):
        return False
    known = {name: about for name, (_, _, about) in _OPTIONS.items()} if image_format == "qcow2" else {}
    known |= {"preallocation": _PREALLOCATION_ABOUT, "size": _OPTIONS["size"][2]}
    print(f"Supported {image_format} options:")
    print("\n".join(f"  {name:<17} {about}" for name, about in sorted(known.items())))
    return True


def run(arguments: list[str]) -> int:
    parser = common.Parser("create", "Make a new image.")
    parser.format_option(about="format of the new image")
    parser.quiet_option()
    parser.add_argument("-b", dest="backing", metavar="FILE", help="backing file")
    parser.add_argument("-F", dest="backing_format", choices=IMAGE_FORMATS, help="its format")
    parser.add_argument("-u", dest="unchecked", action="store_true", help="do not open the backing file")
    parser.add_argument("-o", dest="options", action="append", default=[], metavar="NAME=VALUE,...",
                        help="of the format; -o help lists them")  # fmt: skip
    parser.chain_option()
    parser.add_argument("file", nargs="?")
    parser.add_argument("size", nargs="?")
    given = parser.parse_intermixed_args(arguments)
    if options_asked(given.options, given.format or "raw"):
        return 0
    if given.file is None:
        raise UsageError("create: the name of the image is needed")
    named = parse_options(given.options)
    if given.backing is not None:
        named["backing_file"] = given.backing
    if given.backing_format is not None:
        named["backing_fmt"] = given.backing_format
    if given.size is not None:
        named["size"] = given.size
    if given.format in (None, "raw"):
        return _raw(given.file, named, given.quiet)
    common.refuse_to_create(given.file)
    options, preallocation = qcow2_options(-1, named)
    if options.backing_file is not None and not given.unchecked:
        _check_backing(given.file, options, given.allow_backing)
    if options.size < 0:
        raise UsageError("create: a size is needed")
    with common.discarded_on_failure() as making:
        making.qcow2(given.file, options)
        if preallocation != "off":
            with common.told_of(given.file):
                preallocate(given.file, preallocation)
    if not given.quiet:
        print(_formatting(given.file, options, preallocation))
    return 0


def _raw(file: str, named: dict[str, str], quiet: bool) -> int:
    unknown = set(named) - {"size", "preallocation"}
    if unknown:
        raise BlockError(f"a raw image has no {', '.join(sorted(unknown))}", errno.EINVAL)
    if "size" not in named:
        raise UsageError("create: a size is needed")
    disk_size = -(-common.size(named["size"]) // 512) * 512
    preallocation = named.get("preallocation", "off")
    if preallocation not in RAW_PREALLOCATION:
        text = f"preallocation={preallocation} is not for raw images; choose {', '.join(RAW_PREALLOCATION)}"
        raise UsageError(text)
    with common.discarded_on_failure() as making:
        making.raw(file, disk_size)
        if preallocation != "off":
            reserve_raw(file, 0, disk_size)
    if not quiet:
        print(f"Formatting '{file}', fmt=raw size={disk_size}")
    return 0


def reserve_raw(file: str, start: int, length: int) -> None:
    """Give a range of a raw image its space on the disk."""
    if not length:
        return
    host = HostFile(file)
    try:
        with common.told_of(file):
            host.reserve(start, length)
    finally:
        host.close()


def _check_backing(file: str, options: Options, allowed: list[str]) -> None:
    """The backing file exists, has a format, and gives the size where none is said. The user names it, so
    that it may lie anywhere."""
    assert options.backing_file is not None
    if options.backing_format is None:
        raise UsageError("create: the format of the backing file is needed (-F)")
    if plain_path(file, options.backing_file) is None:
        text = f"backing file {options.backing_file!r} is no plain file name and no NBD export"
        raise BlockError(text, errno.EINVAL)
    path = resolve(file, options.backing_file, ("*",))
    image = common.open_image(path, options.backing_format, allowed=allowed)
    if options.size < 0:
        options.size = image.size
    image.close()


def preallocate(file: str, how: str, start: int = 0) -> None:
    """Give all clusters from ``start`` on their place: in the tables, on the disk too, or by writing."""
    image = opening.open_qcow2(file, open_file=unsafe_file, chain=Chain(("*",)))
    try:
        image.preallocate(start, image.size - start)
        if how != "metadata":
            with at_rest(image):
                image.host.reserve(0, image.host.size())
        if how == "full":
            zeroes = bytes(1 << 20)
            for at in range(start, image.size, len(zeroes)):
                image.write(at, zeroes[: image.size - at])
        image.host.unsafe = False
        image.host.sync()
    finally:
        image.close()


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _formatting(file: str, options: Options, preallocation: str) -> str:
    parts = [f"Formatting '{file}', fmt=qcow2", f"cluster_size={options.cluster_size}"]
    parts.append(f"extended_l2={_on(options.extended_l2)}")
    if preallocation != "off":
        parts.append(f"preallocation={preallocation}")
    if options.version == 2:
        parts.append("compat=0.10")
    if options.data_file is not None:
        parts.append(f"data_file={options.data_file}")
        parts += ["data_file_raw=on"] if options.data_file_raw else []
    parts += [f"compression_type={options.compression}", f"size={-(-options.size // 512) * 512}"]
    if options.backing_file is not None:
        parts.append(f"backing_file={options.backing_file}")
        parts.append(f"backing_fmt={options.backing_format}")
    parts.append(f"lazy_refcounts={_on(options.lazy_refcounts)}")
    parts.append(f"refcount_bits={options.refcount_bits}")
    return " ".join(parts)
