"""Persistent dirty bitmaps: their directory and tables.

Source: "Qcow2 Image File Format", sections "Bitmaps extension" and "Bitmaps".
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from blockd.hostfile import HostFile
from blockd.qcow2.header import ExtensionType, Header
from coordinator.contract.errors import BlockError

_EXTENSION = struct.Struct(">IIQQ")
#: table offset and entries, flags, type, granularity, length of name, extra data
_ENTRY = struct.Struct(">QIIBBHI")
MAX_BITMAPS, MAX_DIRECTORY, MAX_TABLE_ENTRIES = 65535, 64 << 20, 4 << 20
IN_USE, AUTO = 1, 2
DIRTY_TRACKING = 1
#: of a table entry without an offset: its bits are all 1
ALL_ONES = 1
#: bits of one bitmap that are kept in memory, a byte each
MOST_BITS = 1 << 26
MIN_GRANULARITY_BITS, MAX_GRANULARITY_BITS = 9, 31
MAX_NAME = 1023
Bits = npt.NDArray[np.bool_]
_TABLE_OFFSET = np.uint64(0x00FFFFFFFFFFFE00)


@dataclass
class Bitmap:
    """One entry of the bitmap directory."""

    name: str
    table_offset: int
    table_size: int
    flags: int
    granularity_bits: int
    #: where the entry lies in the file; 0 for one that is not there yet
    entry_offset: int = 0
    kind: int = DIRTY_TRACKING
    extra: bytes = b""

    @property
    def known(self) -> bool:
        """Is it a dirty tracking bitmap without anything that is not known here?"""
        return self.kind == DIRTY_TRACKING and not self.extra and not self.flags & ~(IN_USE | AUTO)

    def bits_for(self, size: int) -> int:
        """How many bits a disk of that size needs."""
        return -(-size >> self.granularity_bits)

    def encode(self) -> bytes:
        """The entry of the directory."""
        name = self.name.encode("utf-8", "surrogateescape")
        data = _ENTRY.pack(
            self.table_offset,
            self.table_size,
            self.flags,
            self.kind,
            self.granularity_bits,
            len(name),
            len(self.extra),
        )
        data += self.extra + name
        return data + bytes(-len(data) % 8)

    def flag_names(self) -> list[str]:
        """As qemu-img names them."""
        return [name for bit, name in ((IN_USE, "in-use"), (AUTO, "auto")) if self.flags & bit]


def load(host: HostFile, header: Header) -> list[Bitmap]:
    """The bitmaps of an image; BlockError when the directory cannot be one."""
    extension = header.extension(ExtensionType.BITMAPS)
    if extension is None:
        return []

    def refuse(what: str) -> BlockError:
        return BlockError(f"{host.file}: bitmap directory: {what}", errno.EINVAL)

    if len(extension) < _EXTENSION.size:
        raise refuse("its extension is cut short")
    count, _, size, offset = _EXTENSION.unpack_from(extension)
    if (
        count > MAX_BITMAPS
        or size > MAX_DIRECTORY
        or offset % header.cluster_size
        or offset + size > host.size()
    ):
        raise refuse(f"{count} bitmaps in {size} bytes at {offset:#x} are not possible")
    data, file_size = host.read(offset, size), host.size()
    result, at = [], 0
    for _ in range(count):
        if at + _ENTRY.size > size:
            raise refuse("is cut short")
        table, entries, flags, kind, granularity, name_length, extra_length = _ENTRY.unpack_from(data, at)
        extra_at = at + _ENTRY.size
        name_at = extra_at + extra_length
        if name_at + name_length > size or entries > MAX_TABLE_ENTRIES or table % header.cluster_size:
            raise refuse("has an impossible entry")
        if table + 8 * entries > file_size:
            raise refuse(f"a table of {entries} entries at {table:#x} lies behind the end of the file")
        name = data[name_at : name_at + name_length].decode("utf-8", "surrogateescape")
        extra = data[extra_at:name_at]
        result.append(Bitmap(name, table, entries, flags, granularity, offset + at, kind, extra))
        at = (name_at + name_length + 7) & ~7
    return result


def extension_data(count: int, size: int, offset: int) -> bytes:
    """The bitmaps extension for a directory of so many entries and bytes."""
    return _EXTENSION.pack(count, 0, size, offset)


def read_bits(host: HostFile, header: Header, bitmap: Bitmap) -> Bits:
    """The bits of a bitmap, up to the end of its table's last cluster. OSError, EFBIG for a table that is
    longer than any for MOST_BITS."""
    size = header.cluster_size
    per_cluster = size * 8
    if bitmap.table_size > MOST_BITS // per_cluster + 1:
        raise OSError(errno.EFBIG, f"{host.file}: bitmap {bitmap.name!r} is too large")
    table = np.frombuffer(host.read(bitmap.table_offset, 8 * bitmap.table_size), ">u8").astype(np.uint64)
    if (table & _TABLE_OFFSET & np.uint64(size - 1)).any():
        raise OSError(errno.EIO, f"{host.file}: bitmap {bitmap.name!r} is not aligned to clusters")
    bits: Bits = np.zeros(len(table) * per_cluster, np.bool_)
    for index, entry in enumerate(table.tolist()):
        part = bits[index * per_cluster : (index + 1) * per_cluster]
        if entry & int(_TABLE_OFFSET):
            data = np.frombuffer(host.read(entry & int(_TABLE_OFFSET), size), np.uint8)
            part[:] = np.unpackbits(data, bitorder="little")
        elif entry & ALL_ONES:
            part[:] = True
    return bits


def bitmap_clusters(host: HostFile, header: Header) -> npt.NDArray[np.int64]:
    """The host clusters that bitmaps, their tables and their directory lie in."""
    extension = header.extension(ExtensionType.BITMAPS)
    if extension is None:
        return np.zeros(0, np.int64)
    bits = header.cluster_bits
    known = load(host, header)
    _, _, size, offset = _EXTENSION.unpack_from(extension)
    found = [np.arange(offset >> bits, (offset + size + header.cluster_size - 1) >> bits)]
    for bitmap in known:
        length = bitmap.table_size * 8
        first = bitmap.table_offset >> bits
        found.append(np.arange(first, first + ((length + header.cluster_size - 1) >> bits)))
        table = np.frombuffer(host.read(bitmap.table_offset, length), ">u8").astype(np.uint64)
        offsets = table & _TABLE_OFFSET
        found.append((offsets[offsets != 0] >> np.uint64(bits)).astype(np.int64))
    return np.concatenate(found).astype(np.int64)
