"""Guest pieces: where they are looked for, and how apt's answers are handled (with an apt of our own)."""

import os
import stat
from pathlib import Path

import pytest

from coordinator import pieces

APT = """\
#!/bin/sh
# Knows one old list until "update" has put another where -o Dir::State::Lists says.
while [ "$1" = -o ] || [ "$1" = -q ]; do
    case $2 in Dir::State::Lists=*) lists=${2#*=} ;; esac
    [ "$1" = -o ] && shift
    shift
done
echo "$0 $*" >>"$LOG"
case $1 in
pkgnames) echo seabios; for n in 6.1.0-9 6.12.1 6.1.0-10 6.1.0-99; do
    echo linux-image-$n-cloud-amd64-unsigned; done ;;
madison) shift; for name; do case $name in *-99-*) ;; *) echo "$name | 1.0 | source" ;; esac; done ;;
update) touch "$lists/fresh" ;;
download) if [ -n "$lists" ] && [ -e "$lists/fresh" ]; then touch "$2_1.0_all.deb"; else
    echo "E: Failed to fetch: 404 Not Found" >&2; exit 100; fi ;;
esac
"""
UNPACK = """\
#!/bin/sh
case $2 in
*seabios*) mkdir -p "$3/usr/share/seabios" && cd "$3/usr/share/seabios" &&
    touch bios-256k.bin vgabios-stdvga.bin ;;
*) mkdir -p "$3/boot" "$3/lib/modules/6.1.0-10/kernel" && touch "$3/boot/vmlinuz-6.1.0-10" ;;
esac
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of our own and an apt that is a script."""
    (tmp_path / "bin").mkdir()
    for name, text in (("apt-get", APT), ("apt-cache", APT), ("dpkg-deb", UNPACK)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setattr(pieces, "PACKAGES", (pieces.SEABIOS, pieces.LINUX))
    monkeypatch.setattr(pieces, "SYSTEM_FIRMWARE", (tmp_path / "system",))
    return tmp_path


def test_fetch_updates_stale_lists_and_takes_the_newest_offered(world: Path) -> None:
    said: list[str] = []
    pieces.fetch(said.append)
    assert pieces.kernel().name == "vmlinuz-6.1.0-10"
    assert pieces.modules_dir().name == "6.1.0-10"
    assert pieces.firmware("bios-256k.bin").is_relative_to(world / "cache")
    log = (world / "log").read_text()
    assert "download linux-image-6.1.0-10-cloud-amd64-unsigned" in log
    assert log.count("apt-get update") == 1
    assert not [path for path in pieces.pieces_dir().iterdir() if path.name.startswith(".")]
    before = log
    pieces.fetch(said.append)
    assert (world / "log").read_text() == before, "what is there is not fetched again"


def test_damage_is_noticed_and_mended(world: Path) -> None:
    pieces.fetch(lambda line: None)
    pieces.kernel().write_bytes(b"half")
    assert pieces.missing() == [pieces.LINUX]
    pieces.fetch(lambda line: None)
    assert pieces.missing() == [] and pieces.kernel().read_bytes() == b""


def test_firmware_of_the_system_serves_without_a_cache(world: Path) -> None:
    with pytest.raises(pieces.PieceError, match="bios.bin not found: run `make setup`, or .* seabios"):
        pieces.firmware("bios.bin")
    (world / "system").mkdir()
    (world / "system/bios.bin").touch()
    assert pieces.firmware("bios.bin") == world / "system/bios.bin"


def test_errors_are_one_line(world: Path) -> None:
    with pytest.raises(pieces.PieceError, match="^linux-image is not in .*: run `make setup`$"):
        pieces.kernel()
    (world / "bin/dpkg-deb").write_text("#!/bin/sh\necho broken archive >&2\nexit 2\n")
    with pytest.raises(pieces.PieceError, match="^cannot unpack seabios_1.0_all.deb: broken archive$"):
        pieces.fetch(lambda line: None)


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert pieces.cache_dir() == Path.home() / ".cache/atoll"
