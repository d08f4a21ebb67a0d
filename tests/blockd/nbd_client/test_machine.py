"""A machine whose disk is an export of nbdkit."""

from pathlib import Path

from tests.blockd.nbd_client.conftest import Start
from tests.blockd.nbd_client.script import name
from tests.support import bare
from tests.support.launch import Launcher
from tests.system.test_guests_cpu import pattern_disk


def test_a_guest_reads_and_writes_it(nbdkit: Start, launcher: Launcher, tmp_path: Path) -> None:
    uri = name(nbdkit("file", str(pattern_disk(tmp_path / "disk"))))
    drive = ["-drive", f"file={uri},format=raw,if=ide,index=0"]
    with bare.start(launcher, tmp_path, "legacy", 2, drive) as guest:
        assert bare.failures(guest) == []
