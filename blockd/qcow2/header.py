"""The header of a qcow2 image and its extensions.

Source: "Qcow2 Image File Format", sections "Header", "Header extensions", "Feature name table".
Limits that the format does not set are QEMU's documented ones: clusters of at most 2 MiB, an L1
table of at most 32 MiB, a refcount table of at most 8 MiB, 65,536 snapshots.
"""

from __future__ import annotations

import enum
import errno
import struct
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from blockd.hostfile import HostFile
from coordinator.contract.errors import BlockError

MAGIC = 0x514649FB
#: magic, version, backing offset and length, cluster bits, size, encryption, L1 size and offset,
#: refcount table offset and clusters, snapshots and their offset
_V2 = struct.Struct(">IIQIIQIIQQIIQ")
#: incompatible, compatible and autoclear features, refcount order, header length
_V3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_FEATURE = struct.Struct(">BB46s")
V2_LENGTH, V3_LENGTH = 72, 104
#: what a disk writes whole or not at all
SECTOR = 512
COMPRESSION_TYPE_AT = 104
#: the length written for a new image: with compression_type and its padding
NEW_LENGTH = 112
#: where the fields of the tables begin: disk size to snapshot offset lie in one sector, so that one
#: write changes all of them or none
TABLES_AT, TABLES_END = 24, 72
SIZE_AT, SNAPSHOTS_AT = 24, 60
FEATURES_AT = 72

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
#: with extended L2 entries: 32 subclusters, each at least a sector
MIN_EXTENDED_BITS = 14
MAX_REFCOUNT_ORDER = 6
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_BACKING_NAME = 1023


class Incompatible(enum.IntFlag):
    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


class Compatible(enum.IntFlag):
    LAZY_REFCOUNTS = 1


class Autoclear(enum.IntFlag):
    BITMAPS = 1
    RAW_DATA_FILE = 2


class ExtensionType(enum.IntEnum):
    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


#: compression_type -> name
COMPRESSION = {0: "zlib", 1: "zstd"}
_ENCRYPTION = {1: "AES", 2: "LUKS"}

#: what this implementation calls the features: (type, bit) -> name, as written into new images
FEATURE_NAMES = {
    (0, 0): "dirty bit",
    (0, 1): "corrupt bit",
    (0, 2): "external data file",
    (0, 3): "compression type",
    (0, 4): "extended L2 entries",
    (1, 0): "lazy refcounts",
    (2, 0): "bitmaps",
    (2, 1): "raw external data",
}
_SUPPORTED = (
    Incompatible.DIRTY
    | Incompatible.CORRUPT
    | Incompatible.DATA_FILE
    | Incompatible.COMPRESSION
    | Incompatible.EXTENDED_L2
)


class Refusal(Protocol):
    """Makes the error for what is wrong with an image."""

    def __call__(self, what: str, number: int = errno.EINVAL) -> BlockError: ...


