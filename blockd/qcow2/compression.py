"""Compressed clusters: deflate without a wrapper in a window of 4 KiB, or zstd frames.

Source: "Qcow2 Image File Format", "Compressed Clusters Descriptor", compression_type; RFC 1951, RFC 8878.
The window of 12 bits is the one QEMU's tools read and write.
"""

from __future__ import annotations

import errno
import zlib

import zstandard

_WINDOW_BITS = 12
_LEVEL = {"zlib": zlib.Z_DEFAULT_COMPRESSION, "zstd": 3}
#: largest window of a zstd frame that is read, in bytes
_ZSTD_WINDOW = 1 << 27


def compress(data: bytes | bytearray | memoryview, method: str) -> bytes:
    """One cluster compressed; may come out longer than it was."""
    if method == "zstd":
        return zstandard.ZstdCompressor(level=_LEVEL["zstd"]).compress(data)
    stream = zlib.compressobj(_LEVEL["zlib"], zlib.DEFLATED, -_WINDOW_BITS)
    return stream.compress(data) + stream.flush()


def decompress(data: bytes, method: str, size: int) -> bytes:
    """The first ``size`` bytes that come out, and never more; EIO when there are not that many."""
    try:
        if method == "zstd":
            decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
            with decompressor.stream_reader(data, read_across_frames=True) as reader:
                result = bytearray()
                while len(result) < size:
                    piece = reader.read(size - len(result))
                    if not piece:
                        break
                    result += piece
                plain = bytes(result)
        else:
            plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise OSError(errno.EIO, f"compressed cluster is damaged: {error}") from None
    if len(plain) != size:
        raise OSError(errno.EIO, "compressed cluster is cut short")
    return plain
