"""Reset by each way there is, in the middle of a DMA, and then a second whole boot."""

from pathlib import Path

import pytest
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.support import products
from tests.support.launch import Guest, Launcher
from tests.system import boots

pytestmark = [pytest.mark.boot, pytest.mark.timeout(1500)]

# Way, further words for the kernel. `kernel` has Linux restart the machine: with reboot=t by a triple
# fault, without by the reset register that the ACPI tables name.
WAYS = [("cf9", ""), ("92", ""), ("kbd", ""), ("kernel", "reboot=t"), ("kernel", "")]


def second_boot(guest: Guest, image: Path) -> None:
    guest.expect("^atoll: init ", silence=boots.SILENCE_SECONDS)
    guest.expect("^atoll: boot 2", silence=boots.SILENCE_SECONDS)
    facts = boots.finish(guest)
    assert facts.marks["sha256"] == products.sha256_of(image)
    assert facts.number("nproc") == 2


@pytest.mark.parametrize(("way", "words"), WAYS)
def test_guest_resets_itself(launcher: Launcher, tmp_path: Path, way: str, words: str) -> None:
    image = products.demo_iso(payload_bytes=8 << 20, name="small")
    options = [*boots.kernel_options(f"atoll.demo=reset atoll.way={way} {words}"), "-cdrom", str(image)]
    with boots.start(launcher, tmp_path, options) as guest:
        guest.expect(f"^atoll: resetting by {way}", silence=boots.SILENCE_SECONDS)
        second_boot(guest, image)


def test_host_resets_by_qmp_and_the_firmware_boots_again(launcher: Launcher, tmp_path: Path) -> None:
    image = products.demo_iso("atoll.demo=reset atoll.way=host", payload_bytes=8 << 20, name="reset")
    socket = tmp_path / "qmp"
    options = ["-cdrom", str(image), "-boot", "d", "-qmp", f"unix:{socket},server=on,wait=off"]
    with boots.start(launcher, tmp_path, options) as guest:
        guest.expect("^atoll: resetting by host", silence=boots.SILENCE_SECONDS)
        monitor = QEMUMonitorProtocol(str(socket))
        monitor.connect()
        try:
            monitor.cmd("system_reset")
            second_boot(guest, image)
            assert [event["event"] for event in monitor.get_events()][0] == "RESET"
        finally:
            monitor.close()
