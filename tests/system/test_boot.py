"""Whole boots: the demo's CD through the firmware, and the same kernel without one."""

import json
from pathlib import Path

import pytest

from coordinator import pieces
from tests.support import products
from tests.support.launch import Launcher
from tests.system import boots, demo, judge

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]


def test_demo_cd_boots_through_the_firmware(launcher: Launcher, tmp_path: Path) -> None:
    image = products.demo_iso()
    guest, status = demo.boot(launcher, image, tmp_path, demo.Progress())
    assert judge.verdict(
        guest,
        sha256=products.sha256_of(image), cd_bytes=image.stat().st_size, cpus=demo.CPUS,
        release=pieces.modules_dir().name, exit_status=status,
    ) == []


@pytest.mark.parametrize("cpus", [1, 2, 4])
def test_kernel_boots_without_firmware_and_reads_the_cd(
    launcher: Launcher, tmp_path: Path, cpus: int
) -> None:
    image = products.demo_iso(payload_bytes=8 << 20, name="small")
    options = [*boots.kernel_options("atoll.demo=hash"), "-cdrom", str(image), "-no-reboot"]
    with boots.start(launcher, tmp_path, options, cpus) as guest:
        facts = boots.finish(guest)
    assert facts.number("nproc") == cpus
    assert facts.marks["sha256"] == products.sha256_of(image)
    assert "DMA" in facts.marks["dma"]


#: the issue's bound on a boot to init, of which QEMU's machine makes 185,000 device accesses
MOST_ROUND_TRIPS = 6000


def test_boot_to_init_makes_few_round_trips(launcher: Launcher, tmp_path: Path) -> None:
    """Counted in the segment by device; what is not a round trip is posted, or answered in the vCPU."""
    if not launcher.ours:
        pytest.skip("counters of our own")
    options = [*boots.kernel_options("atoll.demo=poweroff"), "-no-reboot"]
    with boots.start(launcher, tmp_path, options) as guest:
        boots.finish(guest)
    stats = json.loads((tmp_path / "stats.json").read_text())
    trips = stats["roundtrips"]
    assert 0 < sum(trips.values()) <= MOST_ROUND_TRIPS, trips
    uart = stats["accesses"]["serial0"]
    assert uart["posted"] > 1000 and uart["shadow"] > 1000, uart
    assert stats["devhost"]["posted_served"] >= uart["posted"]
