"""The block client against servers that behave, that go away, and that lie (hardware-cases 17 and 25)."""

from __future__ import annotations

import errno
import select
import shutil
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator

import pytest

from coordinator.contract.errors import BlockError
from devhost.block_client import BlockClient, Completion
from tests.support.nbd_wire import (
    IHAVEOPT,
    NBDMAGIC,
    WireServer,
    greet,
    option_reply,
    receive,
    simple_reply,
    take_request,
)

SECONDS = 20
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)
OLD_STYLE = bytes.fromhex("0000420281861253")  # "Oldstyle negotiation"
Script = Callable[[socket.socket], None]


@pytest.fixture
def path() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="atoll-")
    yield f"{folder}/nbd"
    shutil.rmtree(folder)


class Pause:
    """A clock that moves only when somebody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def connected(path: str) -> BlockClient:
    client = BlockClient(path, "hd0")
    client.connect(SECONDS)
    return client


def next_completions(client: BlockClient) -> list[Completion]:
    """As an event loop does it: poll, then on_readable."""
    poller = select.poll()
    poller.register(client.fileno(), select.POLLIN)
    while True:
        assert poller.poll(SECONDS * 1000), "nothing came"
        done = client.on_readable()
        if done:
            return done


def lost(client: BlockClient) -> str:
    """Poll until the loss of the connection shows; its one-line message."""
    with pytest.raises(BlockError) as caught:
        while True:
            next_completions(client)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- requests ---------------------------------------------------------------------------------------
def test_requests_on_the_wire(path: str) -> None:
    seen: list[object] = []

    def script(sock: socket.socket) -> None:
        greet(sock)
        for _ in range(5):
            command, flags, cookie, offset, length = take_request(sock)
            data = receive(sock, length) if command == WRITE else b""
            seen.append((command, flags, offset, length, data))
            sock.sendall(simple_reply(cookie))
        seen.append(take_request(sock)[0])

    server = WireServer(path, script)
    client = connected(path)
    assert (client.size, client.read_only, client.can_flush, client.can_trim) == (1 << 20, False, True, True)
    views = [memoryview(b"one"), memoryview(b""), memoryview(b"three")]
    cookies = [
        client.write(512, views),
        client.write(0, views, fua=True),
        client.flush(),
        client.trim(4096, 8192),
        client.write_zeroes(0, 512),
    ]
    assert [request.cookie for request in client.pending] == cookies
    assert client.drain(SECONDS) == [Completion(cookie, 0) for cookie in cookies]
    assert client.pending == ()
    client.close()
    server.finish()
    assert seen == [
        (WRITE, 0, 512, 8, b"onethree"),
        (WRITE, 1, 0, 8, b"onethree"),
        (FLUSH, 0, 0, 0, b""),
        (TRIM, 0, 4096, 8192, b""),
        (ZEROES, 0, 0, 512, b""),
        DISC,
    ]


def test_read_scatters_into_the_views_and_nowhere_else(path: str) -> None:
    data = bytes(range(256)) * 16

    def script(sock: socket.socket) -> None:
        greet(sock)
        _, _, cookie, offset, length = take_request(sock)
        reply = simple_reply(cookie, 0, data[:length])
        for at in range(0, len(reply), 700):  # in pieces that end in the header and in the views
            sock.sendall(reply[at : at + 700] if at else reply[:7])
            if not at:
                sock.sendall(reply[7:700])

    server = WireServer(path, script)
    client = connected(path)
    ram = bytearray(b"\xee" * 8192)
    view = memoryview(ram)
    cookie = client.read(0, [view[100:612], view[4096:4097], view[1000:2535]])
    done: list[Completion] = []
    while not done:
        done += next_completions(client)
    assert done == [Completion(cookie, 0)]
    expected = bytearray(b"\xee" * 8192)
    expected[100:612], expected[4096:4097], expected[1000:2535] = data[:512], data[512:513], data[513:2048]
    assert ram == expected
    server.finish()


def test_replies_in_another_order(path: str) -> None:
    """A server may reply as it likes; the data belongs to the cookie."""

    def script(sock: socket.socket) -> None:
        greet(sock)
        requests = [take_request(sock) for _ in range(3)]
        for _, _, cookie, offset, length in reversed(requests):
            sock.sendall(simple_reply(cookie, 0, bytes([offset >> 9]) * length))

    server = WireServer(path, script)
    client = connected(path)
    ram = memoryview(bytearray(1536))
    cookies = [client.read(512 * n, [ram[512 * n : 512 * n + 512]]) for n in range(3)]
    assert {done.cookie for done in client.drain(SECONDS)} == set(cookies)
    assert ram == bytes(512) + b"\1" * 512 + b"\2" * 512
    server.finish()


@pytest.mark.parametrize(
    ("wire", "number"),
    [
        (1, errno.EPERM),
        (5, errno.EIO),
        (22, errno.EINVAL),
        (28, errno.ENOSPC),
        (95, errno.EOPNOTSUPP),
        (12345, errno.EIO),
    ],
)
def test_errors_of_the_server(path: str, wire: int, number: int) -> None:
    def script(sock: socket.socket) -> None:
        greet(sock)
        for _ in range(2):
            sock.sendall(simple_reply(take_request(sock)[2], wire))

    server = WireServer(path, script)
    client = connected(path)
    ram = bytearray(b"\xee" * 512)
    cookie = client.read(0, [memoryview(ram)])
    assert next_completions(client) == [Completion(cookie, number)]
    assert ram == b"\xee" * 512
    assert next_completions_of(client, client.flush()) == number
    server.finish()


def next_completions_of(client: BlockClient, cookie: int) -> int:
    (done,) = next_completions(client)
    assert done.cookie == cookie
    return done.errno


def test_what_is_refused_before_it_is_sent(path: str) -> None:
    def script(sock: socket.socket) -> None:
        greet(sock, size=4096, flags=0b11)  # read-only, no flush, no trim
        assert take_request(sock)[0] == DISC

    server = WireServer(path, script)
    client = connected(path)
    buffer = memoryview(bytearray(8192))
    for number, call in (
        (errno.EINVAL, lambda: client.read(4096, [buffer[:1]])),
        (errno.EINVAL, lambda: client.read(0, [buffer])),
        (errno.EINVAL, lambda: client.read(-1, [buffer[:1]])),
        (errno.EPERM, lambda: client.write(0, [buffer[:1]])),
        (errno.EPERM, lambda: client.trim(0, 512)),
        (errno.EOPNOTSUPP, lambda: client.flush()),
    ):
        with pytest.raises(BlockError) as caught:
            call()
        assert caught.value.errno == number
    assert client.pending == ()
    client.close()
    server.finish()


def test_a_full_socket_does_not_block_the_owner(path: str) -> None:
    size = 8 << 20
    received = []
    full = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock, size=4 * size)
        cookies = []
        full.wait(SECONDS)
        for _ in range(4):
            _, _, cookie, _, length = take_request(sock)
            received.append(receive(sock, length))
            cookies.append(cookie)
        sock.sendall(b"".join(simple_reply(cookie) for cookie in cookies))

    server = WireServer(path, script)
    client = connected(path)
    data = [bytes([n]) * size for n in range(4)]
    cookies = [client.write(size * n, [memoryview(piece)]) for n, piece in enumerate(data)]
    assert client.wants_write
    full.set()
    poller = select.poll()
    poller.register(client.fileno(), select.POLLOUT)
    while client.wants_write:
        assert poller.poll(SECONDS * 1000)
        client.on_writable()
    assert client.drain(SECONDS) == [Completion(cookie, 0) for cookie in cookies]
    server.finish()
    assert received == data


def test_more_views_than_one_system_call_takes(path: str) -> None:
    count = 3000

    def script(sock: socket.socket) -> None:
        greet(sock)
        _, _, cookie, _, length = take_request(sock)
        data = receive(sock, length)
        sock.sendall(simple_reply(cookie))
        _, _, cookie, _, length = take_request(sock)
        sock.sendall(simple_reply(cookie, 0, data))

    server = WireServer(path, script)
    client = connected(path)
    pattern = bytes(n % 251 for n in range(2 * count))
    source, target = memoryview(pattern), memoryview(bytearray(2 * count))
    client.write(0, [source[2 * n : 2 * n + 2] for n in range(count)])
    assert len(client.drain(SECONDS)) == 1
    client.read(0, [target[2 * n : 2 * n + 2] for n in range(count)])
    assert len(client.drain(SECONDS)) == 1
    assert target == pattern
    server.finish()


def test_overlapping_requests_wait_for_one_another(path: str) -> None:
    """ "Ordering of messages and writes": a server may take requests in flight in any order."""
    seen: list[list[int]] = []

    def script(sock: socket.socket) -> None:
        greet(sock)
        for together in (3, 2, 1):  # as many as must have been sent before any is answered
            batch = []
            for _ in range(together):
                command, _, cookie, _, length = take_request(sock)
                data = receive(sock, length) if command == WRITE else b""
                batch.append((cookie, bytes(length) if command == READ else b"", data))
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.recv(1)
            sock.settimeout(SECONDS)
            seen.append([cookie for cookie, _, _ in batch])
            sock.sendall(b"".join(simple_reply(cookie, 0, data) for cookie, data, _ in reversed(batch)))

    server = WireServer(path, script)
    client = connected(path)
    data = memoryview(bytearray(1024))
    one = client.write(0, [data])
    two = client.read(1024, [data])
    three = client.read(1024, [data])  # reads do not mind one another
    four = client.write(1023 + 1024, [data])
    five = client.flush()
    six = client.trim(2048, 512)
    assert [request.cookie for request in client.pending] == [one, two, three, four, five, six]
    assert {done.cookie for done in client.drain(SECONDS)} == {one, two, three, four, five, six}
    assert seen == [[one, two, three], [four, five], [six]]
    server.finish()


@pytest.mark.parametrize("arrived", [0, 10, 16, 116, 528])
def test_cancelled_read_touches_its_views_no_more(path: str, arrived: int) -> None:
    step = threading.Event()

    def script(sock: socket.socket) -> None:
        greet(sock)
        reply = simple_reply(take_request(sock)[2], 0, b"d" * 1024)
        sock.sendall(reply[:arrived])
        step.wait(SECONDS)
        sock.sendall(reply[arrived:])

    server = WireServer(path, script)
    client = connected(path)
    ram = bytearray(b"\xee" * 1024)
    cookie = client.read(0, [memoryview(ram)[:600], memoryview(ram)[600:]])
    landed = 0
    while landed < arrived - 16:  # let the first part land
        assert client.on_readable() == []
        landed = ram.count(b"d")
    client.cancel(cookie)
    assert ram == b"d" * landed + b"\xee" * (1024 - landed)
    step.set()
    assert next_completions(client) == [Completion(cookie, 0)]
    assert ram == b"d" * landed + b"\xee" * (1024 - landed)
    client.cancel(cookie)  # harmless
    server.finish()


def test_cancelled_write_goes_on_with_the_data_of_that_moment(path: str) -> None:
    """Also when most of it is still to be sent, and when it is sent once more."""
    size = 4 << 20
    received = []
    full = threading.Event()

    def dies(sock: socket.socket) -> None:
        greet(sock, size=size)
        full.wait(SECONDS)
        received.append(receive(sock, take_request(sock)[4]))

    def lives(sock: socket.socket) -> None:
        greet(sock, size=size)
        _, _, cookie, _, length = take_request(sock)
        received.append(receive(sock, length))
        sock.sendall(simple_reply(cookie))

    server = WireServer(path, dies, lives)
    client = connected(path)
    ram = bytearray(b"w" * size)
    cookie = client.write(0, [memoryview(ram)])
    assert client.wants_write
    client.cancel(cookie)
    ram[:] = bytes(size)
    full.set()
    with pytest.raises(BlockError, match="closed the connection"):
        client.drain(SECONDS)
    client.reconnect(SECONDS)
    assert client.drain(SECONDS) == [Completion(cookie, 0)]
    assert received == [b"w" * size] * 2
    server.finish()


# ---- connections that end -----------------------------------------------------------------------------


def test_the_whole_handshake_is_tried_again(path: str) -> None:
    """Connect succeeds, and then the old listener is gone: at once, after the greeting, after the flags,
    and with the word that it is shutting down."""

    def after_greeting(sock: socket.socket) -> None:
        sock.sendall(NBDMAGIC + IHAVEOPT + b"\0\3")

    def after_flags(sock: socket.socket) -> None:
        after_greeting(sock)
        receive(sock, 4 + 16)

    def shutting_down(sock: socket.socket) -> None:
        after_flags(sock)
        sock.sendall(option_reply(7, 1 << 31 | 7))

    server = WireServer(path, lambda sock: None, after_greeting, after_flags, shutting_down, greet)
    waits = Pause()
    client = BlockClient(path, "hd0", wait=waits.wait)
    client.connect(SECONDS)
    assert client.size == 1 << 20 and waits.now > 0
    server.finish()


def test_nobody_there(path: str) -> None:
    pause = Pause()
    client = BlockClient(path, "hd0", pause.clock, pause.wait)
    with pytest.raises(BlockError, match="cannot connect: No such file"):
        client.connect(5)
    assert 4.9 < pause.now <= 5
    with pytest.raises(BlockError, match="not connected"):
        client.fileno()


def test_replay_in_the_old_order_after_the_server_died(path: str) -> None:
    replayed: list[object] = []

    def dies(sock: socket.socket) -> None:
        greet(sock)
        cookies = [take_request(sock)[2]]
        for _ in range(2):
            cookies.append(take_request(sock)[2])
            receive(sock, 512)
        sock.sendall(simple_reply(cookies[1]))  # the middle one is done
        sock.sendall(simple_reply(cookies[0], 0, b"half"))

    def lives(sock: socket.socket) -> None:
        greet(sock)
        command, _, cookie, offset, length = take_request(sock)
        replayed.append((command, offset, length))
        sock.sendall(simple_reply(cookie, 0, b"r" * length))
        command, _, cookie, offset, length = take_request(sock)
        replayed.append((command, offset, receive(sock, length)))
        sock.sendall(simple_reply(cookie))

    server = WireServer(path, dies, lives)
    client = connected(path)
    ram = bytearray(1024)
    first = client.read(0, [memoryview(ram)])
    second = client.write(1024, [memoryview(b"2" * 512)])
    third = client.write(1536, [memoryview(b"3" * 512)])
    assert next_completions(client) == [Completion(second, 0)]
    assert "closed the connection" in lost(client)
    client.reconnect(SECONDS)
    assert client.drain(SECONDS) == [Completion(first, 0), Completion(third, 0)]
    assert ram == b"r" * 1024
    assert replayed == [(READ, 0, 1024), (WRITE, 1536, b"3" * 512)]
    server.finish()


def test_given_up_after_the_server_died(path: str) -> None:
    def dies(sock: socket.socket) -> None:
        greet(sock)
        take_request(sock)

    server = WireServer(path, dies)
    client = connected(path)
    cookie = client.flush()
    lost(client)
    with pytest.raises(BlockError):
        client.drain(SECONDS)
    assert client.fail_pending() == [Completion(cookie, errno.EIO)]
    assert client.pending == ()
    client.close()
    server.finish()


def test_a_server_that_dies_while_idle_is_noticed(path: str) -> None:
    server = WireServer(path, greet)
    client = connected(path)
    assert "closed the connection" in lost(client)
    server.finish()


def test_requests_made_after_the_loss_are_replayed_too(path: str) -> None:
    def lives(sock: socket.socket) -> None:
        greet(sock)
        sock.sendall(simple_reply(take_request(sock)[2]))

    server = WireServer(path, greet, lives)
    client = connected(path)
    lost(client)
    cookie = client.flush()
    client.reconnect(SECONDS)
    assert client.drain(SECONDS) == [Completion(cookie, 0)]
    server.finish()


# ---- servers that lie -----------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [-1, -(1 << 63), 1 << 63])
def test_negative_size(path: str, size: int) -> None:
    """CVE-2023-5215."""
    server = WireServer(path, lambda sock: greet(sock, size=size))
    with pytest.raises(BlockError, match="impossible size"):
        connected(path)
    server.finish()


def test_two_sizes_of_one_export(path: str) -> None:
    server = WireServer(path, lambda sock: greet(sock, sizes=(1 << 21,)))
    with pytest.raises(BlockError, match="2 sizes"):
        connected(path)
    server.finish()


def test_size_that_changes_with_a_new_session(path: str) -> None:
    server = WireServer(path, greet, lambda sock: greet(sock, size=1 << 19))
    client = connected(path)
    client.flush()
    lost(client)
    with pytest.raises(BlockError, match="has changed: 1048576 bytes became 524288"):
        client.reconnect(SECONDS)
    assert len(client.fail_pending()) == 1
    server.finish()


def greeting_of(data: bytes) -> Script:
    return lambda sock: sock.sendall(data)


def option_answer(data: bytes, times: int = 1) -> Script:
    def script(sock: socket.socket) -> None:
        sock.sendall(NBDMAGIC + IHAVEOPT + b"\0\3")
        receive(sock, 4)
        receive(sock, struct.unpack(">I", receive(sock, 16)[12:])[0])
        sock.sendall(data * times)

    return script


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (greeting_of(b"SSH-2.0-OpenSSH_9.2p1"), "is no NBD server"),
        (
            greeting_of(NBDMAGIC + bytes.fromhex("0000420281861253") + bytes(200)),
            "fixed newstyle",
        ),  # old style
        (greeting_of(NBDMAGIC + IHAVEOPT + b"\0\0"), "fixed newstyle"),
        (option_answer(bytes(20)), "answered what was not asked"),
        (option_answer(option_reply(3, 1)), "answered what was not asked"),
        (option_answer(option_reply(7, 1)), "told 0 sizes"),
        (option_answer(option_reply(7, 99)), "answered an option with 0x63"),
        (option_answer(option_reply(7, 3)), "answered an option with 0x3"),
        (option_answer(option_reply(7, 3, b"", 0xFFFFFFFF)), "4294967295 bytes"),
        (
            option_answer(option_reply(7, 3, struct.pack(">HIII", 3, 4096, 4096, 1 << 20))),
            "only requests of 4096",
        ),
        (option_answer(option_reply(7, 3, b"\0\1x"), 100), "does not come to an end"),
        (option_answer(option_reply(7, 1 << 31 | 6)), "has no export 'hd0'"),
        (option_answer(option_reply(7, 1 << 31 | 5)), "TLS"),
        (option_answer(option_reply(7, 1 << 31 | 2, b"no\nway\xff")), "refused export 'hd0': no$"),
    ],
)
def test_handshakes_that_are_none(path: str, script: Script, words: str) -> None:
    server = WireServer(path, script)
    with pytest.raises(BlockError, match=words) as caught:
        connected(path)
    assert "\n" not in str(caught.value) and path in str(caught.value)
    server.finish()


@pytest.mark.parametrize("zeroes", [True, False])
def test_a_server_that_knows_export_name_only(path: str, zeroes: bool) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(NBDMAGIC + IHAVEOPT + (b"\0\1" if zeroes else b"\0\3"))
        assert receive(sock, 4) == (b"\0\0\0\1" if zeroes else b"\0\0\0\3")
        receive(sock, struct.unpack(">I", receive(sock, 16)[12:])[0])
        sock.sendall(option_reply(7, 1 << 31 | 1))
        assert receive(sock, 16 + 3) == IHAVEOPT + struct.pack(">II", 1, 3) + b"hd0"
        sock.sendall(struct.pack(">QH", 4096, 5) + bytes(124 if zeroes else 0))
        cookie = take_request(sock)[2]
        sock.sendall(simple_reply(cookie, 0, b"d" * 512))

    server = WireServer(path, script)
    client = connected(path)
    ram = bytearray(512)
    client.read(0, [memoryview(ram)])
    assert len(client.drain(SECONDS)) == 1 and ram == b"d" * 512
    server.finish()


def reply_with(make: Callable[[int], bytes]) -> Script:
    def script(sock: socket.socket) -> None:
        greet(sock)
        sock.sendall(make(take_request(sock)[2]))

    return script


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda cookie: simple_reply(cookie + 1, 0, bytes(512)), "was not made"),
        (lambda cookie: simple_reply(cookie, 0, bytes(512), magic=0x668E33EF), "magic"),
        (lambda cookie: bytes(528), "magic"),
        (lambda cookie: simple_reply(cookie, 5, bytes(512)), "behind an error"),
        (lambda cookie: simple_reply(cookie, 0, bytes(511)), "closed the connection"),
        (lambda cookie: simple_reply(cookie)[:15], "closed the connection"),
        (lambda cookie: b"", "closed the connection"),
    ],
)
def test_replies_that_are_none(path: str, make: Callable[[int], bytes], words: str) -> None:
    """Wrong cookie, short reply, wrong magic number: the connection is lost, the request is not."""
    server = WireServer(path, reply_with(make))
    client = connected(path)
    ram = bytearray(b"\xee" * 1024)
    cookie = client.read(0, [memoryview(ram)[:512]])
    assert words in lost(client)
    assert ram[512:] == b"\xee" * 512
    assert [request.cookie for request in client.pending] == [cookie]
    assert client.fail_pending() == [Completion(cookie, errno.EIO)]
    server.finish()


def test_the_same_reply_twice(path: str) -> None:
    server = WireServer(path, reply_with(lambda cookie: 2 * simple_reply(cookie)))
    client = connected(path)
    cookie = client.flush()
    assert next_completions(client) == [Completion(cookie, 0)]
    assert "was not made" in lost(client)
    server.finish()


def test_a_silent_server_does_not_hold_drain_for_ever(path: str) -> None:
    def script(sock: socket.socket) -> None:
        greet(sock)
        take_request(sock)
        sock.recv(1)

    server = WireServer(path, script)
    client = connected(path)
    client.flush()
    with pytest.raises(BlockError) as caught:
        client.drain(0.01)
    assert caught.value.errno == errno.ETIMEDOUT
    client.close()
    server.finish()
