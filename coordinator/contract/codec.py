"""One codec for every message between processes: msgpack of a closed set of frozen structs.

ZeroMQ frames carry exactly one encoded message. Nothing is ever pickled onto a socket.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from coordinator.contract.errors import MessageError

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode


class Codec(Generic[T]):
    """Decoder of one closed union of messages."""

    def __init__(self, union: Any) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)

    def decode(self, frame: bytes | memoryview) -> T:
        """One message; MessageError on anything else."""
        try:
            message: T = self._decoder.decode(frame)
        except msgspec.MsgspecError as error:
            raise MessageError(f"malformed message ({len(frame)} bytes): {error}") from None
        return message
