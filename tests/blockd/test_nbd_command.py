"""``atoll nbd`` as a process, beside qemu-nbd: its options, its ends, its errors; and ``atoll nbd -L``."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockd.export_image import open_image
from blockd.nbd import command
from coordinator.contract.config import Export
from coordinator.contract.errors import BlockError
from tests.blockd.conftest import Serve, make_image
from tests.support.certificates import Certificates
from tests.support.nbd_wire import WireClient
from tests.support.tools import run_tool

SECONDS = 60
MIB = 1 << 20
ATOLL_NBD = (sys.executable, "-m", "coordinator.cli.main", "nbd")


def nbd(*arguments: str, status: int = 0) -> str:
    """Run it to its end; its output, both streams together."""
    return run_tool(*ATOLL_NBD, *arguments, status=status)


def failure(*arguments: str) -> str:
    """What it says when it does not start: one line."""
    said = nbd(*arguments, status=1)
    assert said.startswith("atoll nbd: ") and said.count("\n") == 1
    return said.removeprefix("atoll nbd: ").rstrip()


class Daemon:
    """A server in the foreground, listening at a UNIX socket or at TCP."""

    def __init__(self, *arguments: str, before: Callable[[], None] | None = None) -> None:
        self.process = subprocess.Popen(
            (*ATOLL_NBD, "-v", *arguments), stderr=subprocess.PIPE, text=True, preexec_fn=before
        )
        self.port = 0

    def ready(self, listeners: int = 1) -> None:
        assert self.process.stderr is not None
        for _ in range(listeners):
            line = self.process.stderr.readline()
            match = re.fullmatch(r"atoll nbd: listening at (?:\S+ port (\d+)|\S+)\n", line)
            assert match is not None, line + self.process.stderr.read()
            self.port = int(match[1] or 0)

    def end(self, number: int | None = None) -> int:
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(SECONDS)


@pytest.fixture
def start() -> Iterator[Callable[..., Daemon]]:
    running: list[Daemon] = []

    def run(*arguments: str, listeners: int = 1, **how: Callable[[], None]) -> Daemon:
        daemon = Daemon(*arguments, **how)
        running.append(daemon)
        daemon.ready(listeners)
        return daemon

    yield run
    for daemon in running:
        daemon.process.kill()
        daemon.process.wait()
        assert daemon.process.stderr is not None
        daemon.process.stderr.close()


Start = Callable[..., Daemon]


@pytest.fixture
def disk(tmp_path: Path) -> str:
    return make_image(tmp_path / "disk")


def make_qcow2(path: Path, size: int = 8 * MIB) -> str:
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size))
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", str(path))
    return str(path)


def uri(path: str, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={path}"


# ---- life ----------------------------------------------------------------------------------------------
def test_it_ends_with_its_last_client(start: Start, runtime: Path, disk: str) -> None:
    path = str(runtime / "s")
    daemon = start("-f", "raw", "-e", "2", "-k", path, disk)
    with WireClient(path) as looking:  # who has chosen no export does not count
        assert looking.option(3)[-1] == (1, b"")
    one, two = WireClient(path), WireClient(path)
    for client in (one, two):
        assert client.go("")[-1] == (1, b"")
    one.sock.close()
    assert two.request(1, 0, 4, data=b"data") == 0
    two.send_request(2)
    two.sock.close()
    assert daemon.end() == 0
    assert Path(disk).read_bytes()[:4] == b"data"
    assert not os.path.exists(path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_persistent_until_a_signal(start: Start, runtime: Path, disk: str, number: int) -> None:
    path = str(runtime / "s")
    pid_file = runtime / "pid"
    daemon = start("-t", "-f", "raw", "-k", path, "--pid-file", str(pid_file), disk)
    for _ in range(2):
        assert "export-size: 1048576" in run_tool("nbdinfo", uri(path))
    with WireClient(path) as client:
        assert int(pid_file.read_text()) == daemon.process.pid
        client.go("")
        assert client.request(1, 0, 4, data=b"data") == 0
        assert daemon.end(number) == 0
    assert os.listdir(runtime) == []
    assert Path(disk).read_bytes()[:4] == b"data"


def test_fork(runtime: Path, disk: str) -> None:
    """The command returns when clients can connect; the child is the one in the pid file."""
    path, pid_file = str(runtime / "s"), runtime / "pid"
    assert nbd("--fork", "-f", "raw", "-k", path, "--pid-file", str(pid_file), disk) == ""
    pidfd = os.pidfd_open(int(pid_file.read_text()))
    with WireClient(path) as client:
        assert client.go("")[-1] == (1, b"")
        assert client.read(512, 4) == b"\1\0\0\0"
        client.send_request(2)
    assert select.select([pidfd], [], [], SECONDS)[0], "it outlives its last client"
    os.close(pidfd)
    assert os.listdir(runtime) == []


def test_fork_that_fails(runtime: Path, disk: str) -> None:
    path = str(runtime / "s")
    assert failure("--fork", "-k", path, "/none").startswith("/none: cannot be opened: No such file")
    assert "No such file" in failure("--fork", "-k", f"{runtime}/none/s", "-f", "raw", disk)
    assert "bitmap" in failure("--fork", "-k", path, "-B", "b0", "-f", "raw", disk)
    assert os.listdir(runtime) == []


def test_clients_beyond_n_wait(start: Start, runtime: Path, disk: str) -> None:
    path = str(runtime / "s")
    start("-t", "-f", "raw", "-k", path, disk)
    with WireClient(path) as first, socket.socket(socket.AF_UNIX) as second:
        assert first.go("")[-1] == (1, b"")
        second.connect(path)  # into the listener's queue
        second.setblocking(False)
        assert first.read(0, 512) == bytes(512)
        with pytest.raises(BlockingIOError):
            second.recv(1)
        first.send_request(2)
        assert select.select([second], [], [], SECONDS)[0]
        assert second.recv(8) == b"NBDMAGIC"


def test_multi_conn_is_offered_to_several_clients_only(start: Start, runtime: Path, disk: str) -> None:
    for number, (option, answer) in enumerate((("-e1", "false"), ("--shared=3", "true"), ("-e0", "true"))):
        path = str(runtime / f"s{number}")
        start("-r", "-f", "raw", option, "-k", path, disk)
        assert f"can_multi_conn: {answer}" in run_tool("nbdinfo", uri(path))


# ---- where it listens ----------------------------------------------------------------------------------
def families(port: int) -> set[str]:
    """Which addresses of this machine answer at a port."""
    found = set()
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as sock:
            sock.settimeout(SECONDS)
            try:
                sock.connect((host, port))
                assert sock.recv(8) == b"NBDMAGIC"
                found.add(host)
            except OSError:
                pass
    return found


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
        return True
    except OSError:
        return False


def test_tcp(start: Start, disk: str, tmp_path: Path) -> None:
    """Loopback unless told otherwise, in both families."""
    daemon = start("-t", "-e", "0", "-f", "raw", "-p", "0", disk)
    assert families(daemon.port) == ({"127.0.0.1", "::1"} if has_ipv6() else {"127.0.0.1"})
    copy = tmp_path / "copy"
    run_tool("nbdcopy", f"nbd://localhost:{daemon.port}", str(copy))
    assert copy.read_bytes() == Path(disk).read_bytes()
    run_tool("nbdcopy", str(copy), f"nbd://127.0.0.1:{daemon.port}/")
    listening = {tuple(line.split()[1].split(":")) for line in tcp_rows(daemon.port)}
    loopback = {"0100007F", "00000000000000000000000001000000"}
    assert {address for address, _ in listening} <= loopback


def tcp_rows(port: int) -> list[str]:
    """The listening sockets at a port, as proc(5) has them (/proc/net/tcp, tcp6)."""
    rows = []
    for name in ("tcp", "tcp6"):
        if os.path.exists(f"/proc/net/{name}"):
            rows += Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    return [row for row in rows if row.split()[1].endswith(f":{port:04X}") and row.split()[3] == "0A"]


def test_bind(start: Start, disk: str) -> None:
    daemon = start("-r", "-t", "-f", "raw", "-b", "127.0.0.1", "-p", "0", disk)
    assert families(daemon.port) == {"127.0.0.1"}
    daemon = start("-r", "-t", "-f", "raw", "-b", "0.0.0.0", "-p", "0", disk)
    assert [row.split()[1].split(":")[0] for row in tcp_rows(daemon.port)] == ["00000000"]


def test_several_listeners(start: Start, runtime: Path, disk: str) -> None:
    paths = [str(runtime / name) for name in ("a", "b")]
    daemon = start("-t", "-f", "raw", "-k", paths[0], "-k", paths[1], "-p", "0", disk, listeners=3)
    for place in (uri(paths[0]), uri(paths[1]), f"nbd://localhost:{daemon.port}"):
        assert "export-size" in run_tool("nbdinfo", place)


def test_a_place_that_is_taken(start: Start, runtime: Path, disk: str) -> None:
    path = str(runtime / "s")
    daemon = start("-t", "-r", "-f", "raw", "-k", path, "-p", "0", disk, listeners=2)
    assert failure("-r", "-f", "raw", "-k", path, disk) == f"{path}: is in use by another process"
    said = failure("-r", "-f", "raw", "-p", str(daemon.port), disk)
    assert said == f"localhost:{daemon.port}: cannot listen: Address already in use"
    daemon.process.kill()
    daemon.end()
    assert os.path.exists(path)  # and nobody listens there
    start("-t", "-r", "-f", "raw", "-k", path, disk)
    assert "export-size" in run_tool("nbdinfo", uri(path))


def test_sockets_that_are_handed_in(disk: str) -> None:
    """sd_listen_fds(3), as libnbd's programs start servers."""
    told = run_tool("nbdinfo", "--size", "--", "[", *ATOLL_NBD, "-r", "-f", "raw", disk, "]")
    assert told.strip() == "1048576"


