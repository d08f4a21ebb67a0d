"""A machine that boots from an export of nbdkit, and writes to it."""

from pathlib import Path

from tests.blockd.nbd_client.conftest import Start
from tests.blockd.nbd_client.script import name
from tests.support import bare
from tests.support.launch import Launcher

SECTOR = 512
#: reads sector 1 by the firmware (INT 13h, AH=02h), writes it to sector 2 (AH=03h), and ends the machine with
#: status 10h at the debug port
BOOT = bytes.fromhex(
    "31c0 8ec0"  # xor %ax,%ax; mov %ax,%es
    "b80102 bb0080 b90200 b600 cd13"  # AX=0201h, ES:BX=0:8000h, cylinder 0, sector 2, head 0
    "b80103 b90300 b600 cd13"  # AX=0301h, sector 3
    "baf400 b010 ee"  # out %al,$0xf4
    "f4 ebfd"  # hlt, for ever
)


def test_it_boots_and_writes(nbdkit: Start, launcher: Launcher, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    sectors = BOOT.ljust(510, b"\0") + b"\x55\xaa" + b"over nbd".ljust(SECTOR, b".")
    disk.write_bytes(sectors.ljust(1 << 20, b"\0"))
    uri = name(nbdkit("file", str(disk)))
    drive = ["-drive", f"file={uri},format=raw,if=ide,index=0", "-m", "64", "-boot", "c", "-no-reboot"]
    with bare.start_firmware(launcher, tmp_path, "boot", drive) as guest:
        assert bare.failures(guest) == []
    assert disk.read_bytes() == (sectors + sectors[SECTOR:]).ljust(1 << 20, b"\0")
