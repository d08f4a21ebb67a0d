"""URIs, keys, parameters, faults and descriptions of migrations."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from coordinator.contract.errors import AtollError, ConfigError, MigrationError, UsageError
from coordinator.migrate import describe, faults, keys, uri
from coordinator.migrate.describe import Description, DriveDescription, Medium
from coordinator.migrate.faults import Fault
from coordinator.migrate.link import Listener
from coordinator.migrate.parameters import Parameters


# ---- URIs: QEMU's manual, -incoming ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "endpoint", "local"),
    [
        ("tcp:localhost:4444", "tcp://localhost:4444", True),
        ("tcp:127.0.0.1:0", "tcp://127.0.0.1:0", True),
        ("tcp::4444", "tcp://127.0.0.1:4444", True),
        ("tcp:[::1]:4444", "tcp://[::1]:4444", True),
        ("tcp:0:4444", "tcp://0:4444", False),
        ("tcp:0.0.0.0:4444", "tcp://0.0.0.0:4444", False),
        ("tcp:[::]:65535", "tcp://[::]:65535", False),
        ("tcp:example.org:1,insecure=on", "tcp://example.org:1", False),
        ("unix:/a b/c,d:e", "ipc:///a b/c,d:e", True),
    ],
)
def test_uris(text: str, endpoint: str, local: bool) -> None:
    parsed = uri.parse(text)
    assert (parsed.endpoint, parsed.local) == (endpoint, local)
    assert parsed.insecure == text.endswith("insecure=on")


def test_a_relative_path_is_made_absolute() -> None:
    assert uri.parse("file:x y").path == str(Path.cwd() / "x y")


@pytest.mark.parametrize(
    "text",
    ["", "tcp", "tcp:", "tcp:host", "tcp:host:", "tcp:host:x", "tcp:host:-1", "tcp:host:65536",
     "tcp:host:1,x=y",
     "tcp:host:\u0661", "unix:", "file:", "exec:cat", "fd:3", "rdma:host:1", "\0"],
)  # fmt: skip
def test_no_uris(text: str) -> None:
    with pytest.raises(UsageError, match="tcp:HOST:PORT, unix:PATH, file:PATH"):
        uri.parse(text)


def test_names_are_resolved_to_ipv4_first() -> None:
    assert uri.parse("tcp:localhost:1").resolved().host == "127.0.0.1"
    with pytest.raises(MigrationError):
        uri.parse("tcp:" + "x" * 300 + ":1").resolved()


# ---- keys -----------------------------------------------------------------------------------------------
@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "atoll" / "migration"


def test_a_pair_is_made_once_and_private(config: Path) -> None:
    pair = keys.own()
    assert keys.own() == pair
    assert zmq.curve_public(pair.secret) == pair.public
    assert (config / "key.pub").read_bytes().strip() == pair.public
    assert (config / "key").stat().st_mode & 0o777 == 0o600
    assert config.stat().st_mode & 0o777 == 0o700


def test_two_processes_make_it_at_once(config: Path) -> None:
    code = "from coordinator.migrate import keys; print(keys.own().public.decode())"
    racing = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)]
    said = {process.communicate()[0] for process in racing}
    assert said == {keys.own().public + b"\n"} == {(config / "key.pub").read_bytes()}
    assert sorted(path.name for path in config.iterdir()) == ["key", "key.pub", "peers"]


@pytest.mark.parametrize("junk", [b"", b"short", b"\xff" * 40, b"x" * 41, b"~" * 40, b"\0" * 40])
def test_a_bad_key_is_named(config: Path, junk: bytes) -> None:
    (config / "peers").mkdir(parents=True)
    (config / "key").write_bytes(junk)
    with pytest.raises(MigrationError, match="key: is no key of 40 characters"):
        keys.own()
    (config / "peers" / "there.pub").write_bytes(junk)
    with pytest.raises(MigrationError, match="there.pub: is no key"):
        keys.of_host("there", local=False)


def test_keys_of_hosts(config: Path) -> None:
    with pytest.raises(MigrationError, match="no key of there is known: copy its .* to .*there.pub here"):
        keys.of_host("there", local=False)
    assert keys.of_host("localhost", local=True) == keys.own().public
    other, _ = zmq.curve_keypair()
    (config / "peers" / "there.pub").write_bytes(other)
    assert keys.of_host("there", local=False) == other


def test_listening_beyond_this_host_wants_keys(config: Path) -> None:
    with pytest.raises(MigrationError, match="other hosts could reach it.*insecure=on"):
        Listener(uri.parse("tcp:0.0.0.0:0"))


# ---- parameters and faults ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "values",
    [{"multifd-channels": 0}, {"multifd-channels": 17}, {"multifd-channels": True},
     {"multifd-compression": "zlib"},
     {"multifd-zstd-level": 0}, {"multifd-zstd-level": 21}, {"stopped-time": "flies"}, {"x-data-port": 65536},
     {"tls-creds": 5}, {"unknown": 1}, {"x-fault": "x"}, {"x-fault": "stop=bang"}],
)  # fmt: skip
def test_parameters_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        Parameters().changed(values)
    assert "\n" not in str(caught.value)


def test_parameters_change_one_by_one() -> None:
    changed = Parameters().changed({"multifd-channels": 4}).changed({"stopped-time": "passes"})
    assert changed.as_dict() == Parameters().as_dict() | {"multifd-channels": 4, "stopped-time": "passes"}


@pytest.mark.parametrize("point", faults.POINTS)
def test_faults(point: str) -> None:
    assert Fault.parse(f"{point}=kill") == Fault(point, "kill")
    assert Fault.parse(f"{point}=delay:30") == Fault(point, "delay", 30)


@pytest.mark.parametrize(
    "text", ["stop", "=kill", "stop=", "stop=delay", "stop=delay:", "stop=delay:x", "stop=kill:3",
             "stop=lose", "no=kill"]
)  # fmt: skip
def test_no_faults(text: str) -> None:
    with pytest.raises(AtollError, match="x-fault"):
        Fault.parse(text)


# ---- what must be alike ---------------------------------------------------------------------------------
CD = DriveDescription("cd", 2, "cdrom", "QM3", Medium(4096, "abc", False))
DISK = DriveDescription("disk", 0, "disk", "QM1", Medium(1 << 30, "", True))
ONE = Description(
    "one", "Atoll 0", {"vcpus": 1, "vga": True}, {"1.ecx": 5}, 1_000_000, 1 << 20, 1 << 16, "rom", (DISK, CD)
)


def drive(which: DriveDescription, **fields: Any) -> dict[str, Any]:
    other = msgspec.structs.replace(which, **fields)
    return {"drives": tuple(other if d.id == which.id else d for d in ONE.drives)}


def test_what_need_not_be_alike() -> None:
    assert describe.differences(ONE, ONE) == []
    assert describe.differences(ONE, msgspec.structs.replace(ONE, name="two", product="Atoll 9")) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"machine": {"vcpus": 2, "vga": True}}, "vcpus: source 1, target 2"),
        ({"machine": {"vcpus": 1}}, "vga: source True, target unknown"),
        ({"features": {"1.ecx": 7}}, "CPU feature word 1.ecx: source 0x5, target 0x7"),
        ({"features": {}}, "CPU feature word 1.ecx: source 0x5, target 0x0"),
        ({"tsc_khz": 5}, "TSC frequency (kHz): source 1000000, target 5"),
        ({"ram": 5}, "memory (bytes): source 1048576, target 5"),
        ({"vram": 5}, "video memory (bytes): source 65536, target 5"),
        ({"rom": "x"}, "firmware or option ROMs: their contents differ"),
        ({"drives": (DISK,)}, "drive cd: only the source has it"),
        ({"drives": (DISK, CD, msgspec.structs.replace(CD, id="x"))}, "drive x: only the target has it"),
        (drive(CD, index=3), "drive cd: index: source 2, target 3"),
        (drive(CD, media="disk"), "drive cd: media: source cdrom, target disk"),
        (drive(CD, serial="x"), "drive cd: serial: source QM3, target x"),
        (drive(CD, medium=None), "drive cd: the source alone has a medium"),
        (drive(CD, medium=Medium(5, "abc", False)), "drive cd: size (bytes): source 4096, target 5"),
        (drive(CD, medium=Medium(4096, "x", False)), "drive cd: another medium (the contents differ)"),
        (drive(DISK, medium=Medium(1 << 30, "", False)), "drive disk: writable: source True, target False"),
    ],
)
def test_differences_by_name(fields: dict[str, Any], text: str) -> None:
    assert describe.differences(ONE, msgspec.structs.replace(ONE, **fields)) == [text]
