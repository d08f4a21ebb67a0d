"""Making a new qcow2 image.

Layout: header, refcount table, one refcount block, L1 table; "Qcow2 Image File Format", section "General".
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

import numpy as np

from blockd.hostfile import HostFile
from blockd.locks import lock_image
from blockd.qcow2.header import (
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_BITS,
    NEW_LENGTH,
    Autoclear,
    Compatible,
    ExtensionType,
    Header,
    Incompatible,
    feature_table,
)
from blockd.qcow2.refcounts import encode
from coordinator.contract.errors import BlockError


@dataclass
class Options:
    """What a new image is like; the names are qemu-img's."""

    size: int
    version: int = 3
    cluster_size: int = 65536
    refcount_bits: int = 16
    lazy_refcounts: bool = False
    extended_l2: bool = False
    compression: str = "zlib"
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    data_file_raw: bool = False

    def check(self) -> None:
        """BlockError in one line for what cannot be."""
        bits = self.cluster_size.bit_length() - 1
        if self.cluster_size != 1 << bits or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            raise BlockError("cluster_size must be a power of two between 512 and 2M", errno.EINVAL)
        if self.refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
            raise BlockError("refcount_bits must be a power of two and at most 64", errno.EINVAL)
        newer = self.refcount_bits != 16 or self.lazy_refcounts or self.extended_l2
        if self.version == 2 and (newer or self.compression != "zlib"):
            text = "compat=0.10 has neither refcount_bits, lazy_refcounts, extended_l2 nor compression_type"
            raise BlockError(text, errno.EINVAL)
        if self.extended_l2 and bits < MIN_EXTENDED_BITS:
            raise BlockError("extended_l2 needs a cluster_size of at least 16k", errno.EINVAL)
        if self.compression not in ("zlib", "zstd"):
            raise BlockError(
                f"compression_type {self.compression!r} is unknown (zlib and zstd are known)", errno.EINVAL
            )
        if self.data_file is not None and self.version == 2:
            raise BlockError("compat=0.10 has no external data file", errno.EINVAL)
        if self.data_file_raw and (self.data_file is None or self.backing_file is not None):
            raise BlockError("data_file_raw needs data_file, and no backing file", errno.EINVAL)
        if not 0 <= self.size < 1 << 63:
            raise BlockError(f"a disk of {self.size} bytes is not possible", errno.EINVAL)


def create(file: str, options: Options) -> None:
    """Make (or overwrite) an image; BlockError in one line when that cannot be."""
    options.check()
    header = _header(options)
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise BlockError(
            f"{file}: a disk of {options.size} bytes is too large for clusters of {options.cluster_size}",
            errno.EFBIG,
        )
    made = not os.path.lexists(file)
    try:
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.close(fd)
        host = HostFile(file)
        try:
            lock_image(host.fd, file, writable=True)  # what another process uses is not overwritten
            try:
                _write(host, header)
            except OSError:
                if made:  # a half image is not left to be mistaken for a whole one
                    os.unlink(file)
                raise
        finally:
            host.close()
    except OSError as error:
        raise BlockError(
            f"{file}: cannot be created: {os.strerror(error.errno or 5)}", error.errno or 5
        ) from None


def _header(options: Options) -> Header:
    header = Header(
        options.version, options.cluster_size.bit_length() - 1, size=-(-options.size // 512) * 512
    )
    header.refcount_order = options.refcount_bits.bit_length() - 1
    header.incompatible = int(Incompatible.EXTENDED_L2) if options.extended_l2 else 0
    header.l1_size = max(1, header.l1_entries_for(header.size))
    if options.version >= 3:
        header.header_length = NEW_LENGTH
        header.compatible = int(Compatible.LAZY_REFCOUNTS) if options.lazy_refcounts else 0
        if options.compression == "zstd":
            header.compression_type = 1
            header.incompatible |= int(Incompatible.COMPRESSION)
        if header.cluster_size >= 1024:
            header.set_extension(ExtensionType.FEATURE_NAMES, feature_table())
    if options.data_file is not None:
        header.incompatible |= int(Incompatible.DATA_FILE)
        header.autoclear = int(Autoclear.RAW_DATA_FILE) if options.data_file_raw else 0
        header.set_extension(ExtensionType.DATA_FILE, options.data_file.encode("utf-8", "surrogateescape"))
    if options.backing_file is not None:
        header.backing_file = options.backing_file
        if options.backing_format is not None:
            header.set_extension(ExtensionType.BACKING_FORMAT, options.backing_format.encode())
    return header


def _write(host: HostFile, header: Header) -> None:
    size = header.cluster_size
    l1_clusters = -(-header.l1_size * 8 // size)
    per_block = size * 8 >> header.refcount_order
    table_clusters = blocks = 1
    while True:
        total = 1 + table_clusters + blocks + l1_clusters
        needed_blocks = -(-total // per_block)
        needed_table = -(-needed_blocks * 8 // size)
        if (needed_blocks, needed_table) == (blocks, table_clusters):
            break
        blocks, table_clusters = needed_blocks, needed_table
    header.refcount_table_offset = size
    header.refcount_table_clusters = table_clusters
    header.l1_table_offset = (1 + table_clusters + blocks) * size
    first_block = 1 + table_clusters
    host.resize(0)
    host.resize(header.l1_table_offset + l1_clusters * size)
    counts = np.zeros(blocks * per_block, np.uint64)
    counts[:total] = 1
    host.write(first_block * size, encode(counts, header.refcount_order))
    offsets = (np.arange(blocks, dtype=np.uint64) + np.uint64(first_block)) * np.uint64(size)
    host.write(size, offsets.astype(">u8").tobytes())
    host.write(0, header.encode())
    host.sync()
