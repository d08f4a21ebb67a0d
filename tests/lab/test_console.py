"""What the guest says, wherever a line is cut."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from coordinator.lab.console import Disk, Gap, Guestbook, Mark, Pass, Read, Text, Wrong

#: times are those of the guest's counter, which runs at 1 GHz (docs/quirks.md)
SAID = (
    b"Linux says hello\r\n@ready 900 4194304\r\n@read 1000 1\r\n@gap 1000 52000 50000\r\n@read 53000 12\r\n"
    b"@error 54000 5 65536\r\n@kmsg 54500 3 sr 1:0:0:0: [sr0] tag#0 Sense Key : Medium Error [current]\r\n"
    b"@pass 60000 1 ab right\r\n@pass 70000 2 cd wrong\r\n@read x y\r\n@diskready 71000 67108864\r\n"
    b"@disk 72000 10 7 4096\r\n@diskwrong 73000 8 place 255 block 3 of round 7\r\n"
    b"@diskerror 74000 5 fsync\r\n@disk 75000 11\r\n@diskend 76000 12 9 8192 ab\r\n"
)


@given(st.lists(st.integers(0, len(SAID)), max_size=8))
def test_lines_are_understood_wherever_they_are_cut(cuts: list[int]) -> None:
    async def listen() -> Guestbook:
        book = Guestbook()
        places = [0, *sorted(cuts), len(SAID)]
        for start, end in zip(places, places[1:], strict=False):
            book.feed(SAID[start:end])
        return book

    book = asyncio.run(listen())
    assert book.ready and book.reads == [Read(1000, 1), Read(53000, 12)]
    assert book.gaps == [Gap(52000, 1000, 50000)]
    assert book.errors == [Text(54000, "errno 5 at byte 65536"), Text(74000, "disk: errno 5 at fsync")]
    assert book.kernel == [Text(54500, "sr 1:0:0:0: [sr0] tag#0 Sense Key : Medium Error [current]", 3)]
    assert book.writes and book.disk == [Disk(72000, 10, 7, 4096), Disk(76000, 12, 9, 8192, "ab")]
    assert book.wrong == [Wrong(73000, 8, "place 255 block 3 of round 7")]
    assert book.passes == [Pass(60000, True), Pass(70000, False)]
    assert book.other == ["Linux says hello", "@read x y", "@disk 75000 11"]
    assert book.mark() == Mark(2, 1, 2, 2, 1, 2, 1)


def test_the_next_read_is_waited_for() -> None:
    async def wait() -> Read | None:
        book = Guestbook()
        waiting = asyncio.ensure_future(book.read_after(1000))
        for line in (b"@read 1000 1\n", b"@pass 1100 1 ab right\n", b"@read 1200 3\n"):
            await asyncio.sleep(0)
            assert not waiting.done()
            book.feed(line)
        return await waiting

    assert asyncio.run(wait()) == Read(1200, 3)


def test_a_guest_that_gives_up_is_not_waited_for() -> None:
    async def wait() -> tuple[Read | None, str]:
        book = Guestbook()
        waiting = asyncio.ensure_future(book.read_after(0))
        await asyncio.sleep(0)
        book.feed(b"@failed 77 /dev/sr0: No such device\n")
        return await waiting, book.failed

    assert asyncio.run(wait()) == (None, "/dev/sr0: No such device")
