"""A compressed connection whose peer does not mean well."""

from __future__ import annotations

import os
import socket
import struct

import pytest
import zstandard

from coordinator.contract.errors import MigrationError
from coordinator.migrate import pump
from coordinator.migrate.pump import PIECE, Wire


def received(*pieces: bytes) -> bytes:
    """What comes out of pieces as they are on the wire; a piece is its length and its bytes."""
    ours, theirs = socket.socketpair()
    out = bytearray()

    def job(fd: int) -> None:
        while data := os.read(fd, 1 << 16):
            out.extend(data)

    with ours, theirs:
        for piece in pieces:
            theirs.sendall(struct.pack("<I", len(piece)) + piece)
        theirs.sendall(struct.pack("<I", 0))
        pump.receive(ours, Wire(level=1), pump.Tally(), job)
    return bytes(out)


def packed(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size))


def test_a_piece_may_have_its_full_size() -> None:
    assert received(packed(PIECE), packed(1)) == bytes(PIECE + 1)


def unsized(size: int) -> bytes:
    """A frame that does not say how much it holds (RFC 8878 section 3.1.1.1.4: the field is optional)."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, write_content_size=False)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(bytes(size))


@pytest.mark.parametrize(
    "piece",
    [packed(PIECE + 1), packed(64 * PIECE), unsized(PIECE), unsized(64 * PIECE), b"junk", packed(1)[:-1]],
)
def test_a_piece_that_grows_beyond_its_size_or_is_none(piece: bytes) -> None:
    with pytest.raises(MigrationError, match=r"^guest memory: a compressed piece"):
        received(piece)
