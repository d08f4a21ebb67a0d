"""The block daemon as a process: its control messages, its end by signal and by its parent's death, and
what it says when it cannot start."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

import blockd.main
from blockd.raw import RawImage
from coordinator.contract import messages
from coordinator.contract.codec import encode
from coordinator.contract.config import BlockdConfig, Export, Media, control_endpoint, nbd_socket
from coordinator.contract.errors import BlockError, UsageError
from coordinator.contract.island import router
from devhost.block_client import BlockClient, Completion
from tests.blockd.conftest import make_image
from tests.support.certificates import Certificates
from tests.support.tools import run_tool

SECONDS = 30
#: a child that runs the block daemon with the configuration on its command line
ISLAND = """
import sys, msgspec
from blockd.main import main
from coordinator.contract.config import BlockdConfig
main(msgspec.json.decode(sys.argv[1], type=BlockdConfig))
"""
#: a parent that starts such a child and then waits for ever
PARENT = f"""
import os, subprocess, sys, time
config = sys.argv[1].replace('"parent":0', '"parent":' + str(os.getpid()))
subprocess.Popen([sys.executable, "-c", {ISLAND!r}, config])
time.sleep(3600)
"""


class Coordinator:
    """The other end of the control channel."""

    def __init__(self, runtime: Path) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.socket = router(self.context, control_endpoint(str(runtime)))
        self.serial = 0

    def notice(self) -> messages.AnyNotice:
        assert self.socket.poll(SECONDS * 1000), "the island says nothing"
        identity, frame = self.socket.recv_multipart()
        assert identity == b"blockd"
        return messages.notices.decode(frame)

    def ask(self, kind: type[messages.Command], **fields: Any) -> messages.Answer:
        self.serial += 1
        self.socket.send_multipart([b"blockd", encode(kind(serial=self.serial, **fields))])
        answer = self.notice()
        assert isinstance(answer, messages.Answer) and answer.serial == self.serial
        return answer

    def close(self) -> None:
        self.socket.close()
        self.context.term()


class Island:
    """A block daemon of its own, told to serve ``exports``."""

    def __init__(self, runtime: Path, *exports: Export, sandbox: bool = True) -> None:
        self.log = runtime / "log"
        config = BlockdConfig("vm-1", str(runtime), os.getpid(), exports, str(self.log), sandbox)
        self.process = subprocess.Popen([sys.executable, "-c", ISLAND, msgspec.json.encode(config).decode()])

    def end(self) -> int:
        return self.process.wait(SECONDS)


@pytest.fixture
def coordinator(runtime: Path) -> Iterator[Coordinator]:
    coordinator = Coordinator(runtime)
    yield coordinator
    coordinator.close()


def connected(runtime: Path, name: str) -> BlockClient:
    client = BlockClient(nbd_socket(str(runtime)), name)
    client.connect(SECONDS)
    return client


def read(client: BlockClient, length: int) -> bytes:
    buffer = bytearray(length)
    client.read(0, [memoryview(buffer)])
    assert [done.errno for done in client.drain(SECONDS)] == [0]
    return bytes(buffer)


def title_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


def test_life_of_an_island(runtime: Path, coordinator: Coordinator, tmp_path: Path) -> None:
    disk = Export("hd0", make_image(tmp_path / "disk", 4096, 1))
    discs = [make_image(tmp_path / f"disc{byte}", 4096, byte) for byte in (2, 3)]
    island = Island(runtime, disk)
    hello = coordinator.notice()
    assert isinstance(hello, messages.Hello) and (hello.role, hello.pid) == ("blockd", island.process.pid)
    assert title_of(hello.pid) == "atoll blockd vm-1"
    assert os.stat(nbd_socket(str(runtime))).st_mode & 0o777 == 0o600
    client = connected(runtime, "hd0")
    assert read(client, 512) == b"\1" * 512

    answer = coordinator.ask(messages.OpenExport, export=Export("cd0", discs[0], media=Media.CDROM))
    assert answer.error is None and answer.value["epoch"] == 1 and answer.value["read_only"] is True
    cd = connected(runtime, "cd0")
    assert read(cd, 512) == b"\2" * 512
    bad = coordinator.ask(
        messages.OpenExport, export=Export("cd0", str(tmp_path / "none"), media=Media.CDROM)
    )
    assert bad.error == f"{tmp_path}/none: cannot be opened: No such file or directory"
    assert read(cd, 512) == b"\2" * 512  # the old medium is still served
    answer = coordinator.ask(messages.OpenExport, export=Export("cd0", discs[1], media=Media.CDROM))
    assert answer.value["epoch"] == 2
    cd = connected(runtime, "cd0")
    assert read(cd, 512) == b"\3" * 512
    again = coordinator.ask(messages.OpenExport, export=Export("hd0", disk.file))
    assert again.error is not None and "locked" in again.error  # by this very export

    told = coordinator.ask(messages.QueryExports).value
    assert [(row["id"], row["file"], row["size"], row["clients"]) for row in told] == [
        ("hd0", disk.file, 4096, 1),
        ("cd0", discs[1], 4096, 1),
    ]
    assert coordinator.ask(messages.CloseExport, id="cd0").error is None
    assert coordinator.ask(messages.CloseExport, id="cd0").error == "no export is named 'cd0'"
    wrong = coordinator.ask(messages.OpenExport, export=Export("x", disk.file, format="vmdk"))
    assert wrong.error == f"{disk.file}: format 'vmdk' is unknown (known: auto, qcow2, raw)"
    assert "does not know" in (coordinator.ask(messages.Run).error or "")
    coordinator.socket.send_multipart([b"blockd", b"\xc1 no message"])
    assert coordinator.ask(messages.QueryExports).error is None  # it lives on

    client.write(0, [memoryview(b"w" * 512)])
    assert [done.errno for done in client.drain(SECONDS)] == [0]
    assert coordinator.ask(messages.Quit).error is None
    assert island.end() == 0
    assert Path(disk.file).read_bytes()[:512] == b"w" * 512
    assert not os.path.exists(nbd_socket(str(runtime)))


def test_sigterm_ends_it_in_order(runtime: Path, coordinator: Coordinator, tmp_path: Path) -> None:
    file = make_image(tmp_path / "disk", 4096, 0)
    island = Island(runtime, Export("hd0", file))
    coordinator.notice()
    client = connected(runtime, "hd0")
    client.write(0, [memoryview(b"w" * 512)])
    assert [done.errno for done in client.drain(SECONDS)] == [0]
    island.process.send_signal(signal.SIGTERM)
    assert island.end() == 0
    assert Path(file).read_bytes()[:512] == b"w" * 512
    assert not os.path.exists(nbd_socket(str(runtime)))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_export_that_grows(
    runtime: Path, coordinator: Coordinator, tmp_path: Path, image_format: str
) -> None:
    """Sessions that are there keep the size they were told, new ones see the new one, as does qemu-img."""
    file = str(tmp_path / "disk")
    run_tool("qemu-img", "create", "-q", "-f", image_format, file, "1M")
    read_only = Export("cd0", make_image(tmp_path / "cd"), read_only=True)
    island = Island(runtime, Export("hd0", file, image_format), read_only)
    coordinator.notice()
    old = connected(runtime, "hd0")
    old.write(512, [memoryview(b"old" * 512)])
    assert [done.errno for done in old.drain(SECONDS)] == [0]
    answer = coordinator.ask(messages.ResizeExport, id="hd0", size=3 << 20)
    assert answer.error is None and answer.value["size"] == 3 << 20
    new = connected(runtime, "hd0")
    assert (old.size, new.size) == (1 << 20, 3 << 20)
    new.write((3 << 20) - 512, [memoryview(b"n" * 512)])
    old.write(1024, [memoryview(b"o" * 512)])
    for client in (new, old):
        assert [done.errno for done in client.drain(SECONDS)] == [0]
    buffer = bytearray(1 << 20)
    new.read(1 << 20, [memoryview(buffer)])
    assert [done.errno for done in new.drain(SECONDS)] == [0] and buffer == bytes(1 << 20)
    for name, size, words in (("hd0", 1 << 20, "only grow"), ("hd0", (4 << 20) + 1, "whole sectors"),
                              ("cd0", 4 << 20, "read-only"), ("hd9", 4 << 20, "no export")):  # fmt: skip
        assert words in (coordinator.ask(messages.ResizeExport, id=name, size=size).error or "")
    coordinator.ask(messages.Quit)
    assert island.end() == 0
    told = run_tool("qemu-img", "info", "-f", image_format, file)
    assert "virtual size: 3 MiB" in told
    script = ("-c", f"read -P {ord('n')} {(3 << 20) - 512} 512", "-c", f"read -P {ord('o')} 1024 512")
    assert "failed" not in run_tool("qemu-io", "-f", image_format, *script, file)


def test_snapshots_and_bitmaps_over_the_control_path(
    runtime: Path, coordinator: Coordinator, tmp_path: Path
) -> None:
    """Two states of one disk side by side, both read-only."""
    file = str(tmp_path / "disk")
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", file, "1M")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", file)
    run_tool("qemu-img", "snapshot", "-c", "before", file)
    run_tool("qemu-img", "bitmap", "--add", file, "b0")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", file)
    island = Island(runtime, sandbox=False)  # there is no coordinator that would hand the file out
    coordinator.notice()
    now = Export("now", file, "qcow2", read_only=True, bitmaps=("b0",))
    assert coordinator.ask(messages.OpenExport, export=now).error is None
    then = Export("then", file, "qcow2", load_snapshot="before")
    answer = coordinator.ask(messages.OpenExport, export=then)
    assert answer.error is None and answer.value["read_only"] is True
    assert read(connected(runtime, "now"), 512) == b"\2" * 512
    assert read(connected(runtime, "then"), 512) == b"\1" * 512
    place = f"nbd+unix:///now?socket={nbd_socket(str(runtime))}"
    told = run_tool("nbdinfo", "--map=qemu:dirty-bitmap:b0", place)
    assert [line.split()[:3] for line in told.splitlines()] == [["0", "65536", "1"], ["65536", "983040", "0"]]
    wrong = coordinator.ask(messages.OpenExport, export=Export("x", file, "qcow2", load_snapshot="after"))
    assert wrong.error == f"{file}: there is no snapshot 'after'"
    coordinator.ask(messages.Quit)
    assert island.end() == 0


def test_it_does_not_start_with_a_bad_image(runtime: Path, coordinator: Coordinator, tmp_path: Path) -> None:
    good = Export("hd0", make_image(tmp_path / "disk", 4096, 0))
    island = Island(runtime, good, Export("hd1", make_image(tmp_path / "odd", 1000, 0)))
    failed = coordinator.notice()
    assert isinstance(failed, messages.Failed)
    assert failed.error.startswith(f"{tmp_path}/odd: size 1000 is not a multiple of 512")
    assert island.end() == 1


def test_acknowledged_writes_outlive_it(runtime: Path, coordinator: Coordinator, tmp_path: Path) -> None:
    """SIGKILL, a new daemon at the same path, and a client that comes back by itself."""
    file = make_image(tmp_path / "disk", 65536, 0)
    island = Island(runtime, Export("hd0", file))
    coordinator.notice()
    client = connected(runtime, "hd0")
    for number in range(64):
        client.write(1024 * number, [memoryview(bytes([number]) * 1024)])
    assert {done.errno for done in client.drain(SECONDS)} == {0}
    island.process.kill()
    island.end()
    assert Path(file).read_bytes() == b"".join(bytes([number]) * 1024 for number in range(64))
    second = Island(runtime, Export("hd0", file))  # over the socket that the first left
    coordinator.notice()
    cookie = client.write(0, [memoryview(b"new")])
    client.reconnect(SECONDS)
    assert client.drain(SECONDS) == [Completion(cookie, 0)]
    assert read(client, 3) == b"new"
    coordinator.ask(messages.Quit)
    assert second.end() == 0


def test_it_dies_with_its_parent(runtime: Path, coordinator: Coordinator, tmp_path: Path) -> None:
    """SIGKILL of the parent: the process goes, and with it the locks; the socket does not hinder the next."""
    file = make_image(tmp_path / "disk", 4096, 0)
    config = BlockdConfig("vm-2", str(runtime), 0, (Export("hd0", file),), str(runtime / "log"))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, msgspec.json.encode(config).decode()])
    hello = coordinator.notice()
    assert isinstance(hello, messages.Hello)
    pidfd = os.pidfd_open(hello.pid)
    client = connected(runtime, "hd0")
    parent.kill()
    parent.wait()
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    assert poller.poll(SECONDS * 1000), "it outlives its parent"
    client.close()
    os.close(pidfd)
    RawImage(file).close()
    island = Island(runtime, Export("hd0", file))
    assert isinstance(coordinator.notice(), messages.Hello)
    coordinator.ask(messages.Quit)
    assert island.end() == 0


# ---- from the command line -------------------------------------------------------------------------------
def standalone(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "blockd.main", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_standalone(runtime: Path, tmp_path: Path) -> None:
    file = make_image(tmp_path / "a,b", 4096, 7)
    path = str(runtime / "nbd")
    process = standalone("--socket", path, "--export", f"x={file.replace(',', ',,')},ro=on")
    client = BlockClient(path, "x")
    client.connect(SECONDS)
    assert client.read_only and read(client, 512) == b"\7" * 512
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=SECONDS)
    assert (process.returncode, output, errors) == (0, "", "")
    assert not os.path.exists(path)


def test_standalone_at_tcp_with_tls(runtime: Path, tmp_path: Path, certificates: Certificates) -> None:
    """Several exports, a socket and a port, both with TLS."""
    one, two = (make_image(tmp_path / name) for name in ("one", "two"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    path = str(runtime / "nbd")
    process = standalone("--socket", path, "--tcp", f"127.0.0.1:{port}", "--export", f"one={one}",
                         "--export", f"two={two},ro=on", "--tls-creds", str(certificates.server))  # fmt: skip
    client = BlockClient(path, "one")
    with pytest.raises(BlockError, match="TLS"):
        client.connect(SECONDS)  # which waits until somebody listens
    told = run_tool("nbdinfo", "--list", f"nbds://localhost:{port}/?tls-certificates={certificates.client}")
    assert 'export="one"' in told and 'export="two"' in told
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=SECONDS) == ("", "") and process.returncode == 0


@pytest.mark.parametrize("place", ["x", "localhost:", "99999", "[::1]"])
def test_standalone_and_a_place_that_is_none(capsys: pytest.CaptureFixture[str], place: str) -> None:
    assert blockd.main.standalone(["--tcp", place, "--export", "hd0=disk"]) == 2
    errors = capsys.readouterr().err
    assert "[HOST:]PORT" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("export", "status", "words"),
    [
        ("hd0=DISK,speed=high", 2, "unknown option"),
        ("hd0=DISK,format=vmdk", 1, "format 'vmdk' is unknown"),
        ("hd0=NONE", 1, "No such file"),
        ("hd0=.", 1, "irectory"),
    ],
)
def test_standalone_errors_are_one_line(
    runtime: Path, tmp_path: Path, export: str, status: int, words: str
) -> None:
    export = export.replace("DISK", make_image(tmp_path / "disk", 4096, 7)).replace(
        "NONE", f"{tmp_path}/none"
    )
    process = standalone("--socket", str(runtime / "nbd"), "--export", export)
    output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == status
    assert errors.startswith("blockd: ") and errors.count("\n") == 1 and words in errors
    assert os.listdir(runtime) == []


@pytest.mark.parametrize(
    ("export", "words"),
    [
        ("hd0", "is not of the form"),
        ("hd0=x,ro=maybe", "on or off"),
        ("hd0=x,media=tape", "disk or cdrom"),
        ("hd0=x,speed=high", "unknown option"),
    ],
)
def test_exports_that_cannot_be_meant(export: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        blockd.main.parse_export(export)


def check_socket_refused(path: str, tmp_path: Path, words: str) -> None:
    process = standalone("--socket", path, "--export", f"hd0={make_image(tmp_path / 'disk', 4096, 7)}")
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert path in errors and words in errors and errors.count("\n") == 1


def test_socket_paths_that_cannot_be_used(runtime: Path, tmp_path: Path) -> None:
    path = str(runtime / "nbd")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        check_socket_refused(path, tmp_path, "in use")
    check_socket_refused(f"/{'x' * 200}", tmp_path, "too long")
    check_socket_refused(f"{runtime}/none/nbd", tmp_path, "No such file")
    Path(runtime / "file").write_text("precious")
    check_socket_refused(f"{runtime}/file", tmp_path, "in use")
    assert Path(runtime / "file").read_text() == "precious"
