"""Guest memory as frames (ram.h): what arrives, what is refused, and that nothing else is written."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from coordinator.contract.errors import MigrationError
from coordinator.contract.segment import PAGE, Segment
from coordinator.migrate import ram
from coordinator.migrate._ram import ffi, lib

PAGES = 64
FRAME = struct.Struct("<QIIQQQ")
MAGIC = 0x4D41524C4C4F5441
KIND_PAGES, KIND_ZERO, KIND_END = 1, 2, 3
libc = ctypes.CDLL(None, use_errno=True)


class Guest:
    """PAGES pages of memory between two that nobody may touch: mmap(2), PROT_NONE."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, (PAGES + 2) * PAGE)
        at = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for guard in (at, at + (PAGES + 1) * PAGE):
            assert libc.mprotect(ctypes.c_void_p(guard), PAGE, 0) == 0
        self.address = at + PAGE
        self.seen = bytearray(PAGES)
        self.counts = ffi.new("struct ram_counts *")

    @property
    def memory(self) -> bytes:
        return ctypes.string_at(self.address, PAGES * PAGE)

    def takes(self, data: bytes, round_: int = 0) -> int:
        """The result of receiving this stream and its end."""
        read, write = os.pipe()
        thread = threading.Thread(target=_feed, args=(write, data))
        thread.start()
        seen = ffi.from_buffer("uint8_t[]", self.seen, require_writable=True)
        result = lib.ram_receive(read, ffi.cast("void *", self.address), PAGES, round_, seen, self.counts)
        os.close(read)
        thread.join()
        return int(result)


def _feed(fd: int, data: bytes) -> None:
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BrokenPipeError:
        pass
    finally:
        os.close(fd)


def total(data: bytes, seed: int = 0) -> int:
    return int(lib.ram_sum(data, len(data), seed))


def frame(
    kind: int, first: int, count: int, pages: bytes = b"", round_: int = 0, magic: int = MAGIC
) -> bytes:
    head = struct.pack("<8Q", magic, kind << 32 | round_, first, count, 0, 0, 0, 0)
    value = total(head)
    if pages:
        value = total(pages, value)
    return FRAME.pack(magic, kind, round_, first, count, value) + pages


def page(value: int) -> bytes:
    return bytes([value]) * PAGE


def end(normal: int, zero: int) -> bytes:
    return frame(KIND_END, normal, zero)


GOOD = (
    frame(KIND_PAGES, 3, 2, page(1) + page(2)) + frame(KIND_ZERO, 10, 20) + frame(KIND_PAGES, 63, 1, page(3))
)


def test_what_arrives() -> None:
    guest = Guest()
    assert guest.takes(GOOD + end(3, 20)) == 0
    expected = bytearray(PAGES * PAGE)
    expected[3 * PAGE : 5 * PAGE], expected[63 * PAGE :] = page(1) + page(2), page(3)
    assert guest.memory == bytes(expected)
    assert (guest.counts.normal, guest.counts.zero) == (3, 20)
    assert guest.counts.bytes == len(GOOD) + FRAME.size
    assert [i for i, mark in enumerate(guest.seen) if mark] == [3, 4, *range(10, 30), 63]


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (end(0, 0), 0),
        (b"", lib.RAM_ENDED),
        (GOOD, lib.RAM_ENDED),
        (GOOD + end(2, 20), lib.RAM_BAD_COUNT),
        (GOOD + end(3, 21), lib.RAM_BAD_COUNT),
        (GOOD + end(2**64 - 1, 2**64 - 1), lib.RAM_BAD_COUNT),
        (frame(KIND_PAGES, 64, 1, page(1)), lib.RAM_BAD_RANGE),
        (frame(KIND_PAGES, 63, 2, page(1) * 2), lib.RAM_BAD_RANGE),
        (frame(KIND_PAGES, 2**64 - 1, 2, page(1) * 2), lib.RAM_BAD_RANGE),
        (frame(KIND_PAGES, 2**52, 1, page(1)), lib.RAM_BAD_RANGE),
        (frame(KIND_PAGES, 1, 2**64 - 1), lib.RAM_BAD_RANGE),
        (frame(KIND_PAGES, 0, 2**52 + 1), lib.RAM_BAD_RANGE),
        (frame(KIND_PAGES, 0, 0), lib.RAM_BAD_RANGE),
        (frame(KIND_ZERO, 0, 65), lib.RAM_BAD_RANGE),
        (frame(KIND_ZERO, 60, 2**64 - 30), lib.RAM_BAD_RANGE),
        (frame(KIND_ZERO, 0, 0), lib.RAM_BAD_RANGE),
        (frame(7, 0, 1), lib.RAM_BAD_FRAME),
        (frame(0, 0, 1), lib.RAM_BAD_FRAME),
        (frame(KIND_ZERO, 0, 1, round_=1), lib.RAM_BAD_FRAME),
        (frame(KIND_ZERO, 0, 1, magic=MAGIC + 1), lib.RAM_BAD_FRAME),
        (frame(KIND_ZERO, 5, 1) + frame(KIND_ZERO, 5, 1), lib.RAM_TWICE),
        (GOOD + frame(KIND_PAGES, 4, 1, page(9)), lib.RAM_TWICE),
        (GOOD + frame(KIND_ZERO, 60, 4), lib.RAM_TWICE),
    ],
)
def test_what_is_refused(data: bytes, result: int) -> None:
    guest = Guest()
    assert guest.takes(data) == result


def test_a_frame_has_a_most_of_pages() -> None:
    """RAM_MOST is more than this memory, so the range says it first; the limit is one of the format."""
    segment = Segment.create(vcpus=1, ram=(lib.RAM_MOST + 8) * PAGE)
    data = frame(KIND_PAGES, 0, lib.RAM_MOST + 1, page(1) * (lib.RAM_MOST + 1))
    assert "memory that this machine does not have" in refusal(segment, data)