def test_a_descriptor_that_is_no_socket(disk: str) -> None:
    text = 'exec 3<"$1"; shift; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
    said = run_tool("sh", "-c", text, "sh", disk, *ATOLL_NBD, "-r", "-f", "raw", disk, status=1)
    assert said == "atoll nbd: descriptor 3, which LISTEN_FDS names: Socket operation on non-socket\n"


# ---- what it serves ------------------------------------------------------------------------------------
def test_name_and_description(start: Start, runtime: Path, disk: str) -> None:
    path = str(runtime / "s")
    start("-t", "-r", "-f", "raw", "-x", "größe", "-D", "what it is", "-k", path, disk)
    told = run_tool("nbdinfo", "--list", uri(path))
    assert 'export="größe"' in told and "description: what it is" in told
    assert "is_read_only: true" in told
    assert "No such file or directory" in run_tool("nbdinfo", uri(path, "other"), status=1)
    with WireClient(path) as client:
        client.go("größe")
        assert client.request(1, 0, 1, data=b"x") == 1  # NBD_EPERM


def test_format_and_probing(start: Start, runtime: Path, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2")
    for number, (options, size) in enumerate(
        (((), 8 * MIB), (("-f", "qcow2"), 8 * MIB), (("-f", "raw"), os.stat(image).st_size))
    ):
        path = str(runtime / str(number))
        start("-r", *options, "-k", path, image)
        assert run_tool("nbdinfo", "--size", uri(path)).strip() == str(size)


def test_odd_sizes_of_raw_images(start: Start, runtime: Path, tmp_path: Path) -> None:
    odd = make_image(tmp_path / "odd", 1001, 7)
    path = str(runtime / "s")
    daemon = start("-f", "raw", "-k", path, odd)
    with WireClient(path) as client:
        client.go("")
        assert client.read(1000, 1) == b"\7" and client.request(1, 1000, 1, data=b"x") == 0
    assert daemon.end() == 0
    assert Path(odd).read_bytes() == b"\7" * 1000 + b"x"


def test_temporary_snapshot(start: Start, runtime: Path, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2")
    before = Path(image).read_bytes()
    path = str(runtime / "s")
    daemon = start("-t", "-s", "-k", path, image)
    script = ("-c", "write -P 9 0 64k", "-c", "flush", "-c", "read -P 9 0 64k", "-c", "read -P 1 64k 64k")
    assert "failed" not in run_tool("qemu-io", "-f", "raw", *script, uri(path))
    assert "read -P" not in run_tool("qemu-io", "-f", "raw", "-c", "read -P 9 0 64k", uri(path))
    assert daemon.end(signal.SIGTERM) == 0
    assert Path(image).read_bytes() == before


def test_internal_snapshots(start: Start, serve: Serve, runtime: Path, tmp_path: Path) -> None:
    """Beside qemu-nbd -l: the same bytes, in all spellings."""
    image = make_qcow2(tmp_path / "disk.qcow2")
    for number, name in enumerate(("one", "2"), start=2):
        run_tool("qemu-img", "snapshot", "-c", name, image)
        run_tool("qemu-io", "-f", "qcow2", "-c", f"write -P {number} 512k 1M", image)
    assert "cannot" not in run_tool("qemu-img", "check", image)
    # "2" is both the name of the second snapshot and its id; "1" is the id of the first
    for number, (wish, byte) in enumerate(
        [("one", 1), ("1", 1), ("2", 2), ("snapshot.id=2", 2), ("snapshot.name=one", 1),
         ("snapshot.id=1,snapshot.name=one", 1)]
    ):  # fmt: skip
        if number:  # the same without the command
            path = serve(Export("", image, "qcow2", load_snapshot=wish))
        else:
            path = str(runtime / "s")
            start("-t", "-l", wish, "-k", path, image)
        told = run_tool("qemu-io", "-r", "-f", "raw", "-c", f"read -P {byte} 512k 512k", uri(path))
        assert "verification failed" not in told and "error" not in told
        assert "is_read_only: true" in run_tool("nbdinfo", uri(path))
        other = str(runtime / f"qemu{number}")
        run_tool("qemu-nbd", "-r", "-f", "qcow2", "-l", wish, "-k", other, "--fork", image)
        assert "identical" in run_tool("qemu-img", "compare", "-f", "raw", "-F", "raw", uri(path), uri(other))
    assert "there is no snapshot" in failure("-l", "3", "-k", str(runtime / "t"), image)
    for wish in ("snapshot.id=1,snapshot.name=2", "snapshot.name=1"):
        with pytest.raises(BlockError, match="there is no snapshot"):
            open_image(Export("", image, "qcow2", load_snapshot=wish))
    with pytest.raises(BlockError, match="no snapshots"):
        open_image(Export("", make_image(tmp_path / "raw"), load_snapshot="1"))


def test_bitmap(start: Start, runtime: Path, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "bitmap", "--add", image, "b0")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", image)
    path = str(runtime / "s")
    start("-t", "-r", "-B", "b0", "-k", path, image)
    told = run_tool("nbdinfo", "--map=qemu:dirty-bitmap:b0", uri(path))
    assert [line.split()[:3] for line in told.splitlines()][1] == ["1048576", "65536", "1"]


@pytest.mark.parametrize("mode", [None, "ignore", "unmap"])
def test_discard(start: Start, runtime: Path, tmp_path: Path, mode: str | None) -> None:
    file = make_image(tmp_path / "disk", MIB, 7)
    path = str(runtime / "s")
    options = () if mode is None else (f"--discard={mode}",)
    daemon = start("-f", "raw", *options, "-k", path, file)
    assert "failed" not in run_tool("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 0 64k", uri(path))
    assert daemon.end() == 0
    expected = bytes(65536) if mode == "unmap" else b"\7" * 65536
    assert Path(file).read_bytes() == expected + b"\7" * (MIB - 65536)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_full_disk(start: Start, runtime: Path, tmp_path: Path, image_format: str) -> None:
    """A client is told that there is no space; the server and what was there live on. A limit on the file's
    size stands for the disk (setrlimit(2), RLIMIT_FSIZE)."""
    file = str(tmp_path / "disk")
    run_tool("qemu-img", "create", "-q", "-f", image_format, file, str(256 * MIB))
    start_size = 4 * MIB

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (start_size, start_size))

    path = str(runtime / "s")
    daemon = start("-t", "-f", image_format, "-k", path, file, before=limit)
    with WireClient(path) as client:
        client.go("")
        errors = [client.request(1, at * MIB, MIB, data=b"x" * MIB) for at in range(0, 250, 10)]
        assert errors[-1] == 28 and set(errors) <= {0, 28}  # NBD_ENOSPC
        written = errors.index(28)
        for number in range(written):
            assert client.read(number * 10 * MIB, MIB) == b"x" * MIB
        assert client.request(3) == 0
    assert daemon.end(signal.SIGTERM) == 0
    if image_format == "qcow2":
        assert run_tool("qemu-img", "check", file, status=None).count("ERROR") == 0


# ---- what it refuses -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "exactly one FILE"),
        (("a", "b"), "exactly one FILE"),
        (("-L", "a"), "takes no FILE"),
        (("--bogus", "f"), "unrecognized arguments: --bogus"),
        (("-p", "99999", "f"), "a port is a number"),
        (("-p", "x", "f"), "a port is a number"),
        (("-e", "-1", "f"), "no number of clients"),
        (("-e", "x", "f"), "no number of clients"),
        (("-f", "vmdk", "f"), "unknown (known: raw, qcow2)"),
        (("--cache=fast", "f"), "invalid choice"),
        (("--detect-zeroes=unmap", "f"), "needs --discard=unmap"),
        (("--discard=maybe", "f"), "invalid choice"),
        (("-s", "-l", "1", "f"), "cannot be combined"),
        (("-B", "b", "-l", "1", "f"), "cannot be combined"),
        (("-c", "/dev/nbd0", "f"), "nbd-client"),
        (("--offset=512", "f"), "not supported"),
        (("-x", "x" * 4097, "f"), "too long for NBD"),
        (("-D", "x" * 4097, "f"), "too long for NBD"),
        (("-x", "\udcff", "f"), "is no UTF-8"),
        (("--tls-creds", "tls0", "f"), "neither the id of an --object nor a folder"),
        (("--object", "secret,id=s", "f"), "--object secret"),
        (("--object", "tls-creds-x509,id=t", "f"), "needs id= and dir="),
        (("--object", "tls-creds-x509,id=t,dir=/x,endpoint=client", "f"), "endpoint=server"),
        (("--object", "tls-creds-x509,id=t,dir=/x,colour=red", "f"), "unknown property"),
    ],
)
def test_options_that_are_wrong(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert command.run(list(arguments)) == 1
    said = capsys.readouterr().err
    assert said.startswith("atoll nbd: ") and said.count("\n") == 1 and words in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--object", "tls-creds-x509,id=t,dir=.,endpoint=server", "--tls-creds", "t"), "server-cert.pem"),
        (("--pid-file", "/none/pid"), "/none/pid: cannot be written: No such file"),
        (("--pid-file", "/dev/full"), "/dev/full: cannot be written: No space left"),
        (("-f", "qcow2"), "qcow2"),
        (("-B", "b0"), "have no bitmaps"),
        (("-b", "x" * 70), "cannot listen: it is no name"),
        (("-b", "192.0.2.1"), "cannot listen: Cannot assign requested address"),
    ],
)
def test_what_stands_in_the_way(
    runtime: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    disk = make_image(tmp_path / "disk", 4096, 7)
    where = () if "-b" in arguments else ("-k", str(runtime / "s"))
    assert words in failure("-r", *where, *arguments, disk)
    assert os.listdir(runtime) == []


def test_an_image_that_somebody_writes(start: Start, runtime: Path, disk: str) -> None:
    start("-t", "-f", "raw", "-k", str(runtime / "a"), disk)
    assert "is locked" in failure("-r", "-f", "raw", "-k", str(runtime / "b"), "--", disk)
    assert "/-r: cannot be opened" in failure("-k", str(runtime / "b"), "--", "-r")


def test_help_and_version() -> None:
    text = nbd("--help")
    for option in ("--persistent", "--shared", "--socket", "--port", "--bind", "--export-name", "--read-only",
                   "--format", "--description", "--snapshot", "--load-snapshot", "--bitmap", "--fork",
                   "--pid-file", "--tls-creds", "--object", "--list", "--discard", "--cache"):  # fmt: skip
        assert option in text
    assert re.fullmatch(r"atoll nbd \d+\.\d+\.\d+\n", nbd("--version"))


# ---- listing -------------------------------------------------------------------------------------------
def same_listing(*where: str) -> str:
    ours, theirs = nbd("-L", *where), run_tool("qemu-nbd", "-L", *where)
    assert ours == theirs
    return ours


def test_list_our_server(start: Start, runtime: Path, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2")
    run_tool("qemu-img", "bitmap", "--add", image, "b0")
    path = str(runtime / "s")
    options = ("-e", "3", "-B", "b0", "-D", "a disk", "-x", "x")
    daemon = start("-t", *options, "-k", path, "-p", "0", image, listeners=2)
    listed = same_listing("-k", path)
    assert "multi" in listed and "a disk" in listed and "qemu:dirty-bitmap:b0" in listed
    same_listing("-b", "localhost", "-p", str(daemon.port))


def test_list_other_servers(runtime: Path, disk: str) -> None:
    theirs = str(runtime / "qemu")
    run_tool("qemu-nbd", "-t", "-r", "-f", "raw", "-D", "theirs", "-k", theirs, "--fork", "--pid-file",
             str(runtime / "pid"), disk)  # fmt: skip
    try:
        assert "theirs" in same_listing("-k", theirs)
    finally:
        run_tool("kill", (runtime / "pid").read_text().strip())
    other = str(runtime / "kit")
    run_tool("nbdkit", "-P", str(runtime / "kit.pid"), "-U", other, "memory", "1M")
    try:
        assert "exports available: 1" in same_listing("-k", other)
    finally:
        run_tool("kill", (runtime / "kit.pid").read_text().strip())


def test_list_nobody(runtime: Path) -> None:
    path = str(runtime / "s")
    assert failure("-L", "-k", path) == f"cannot connect to {path}: No such file or directory"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        said = failure("-L", "-b", "127.0.0.1", "-p", str(port))
    assert said == f"cannot connect to 127.0.0.1:{port}: Connection refused"


def test_tls(start: Start, disk: str, certificates: Certificates, tmp_path: Path) -> None:
    """Credentials as qemu-nbd wants them, for serving and for listing; ours and QEMU's with one another."""
    server = f"tls-creds-x509,id=tls0,endpoint=server,dir={certificates.server}"
    client = f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates.client}"
    daemon = start("-t", "-r", "-f", "raw", "--object", server, "--tls-creds", "tls0", "-p", "0", disk)
    where = ("-b", "localhost", "-p", str(daemon.port))
    assert "insists on TLS" in failure("-L", *where)
    listed = same_listing(*where, "--object", client, "--tls-creds", "tls0")
    assert "exports available: 1" in listed
    assert nbd("-L", *where, "--tls-creds", str(certificates.client)) == listed
    named = ("-b", "127.0.0.1", "-p", str(daemon.port), "--tls-creds", str(certificates.client))
    assert nbd("-L", *named, "--tls-hostname", "localhost") == listed
    assert "TLS" in failure("-L", *named, "--tls-hostname", "elsewhere")
    assert "localhost" in failure("-L", *where, "--tls-creds", str(certificates.stranger))
    open_to_all = f"{server},verify-peer=off"
    daemon = start("-t", "-r", "-f", "raw", "--object", open_to_all, "--tls-creds", "tls0", "-p", "0", disk)
    place = f"nbds://localhost:{daemon.port}/?tls-certificates={certificates.anonymous}"
    assert "with TLS" in run_tool("nbdinfo", place)


def test_tls_of_qemu_nbd(runtime: Path, disk: str, certificates: Certificates) -> None:
    server = f"tls-creds-x509,id=tls0,endpoint=server,dir={certificates.server}"
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    run_tool("qemu-nbd", "-t", "-r", "-f", "raw", "--object", server, "--tls-creds", "tls0",
             "-b", "127.0.0.1", "-p", port, "--fork", "--pid-file", str(runtime / "pid"), disk)  # fmt: skip
    try:
        listed = nbd("-L", "-b", "127.0.0.1", "-p", port, "--tls-creds", str(certificates.client))
        assert "exports available: 1" in listed
        said = failure("-L", "-b", "127.0.0.1", "-p", port, "--tls-creds", str(certificates.anonymous))
        assert "127.0.0.1" in said
        assert "TLS" in failure("-L", "-b", "127.0.0.1", "-p", port)
    finally:
        run_tool("kill", (runtime / "pid").read_text().strip())
