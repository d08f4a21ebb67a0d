"""The builders of guest pieces, against other implementations where there are any."""

import gzip
import io
import struct
import subprocess
from pathlib import Path

import pycdlib
import pytest

from coordinator import pieces
from coordinator.lab import cpio, modules, product
from tests.support import iso, products
from tests.support.launch import Guest, GuestError, Launcher


def archive() -> bytes:
    made = cpio.Archive()
    made.file("a/b/hello", b"hello", 0o755)
    made.symlink("a/link", "b/hello")
    made.device("dev/console", 5, 1)
    made.file("a/odd", b"123")
    return made.finish()


def test_cpio_headers_follow_the_format() -> None:
    data, offset, names = archive(), 0, []
    while offset < len(data):
        assert data[offset : offset + 6] == b"070701" and offset % 4 == 0
        fields = [int(data[offset + 6 + 8 * i : offset + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        name = data[offset + 110 : offset + 110 + name_size]
        assert name.endswith(b"\0")
        names.append(name[:-1].decode())
        body = offset + 110 + name_size + -(110 + name_size) % 4
        if names[-1] == "a/odd":
            assert data[body : body + size] == b"123"
        offset = body + size + -size % 4
    assert names == ["a", "a/b", "a/b/hello", "a/link", "dev", "dev/console", "a/odd", "TRAILER!!!"]


def test_another_cpio_reads_it() -> None:
    command = [str(pieces.busybox()), "cpio", "-t"]
    listed = subprocess.run(command, input=archive(), capture_output=True, check=True)
    assert listed.stdout.split() == [b"a", b"a/b", b"a/b/hello", b"a/link", b"dev", b"dev/console", b"a/odd"]


def test_modules_load_after_what_they_need(tmp_path: Path) -> None:
    folder = tmp_path / "kernel/drivers"
    folder.mkdir(parents=True)
    needs = {"top": "middle,base", "middle": "base,inside", "base": "", "unwanted": ""}
    for name, depends in needs.items():
        (folder / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0x")
    (tmp_path / "modules.builtin").write_text("kernel/lib/inside.ko\n")
    assert [name for name, _ in modules.load_order(tmp_path, ["top"])] == ["base", "middle", "top"]
    with pytest.raises(KeyError, match="absent"):
        modules.load_order(tmp_path, ["absent"])


def test_initramfs_has_the_drivers_in_order() -> None:
    order = [name for name, _ in modules.load_order(pieces.modules_dir(), products.CD_MODULES)]
    for before, after in (("libata", "ata_piix"), ("scsi_mod", "libata"), ("cdrom", "sr_mod")):
        assert order.index(before) < order.index(after)
    with gzip.open(products.initramfs()) as file:
        assert file.read(6) == cpio.MAGIC


def test_iso_is_bootable_and_holds_the_payload(tmp_path: Path) -> None:
    inputs = {}
    for name in ("isolinux", "ldlinux", "kernel", "initrd"):
        inputs[name] = tmp_path / name
        inputs[name].write_bytes(name.encode() * 1000)
    path = tmp_path / "x.iso"
    iso.build(path, **inputs, command_line="console=ttyS0 a=b", payload_bytes=100_000, seed=7)
    data = path.read_bytes()
    assert len(data) % iso.SECTOR == 0
    # El Torito 1.0: boot record in sector 17, its catalogue's address at 47h; the validation entry
    # sums to zero and ends in 55h AAh; the initial entry is bootable (88h), no emulation (0).
    record = data[17 * 2048 : 18 * 2048]
    assert record[:6] == b"\0CD001" and record[7:30] == b"EL TORITO SPECIFICATION"
    catalogue = data[struct.unpack_from("<I", record, 0x47)[0] * 2048 :][:64]
    assert sum(struct.unpack("<16H", catalogue[:32])) & 0xFFFF == 0 and catalogue[30:32] == b"\x55\xaa"
    media, sectors, lba = catalogue[33], *struct.unpack_from("<HI", catalogue, 38)
    assert (catalogue[32], media, sectors) == (0x88, 0, 4)
    # The boot information table that ISOLINUX reads: at 8 the descriptor's sector, the image's, its length.
    table = struct.unpack_from("<III", data, lba * 2048 + 8)
    assert table == (16, lba, len("isolinux") * 1000)
    image = pycdlib.PyCdlib()
    image.open(str(path))
    out = io.BytesIO()
    image.get_file_from_iso_fp(out, iso_path="/ISOLINUX/ISOLINUX.CFG;1")
    assert b"append console=ttyS0 a=b\n" in out.getvalue()
    out = io.BytesIO()
    image.get_file_from_iso_fp(out, iso_path="/PAYLOAD.BIN;1")
    assert len(out.getvalue()) == 100_000
    image.close()


def test_product_is_built_once_and_named_by_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = []

    def build(path: Path) -> None:
        built.append(path)
        path.write_bytes(b"x")

    first = products.product("thing.bin", ["a", b"b"], build)
    assert products.product("thing.bin", ["a", b"b"], build) == first and len(built) == 1
    assert products.product("thing.bin", ["ab", b""], build) != first
    for number in range(10):
        last = products.product("thing.bin", [str(number)], build)
    assert last in (kept := list(last.parent.iterdir())) and len(kept) == product.KEEP


def test_guest_that_ends_or_hangs_is_told(tmp_path: Path) -> None:
    launcher = Launcher.parse("sh -c 'echo one; echo two; echo why >&2; exit 3' sh")
    with Guest(launcher, [], tmp_path / "log") as guest:
        assert guest.expect("^t(wo)$")[1] == "wo"
        with pytest.raises(GuestError, match="ended before 'three'; last line: two; stderr: why"):
            guest.expect("three")
        assert guest.wait() == 3
    with Guest(Launcher.parse("sleep 100"), [], tmp_path / "log") as guest:
        with pytest.raises(GuestError, match="silent"):
            guest.expect("x", silence=0.01)
    with pytest.raises(GuestError, match="cannot start /nowhere"):
        Guest(Launcher.parse("/nowhere"), [], tmp_path / "log")


def test_only_our_launcher_is_asked_for_statistics(tmp_path: Path) -> None:
    assert Launcher.parse(None).options(tmp_path / "s") == ["-stats", str(tmp_path / "s")]
    assert Launcher.parse("qemu-system-x86_64 -accel tcg").options(tmp_path / "s") == []