@dataclass
class Header:
    """The header's fields, under the names of the specification."""

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = 0
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = 0
    header_length: int = NEW_LENGTH
    #: additional fields that are not known here, kept as they are
    additional: bytes = b""
    backing_file: str | None = None
    #: extensions in their order, those unknown included
    extensions: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    def extension(self, kind: int) -> bytes | None:
        return next((data for other, data in self.extensions if other == kind), None)

    def set_extension(self, kind: int, data: bytes | None) -> None:
        """Replace, add (first) or with None remove an extension."""
        self.extensions = [(other, old) for other, old in self.extensions if other != kind]
        if data is not None:
            self.extensions.insert(0, (kind, data))

    @property
    def backing_format(self) -> str | None:
        return _text(self.extension(ExtensionType.BACKING_FORMAT))

    @property
    def data_file(self) -> str | None:
        return _text(self.extension(ExtensionType.DATA_FILE))

    @property
    def compression(self) -> str:
        return COMPRESSION[self.compression_type]

    @property
    def extended(self) -> bool:
        """Are L2 entries 16 bytes long, with a bitmap of subclusters?"""
        return bool(self.incompatible & Incompatible.EXTENDED_L2)

    @property
    def l2_bits(self) -> int:
        """An L2 table has 1 << l2_bits entries."""
        return self.cluster_bits - (4 if self.extended else 3)

    def l1_entries_for(self, size: int) -> int:
        """Entries of the L1 table that a disk of that size needs."""
        covered_bits = self.cluster_bits + self.l2_bits
        return (size + (1 << covered_bits) - 1) >> covered_bits

    def tables(self) -> bytes:
        """Bytes TABLES_AT to TABLES_END: written at once, they switch the image to other tables."""
        return self._fixed(0, 0)[TABLES_AT:TABLES_END]

    def features(self) -> bytes:
        """Bytes from FEATURES_AT: incompatible, compatible and autoclear features."""
        return struct.pack(">QQQ", self.incompatible, self.compatible, self.autoclear)

    def encode(self, name_at: int = 0) -> bytes:
        """The whole header with its extensions and the backing file's name, at most one cluster. The name
        follows the extensions, or lies at ``name_at``. BlockError when it does not fit."""
        body = bytearray()
        for kind, data in self.extensions:
            body += _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
        body += _EXTENSION.pack(ExtensionType.END, 0)
        start = V2_LENGTH if self.version == 2 else self.header_length
        name = (self.backing_file or "").encode("utf-8", "surrogateescape")
        if len(name) > MAX_BACKING_NAME:
            raise BlockError(f"backing file name is longer than {MAX_BACKING_NAME} bytes", errno.ENAMETOOLONG)
        name_at = max(name_at, start + len(body))
        if name_at + len(name) > self.cluster_size:
            raise BlockError(f"the header does not fit a cluster of {self.cluster_size} bytes", errno.ENOSPC)
        result = bytearray(self._fixed(name_at if name else 0, len(name)))
        if self.version >= 3:
            result += _V3.pack(
                self.incompatible, self.compatible, self.autoclear, self.refcount_order, self.header_length
            )
            if self.header_length > COMPRESSION_TYPE_AT:
                result += bytes([self.compression_type]) + self.additional
                result += bytes(self.header_length - len(result))
        result += body
        return bytes(result.ljust(name_at, b"\0") + name if name else result)

    def _fixed(self, backing_offset: int, backing_size: int) -> bytes:
        return _V2.pack(
            MAGIC,
            self.version,
            backing_offset,
            backing_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )


def write_tables(host: HostFile, header: Header, **changes: Any) -> None:
    """Change fields of the tables in the file and in ``header``, by one write, durably. After an OSError
    ``header`` says what the file says."""
    try:
        host.write(TABLES_AT, replace(header, **changes).tables())
        host.sync()
    except OSError:
        found = Header(0, *_V2.unpack(host.read(0, _V2.size))[4:])
        changes = {name: getattr(found, name) for name in changes}
        raise
    finally:
        for name, value in changes.items():
            setattr(header, name, value)


def rewrite(host: HostFile, header: Header) -> None:
    """Write a header whose extensions or backing file have changed, durably, so that any crash leaves the
    old one or the new one. BlockError when it does not fit.

    Only the first sector is written in one piece, so what counts is brought there in steps: the backing
    file's name goes to where neither the old name nor the old extensions are; the first sector gets a header
    without the names of features, which ends in it; the sectors behind it get what belongs there; and the
    first sector gets the names again. Where other extensions take more than a sector, or both names do not
    fit, there is no such way, and all is written at once.
    """
    whole = header.encode()
    rest = [(kind, data) for kind, data in header.extensions if kind != ExtensionType.FEATURE_NAMES]
    short = replace(header, extensions=rest)
    name_at = _place_for_name(host, header)
    if len(whole) > SECTOR >= len(replace(short, backing_file=None).encode()) and name_at is not None:
        whole = header.encode(name_at)
        host.write(name_at, whole[name_at:])
        host.sync()
        host.write(0, short.encode(name_at)[:SECTOR].ljust(SECTOR, b"\0"))
        host.sync()
        host.write(SECTOR, whole[SECTOR:])
        host.sync()
        whole = whole[:SECTOR]
    host.write(0, whole)
    host.sync()