def test_every_bit_of_a_header() -> None:
    """One flipped bit: refused, and at most pages that the frame could have meant are written."""
    for at in range(FRAME.size):
        for bit in range(8):
            data = bytearray(frame(KIND_PAGES, 3, 2, page(1) + page(2)) + end(2, 0))
            data[at] ^= 1 << bit
            assert Guest().takes(bytes(data)) > 0, (at, bit)


def test_every_bit_of_an_end() -> None:
    for at in range(FRAME.size):
        data = bytearray(GOOD + end(3, 20))
        data[len(GOOD) + at] ^= 0x10
        assert Guest().takes(bytes(data)) > 0, at


def test_flips_within_pages() -> None:
    for at in range(FRAME.size, FRAME.size + 2 * PAGE, 61):
        data = bytearray(GOOD + end(3, 20))
        data[at] ^= 1 << at % 8
        assert Guest().takes(bytes(data)) == lib.RAM_BAD_SUM, at


def test_truncated_at_any_byte() -> None:
    data = GOOD + end(3, 20)
    places = [
        *range(0, FRAME.size + 2),
        *range(FRAME.size, len(data), 509),
        *range(len(data) - 2 * FRAME.size, len(data)),
    ]
    for length in places:
        assert Guest().takes(data[:length]) == lib.RAM_ENDED, length


def test_swapped_pages_are_noticed() -> None:
    one = bytearray(frame(KIND_PAGES, 3, 2, page(1) + page(2)))
    one[FRAME.size :] = page(2) + page(1)
    assert Guest().takes(bytes(one)) == lib.RAM_BAD_SUM


def test_later_rounds_overwrite_and_zero() -> None:
    guest = Guest()
    assert guest.takes(GOOD + end(3, 20)) == 0
    more = frame(KIND_ZERO, 3, 1, round_=1) + frame(KIND_PAGES, 4, 1, page(9), round_=1)
    assert guest.takes(more + frame(KIND_END, 1, 1, round_=1), round_=1) == 0
    assert guest.memory[3 * PAGE : 5 * PAGE] == page(0) + page(9)


# ---- from segment to segment ----------------------------------------------------------------------------
RAM = 16 << 20


@pytest.fixture
def segments() -> Iterator[tuple[Segment, Segment]]:
    yield Segment.create(vcpus=1, ram=RAM), Segment.create(vcpus=1, ram=RAM)


def refusal(segment: Segment, data: bytes) -> str:
    read, write = os.pipe()
    thread = threading.Thread(target=_feed, args=(write, data))
    thread.start()
    with pytest.raises(MigrationError) as caught:
        ram.Receiver(segment).run(read, "peer")
    os.close(read)
    thread.join()
    return str(caught.value)


def test_holes_stay_holes_on_both_sides(segments: tuple[Segment, Segment]) -> None:
    source, target = segments
    source.ram[PAGE * 100] = 1
    source.ram[PAGE * 3000 : PAGE * 3004] = 7
    source.ram[PAGE * 2000] = 0  # a page that is there and zero
    target.ram[PAGE * 50] = 9  # what was in the target before
    before = os.fstat(source.fd).st_blocks
    target.empty_memory()
    empty = os.fstat(target.fd).st_blocks
    pairs = [socket.socketpair() for _ in range(3)]
    sender, receiver = ram.Sender(source), ram.Receiver(target)
    jobs = [threading.Thread(target=sender.run, args=(a.fileno(), "")) for a, _ in pairs]
    jobs += [threading.Thread(target=receiver.run, args=(b.fileno(), "")) for _, b in pairs]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert os.fstat(source.fd).st_blocks == before
    assert os.fstat(target.fd).st_blocks == empty + 5 * PAGE // 512
    assert (target.ram == source.ram).all()  # last, since to read a hole fills it
    assert (
        (sender.counts.normal, sender.counts.zero) == (receiver.counts.normal, receiver.counts.zero) == (5, 1)
    )
    assert sender.total == 6
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_connections_share_the_work(segments: tuple[Segment, Segment]) -> None:
    source, target = segments
    source.ram[:] = 5
    pairs = [socket.socketpair() for _ in range(4)]
    sender, receiver = ram.Sender(source), ram.Receiver(target)
    jobs = [threading.Thread(target=sender.run, args=(a.fileno(), "")) for a, _ in pairs]
    jobs += [threading.Thread(target=receiver.run, args=(b.fileno(), "")) for _, b in pairs]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert receiver.counts.normal == RAM // PAGE
    assert (target.ram == source.ram).all()
    for pair in pairs:
        for sock in pair:
            sock.close()


def test_a_peer_that_closes_while_the_pipe_is_full(segments: tuple[Segment, Segment]) -> None:
    source, _ = segments
    source.ram[:] = 1
    ours, theirs = socket.socketpair()
    failures = []

    def send() -> None:
        try:
            ram.Sender(source).run(ours.fileno(), "the target")
        except MigrationError as error:
            failures.append(str(error))

    job = threading.Thread(target=send)
    job.start()
    theirs.recv(100)
    theirs.close()
    job.join(20)
    assert failures and failures[0].startswith("the target: guest memory: ")
    ours.close()


def test_a_cancel_ends_a_sender(segments: tuple[Segment, Segment]) -> None:
    source, _ = segments
    sender = ram.Sender(source)
    sender.cancelled = True
    ours, theirs = socket.socketpair()
    with pytest.raises(MigrationError, match="cancelled"):
        sender.run(ours.fileno(), "")
    ours.close()
    theirs.close()
