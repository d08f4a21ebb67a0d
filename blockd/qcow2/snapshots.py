"""Internal snapshots: the snapshot table.

Source: "Qcow2 Image File Format", section "Snapshots".
"""

from __future__ import annotations

import errno
import re
import struct
from dataclasses import dataclass

from blockd.hostfile import HostFile
from blockd.qcow2.header import MAX_L1_BYTES, Header
from coordinator.contract.errors import BlockError

#: L1 offset and entries, lengths of id and name, date (s, ns), guest's time, VM state, extra data
_ENTRY = struct.Struct(">QIHHIIQII")
#: VM state, disk size, instruction count
_EXTRA = struct.Struct(">QQQ")
MAX_TABLE_BYTES = 64 << 20
_MAX_EXTRA = 1024


@dataclass
class Snapshot:
    """One entry of the snapshot table."""

    l1_table_offset: int
    l1_size: int
    id: str
    name: str
    date_sec: int
    date_nsec: int
    vm_clock_nsec: int
    vm_state_size: int
    #: bytes of the disk then; the active disk's when the entry does not say
    disk_size: int
    icount: int = (1 << 64) - 1
    #: extra data behind what is known here
    unknown: bytes = b""
    #: bytes that the entry takes in the table on the disk
    stored: int = 0

    def encode(self) -> bytes:
        extra = _EXTRA.pack(self.vm_state_size, self.disk_size, self.icount) + self.unknown
        ident = self.id.encode("utf-8", "surrogateescape")
        name = self.name.encode("utf-8", "surrogateescape")
        data = _ENTRY.pack(
            self.l1_table_offset,
            self.l1_size,
            len(ident),
            len(name),
            self.date_sec,
            self.date_nsec,
            self.vm_clock_nsec,
            min(self.vm_state_size, 0xFFFFFFFF),
            len(extra),
        )
        data += extra + ident + name
        return data + bytes(-len(data) % 8)


def load(host: HostFile, header: Header) -> list[Snapshot]:
    """All snapshots; BlockError when the table cannot be one."""
    result = []
    at = header.snapshots_offset
    file_size = host.size()

    def refuse(what: str) -> BlockError:
        return BlockError(f"{host.file}: snapshot table: {what}", errno.EINVAL)

    for _ in range(header.nb_snapshots):
        if at + _ENTRY.size > file_size or at - header.snapshots_offset > MAX_TABLE_BYTES:
            raise refuse("is cut short")
        l1_offset, l1_size, id_length, name_length, sec, nsec, clock, vm_state, extra_length = _ENTRY.unpack(
            host.read(at, _ENTRY.size)
        )
        if extra_length > _MAX_EXTRA:
            raise refuse(f"extra data of {extra_length} bytes is too much")
        if (
            l1_size * 8 > MAX_L1_BYTES
            or l1_offset & (header.cluster_size - 1)
            or l1_offset + l1_size * 8 > file_size
        ):
            raise refuse(f"an L1 table of {l1_size} entries at {l1_offset:#x} is not possible")
        rest = host.read(at + _ENTRY.size, extra_length + id_length + name_length)
        extra, ident = rest[:extra_length], rest[extra_length : extra_length + id_length]
        fields = [vm_state, header.size, (1 << 64) - 1]
        for number in range(min(3, extra_length // 8)):
            fields[number] = int.from_bytes(extra[8 * number : 8 * number + 8], "big")
        if header.l1_entries_for(fields[1]) > l1_size:
            raise refuse(f"a disk of {fields[1]} bytes needs a larger L1 table")
        length = (_ENTRY.size + extra_length + id_length + name_length + 7) & ~7
        result.append(
            Snapshot(
                l1_offset,
                l1_size,
                ident.decode("utf-8", "surrogateescape"),
                rest[extra_length + id_length :].decode("utf-8", "surrogateescape"),
                sec,
                nsec,
                clock,
                fields[0],
                fields[1],
                fields[2],
                extra[24:],
                length,
            )
        )
        at += length
    return result


def find(file: str, known: list[Snapshot], wanted: str) -> Snapshot:
    """By id, else by name, or by what is said outright: "snapshot.id=ID,snapshot.name=NAME" or one of the
    two. BlockError when there is none."""
    outright = dict(re.findall(r"(?:^|,)snapshot\.(id|name)=([^,]*)", wanted))
    for wish in [outright] if outright else [{"id": wanted}, {"name": wanted}]:
        for snapshot in known:
            if all(getattr(snapshot, attribute) == value for attribute, value in wish.items()):
                return snapshot
    raise BlockError(f"{file}: there is no snapshot {wanted!r}", errno.ENOENT)


def view(host: HostFile, header: Header, wanted: str) -> None:
    """Change a header in memory so that it describes the disk of a snapshot."""
    snapshot = find(host.file, load(host, header), wanted)
    header.l1_table_offset, header.l1_size = snapshot.l1_table_offset, snapshot.l1_size
    header.size = snapshot.disk_size