def _place_for_name(host: HostFile, header: Header) -> int | None:
    """Where a new name of the backing file lies upon nothing that the old header needs, nor in the first
    sector; None where there is no room."""
    bare = replace(header, backing_file=None)
    old = host.read(0, header.cluster_size)
    old_at, old_length = struct.unpack_from(">QI", old, 8)
    at = max(SECTOR, len(bare.encode()), _extensions_end(header, old, old_at))
    length = len((header.backing_file or "").encode("utf-8", "surrogateescape"))
    if old_at and at < old_at + old_length and old_at < at + length:
        at = max(at, old_at + old_length)
    return at if at + length <= header.cluster_size else None


def _extensions_end(header: Header, first: bytes, old_name_at: int) -> int:
    at = V2_LENGTH if header.version == 2 else header.header_length
    end = old_name_at or len(first)
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(first, at)
        at += _EXTENSION.size
        if kind == ExtensionType.END:
            break
        at += (length + 7) & ~7
    return min(at, end)


def feature_table() -> bytes:
    """The feature name table extension of a new image."""
    return b"".join(_FEATURE.pack(kind, bit, name.encode()) for (kind, bit), name in FEATURE_NAMES.items())


def is_qcow2(start: bytes) -> bool:
    """Does a file that begins like this claim to be qcow2 (or its predecessor)?"""
    return start[:4] == MAGIC.to_bytes(4, "big")


def parse(file: str, first: bytes, file_size: int, writable: bool, repair: bool = False) -> Header:
    """The header in ``first``, the file's first bytes: a whole cluster, or all that there is.

    BlockError in one line names what is wrong, or what is asked for and not supported here. An image
    marked corrupt is not opened for writing, except to be repaired.
    """

    def refuse(what: str, number: int = errno.EINVAL) -> BlockError:
        return BlockError(f"{file}: {what}", number)

    if len(first) < V2_LENGTH or not is_qcow2(first):
        raise refuse("is no qcow2 image")
    fields = _V2.unpack_from(first)
    version, backing_offset, backing_size = fields[1:4]
    header = Header(version, *fields[4:])
    header.header_length = V2_LENGTH
    if version not in (2, 3):
        raise refuse(f"qcow2 version {version} is not supported (2 and 3 are)", errno.ENOTSUP)
    if not MIN_CLUSTER_BITS <= header.cluster_bits <= MAX_CLUSTER_BITS:
        raise refuse(f"cluster_bits is {header.cluster_bits}; 9 to 21 (512 B to 2 MiB) is supported")
    if version >= 3:
        _parse_v3(header, first, refuse)
    _parse_extensions(header, first, backing_offset, refuse)
    _check_features(header, first, writable and not repair, refuse)
    if header.crypt_method:
        name = _ENCRYPTION.get(header.crypt_method, f"method {header.crypt_method}")
        raise refuse(f"is encrypted ({name}), which is not supported", errno.ENOTSUP)
    if backing_offset:
        header.backing_file = _backing_name(header, first, backing_offset, backing_size, refuse)
    _check_tables(header, file_size, refuse)
    return header


def _parse_v3(header: Header, first: bytes, refuse: Refusal) -> None:
    if len(first) < V3_LENGTH:
        raise refuse("its header is cut short")
    header.incompatible, header.compatible, header.autoclear, order, length = _V3.unpack_from(
        first, V2_LENGTH
    )
    header.refcount_order, header.header_length = order, length
    if length < V3_LENGTH or length % 8 or length > min(header.cluster_size, len(first)):
        raise refuse(f"header_length {length} is out of range")
    if order > MAX_REFCOUNT_ORDER:
        raise refuse(f"refcount_order is {order}; 0 to 6 is allowed")
    if length > COMPRESSION_TYPE_AT:
        header.compression_type = first[COMPRESSION_TYPE_AT]
        header.additional = first[COMPRESSION_TYPE_AT + 1 : length]


def _parse_extensions(header: Header, first: bytes, backing_offset: int, refuse: Refusal) -> None:
    """ "Header extensions": up to the backing file's name, or the end of the first cluster."""
    end = min(header.cluster_size, len(first))
    if backing_offset and backing_offset < end:
        end = backing_offset
    at = header.header_length
    while at + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(first, at)
        at += _EXTENSION.size
        if kind == ExtensionType.END:
            return
        if length > end - at:
            raise refuse(f"header extension {kind:#010x} of {length} bytes is too long")
        header.extensions.append((kind, first[at : at + length]))
        at += (length + 7) & ~7


