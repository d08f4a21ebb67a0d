"""Compressed clusters: deflate without a wrapper in a window of 4 KiB, or zstd frames.

Source: "Qcow2 Image File Format", "Compressed Clusters Descriptor", compression_type; RFC 1951, RFC 8878.
The window of 12 bits is the one QEMU's tools read and write.
"""

from __future__ import annotations

import errno
import threading
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import zstandard

_WINDOW_BITS = 12
#: the most deflate knows: 256 KiB for a while, and about a tenth faster than the default
_MEMORY_LEVEL = 9
_ZSTD_LEVEL = 3
#: largest window of a zstd frame that is read, in bytes
_ZSTD_WINDOW = 1 << 27


class _Contexts(threading.local):
    """What zstd needs, made once for each thread, and only where it is used."""

    compressor: zstandard.ZstdCompressor | None = None
    decompressor: zstandard.ZstdDecompressor | None = None


_contexts = _Contexts()


def compress(data: bytes | bytearray | memoryview, method: str) -> bytes:
    """One cluster compressed; may come out longer than it was. The interpreter's lock is released."""
    if method == "zstd":
        if _contexts.compressor is None:
            import zstandard

            _contexts.compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        return _contexts.compressor.compress(data)
    stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -_WINDOW_BITS, _MEMORY_LEVEL)
    return stream.compress(data) + stream.flush()


def decompress(data: bytes, method: str, size: int) -> bytes:
    """The first ``size`` bytes that come out, and never more; EIO when there are not that many."""
    if method == "zstd":
        plain = _from_zstd(data, size)
    else:
        try:
            plain = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size)
        except zlib.error as error:
            raise _damaged(error) from None
    if len(plain) != size:
        raise OSError(errno.EIO, "compressed cluster is cut short")
    return plain


def _from_zstd(data: bytes, size: int) -> bytes:
    import zstandard

    if _contexts.decompressor is None:
        _contexts.decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    result = b""
    try:
        with _contexts.decompressor.stream_reader(data, read_across_frames=True) as reader:
            while len(result) < size and (piece := reader.read(size - len(result))):
                result += piece
    except zstandard.ZstdError as error:
        raise _damaged(error) from None
    return result


def _damaged(error: Exception) -> OSError:
    return OSError(errno.EIO, f"compressed cluster is damaged: {error}")
