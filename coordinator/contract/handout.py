"""What the block daemon may ask of the coordinator across its sandbox: one request and one answer a
connection, by a SOCK_SEQPACKET socket in the machine's folder. A descriptor comes with the answer
(unix(7), SCM_RIGHTS).
"""

from __future__ import annotations

import msgspec

#: a packet at most: a path has 4096 bytes, twice that where each is escaped
MOST = 64 << 10


class OpenFile(msgspec.Struct, frozen=True, tag=True):
    """A file, to be read."""

    file: str


class Connect(msgspec.Struct, frozen=True, tag=True):
    """A TCP connection, within ``seconds``."""

    host: str
    port: int
    seconds: float


class Answer(msgspec.Struct, frozen=True):
    """``errno`` is 0 when a descriptor comes with it."""

    errno: int = 0
    error: str = ""


encode = msgspec.msgpack.encode
requests: msgspec.msgpack.Decoder[OpenFile | Connect] = msgspec.msgpack.Decoder(OpenFile | Connect)
answers = msgspec.msgpack.Decoder(Answer)


def path(runtime: str) -> str:
    """Where the coordinator listens."""
    return f"{runtime}/handout"
