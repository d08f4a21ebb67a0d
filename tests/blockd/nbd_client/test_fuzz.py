"""Replies of a server with bytes changed, cut and doubled: always an answer, a loss or a violation."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from blockd.nbd.replies import Replies, Request, Violation
from blockd.nbd.wire import Lost
from coordinator.contract.nbd import Command, TransmissionFlag
from coordinator.contract.nbd_handshake import ExportInfo
from tests.blockd.nbd_client.script import CONTEXT, READ, STATUS, WRITE, data, done, error, hole, status
from tests.support.nbd_wire import simple_reply

LENGTH = 1024
PIECES = [
    data(READ, 0, b"d" * 512, 0),
    hole(READ, 512, 512),
    data(READ, 0, b"e" * LENGTH),
    error(READ, 5, b"no", 0),
    simple_reply(READ, 5),
    done(WRITE),
    simple_reply(WRITE),
    error(WRITE, 28, b"full"),
    status(STATUS, (512, 0), (512, 3)),
    error(STATUS, 95),
]


class Canned:
    """A wire that brings these bytes and then ends."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    def receive_into(self, view: memoryview) -> int:
        piece = self._content[: len(view)]
        if not piece:
            raise Lost("the end")
        view[: len(piece)] = piece
        self._content = self._content[len(piece) :]
        return len(piece)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    content = bytearray(b"".join(draw(st.lists(st.sampled_from(PIECES), max_size=6))))
    for _ in range(draw(st.integers(0, 4))):
        if content:
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: draw(st.integers(0, len(content)))])


@given(streams(), st.booleans())
def test_any_bytes(content: bytes, structured: bool) -> None:
    buffer = bytearray(b"\xee" * (3 * LENGTH))
    pending = {
        READ: Request(Command.READ, 0, LENGTH, memoryview(buffer)[LENGTH : 2 * LENGTH]),
        WRITE: Request(Command.WRITE, 0, 3, memoryview(b"abc")),
        STATUS: Request(Command.BLOCK_STATUS, 0, LENGTH),
    }
    finished: list[Request] = []

    def finish(request: Request) -> None:
        finished.append(request)
        pending.pop(next(cookie for cookie, known in pending.items() if known is request))

    info = ExportInfo(1 << 20, TransmissionFlag(1), structured=structured, allocation=CONTEXT)
    replies = Replies(Canned(content), info, pending.get, finish)  # type: ignore[arg-type]
    try:
        while True:
            replies.take()
    except (Lost, Violation) as reason:
        assert "\n" not in str(reason)
    assert buffer[:LENGTH] + buffer[2 * LENGTH :] == b"\xee" * (2 * LENGTH)
    for request in finished:
        if request.command is Command.READ and not request.error and structured:
            assert b"\xee" not in buffer[LENGTH : 2 * LENGTH] or b"\xee" in content