def _check_features(header: Header, first: bytes, writing: bool, refuse: Refusal) -> None:
    unknown = header.incompatible & ~int(_SUPPORTED)
    if unknown:
        names = _names_of(header, unknown)
        raise refuse(f"uses features that are not supported: {names}", errno.ENOTSUP)
    if header.incompatible & Incompatible.CORRUPT and writing:
        raise refuse("is marked corrupt; repair it with 'atoll img check -r all'", errno.EACCES)
    if bool(header.incompatible & Incompatible.COMPRESSION) != bool(header.compression_type):
        raise refuse("compression type and its feature bit contradict each other")
    if header.compression_type not in COMPRESSION:
        raise refuse(f"compression type {header.compression_type} is not supported", errno.ENOTSUP)
    if header.extended and header.cluster_bits < MIN_EXTENDED_BITS:
        text = f"has extended L2 entries with clusters of {header.cluster_size} bytes; 16 KiB is the least"
        raise refuse(text)
    raw = bool(header.autoclear & Autoclear.RAW_DATA_FILE)
    if raw and not header.incompatible & Incompatible.DATA_FILE:
        raise refuse("is marked as raw external data, but has no external data file")
    if header.incompatible & Incompatible.DATA_FILE and not header.data_file:
        raise refuse("has an external data file, and does not name it")


def _names_of(header: Header, bits: int) -> str:
    """Incompatible features by the image's own name for them, else by ours, else by number."""
    table = header.extension(ExtensionType.FEATURE_NAMES) or b""
    names = {bit: name for (kind, bit), name in FEATURE_NAMES.items() if kind == 0}
    for at in range(0, len(table) - _FEATURE.size + 1, _FEATURE.size):
        kind, bit, name = _FEATURE.unpack_from(table, at)
        text = name.rstrip(b"\0").decode("utf-8", "replace")
        if kind == 0 and text.isprintable() and text:
            names[bit] = text
    wanted = [bit for bit in range(64) if bits >> bit & 1]
    return ", ".join(names.get(bit, f"unknown incompatible feature {bit}") for bit in wanted)


def _backing_name(header: Header, first: bytes, offset: int, size: int, refuse: Refusal) -> str | None:
    if size > MAX_BACKING_NAME:
        raise refuse(f"backing file name of {size} bytes is longer than {MAX_BACKING_NAME}")
    if offset > header.cluster_size - size or offset + size > len(first):
        raise refuse("backing file name lies outside the header cluster")
    name = first[offset : offset + size]
    if b"\0" in name:
        raise refuse("backing file name has a zero byte")
    return name.decode("utf-8", "surrogateescape") or None


def _check_tables(header: Header, file_size: int, refuse: Refusal) -> None:
    """Where the tables lie and how large they say they are; nothing is read or allocated before this."""
    mask = header.cluster_size - 1

    def table(name: str, offset: int, length: int) -> None:
        if offset & mask:
            raise refuse(f"{name} offset {offset:#x} is not aligned to a cluster")
        if offset + length > file_size or offset >> 56:
            raise refuse(f"{name} lies behind the end of the file")
        if length and not offset:
            raise refuse(f"{name} lies upon the header")

    if header.size >> 63:
        raise refuse(f"disk size {header.size} is out of range")
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise refuse(f"L1 table of {header.l1_size} entries is larger than 32 MiB", errno.EFBIG)
    if header.l1_size < header.l1_entries_for(header.size):
        raise refuse(f"L1 table is too small for a disk of {header.size} bytes")
    table("L1 table", header.l1_table_offset, header.l1_size * 8)
    refcount_bytes = header.refcount_table_clusters << header.cluster_bits
    if not 0 < refcount_bytes <= max(MAX_REFCOUNT_TABLE, header.cluster_size):
        text = f"refcount table of {header.refcount_table_clusters} clusters is out of range"
        raise refuse(text)
    table("refcount table", header.refcount_table_offset, min(refcount_bytes, 8))
    if header.nb_snapshots > MAX_SNAPSHOTS:
        raise refuse(f"{header.nb_snapshots} snapshots are more than {MAX_SNAPSHOTS}", errno.EFBIG)
    if header.nb_snapshots:
        table("snapshot table", header.snapshots_offset, 40 * header.nb_snapshots)


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "surrogateescape")
