"""What the tests that boot Linux share: the machine's options and the judgement of a whole boot."""

from collections.abc import Sequence
from pathlib import Path

from coordinator import pieces
from tests.support import products
from tests.support.launch import CONSOLE, Guest, Launcher
from tests.system import judge

SILENCE_SECONDS = 300.0  # tells a hang, on a machine of any speed


def kernel_options(words: str) -> list[str]:
    """Boots the kernel without a boot loader; `words` are the guest's own."""
    return [
        "-kernel", str(pieces.kernel()), "-initrd", str(products.initramfs()),
        "-append", f"console=ttyS0 {words}",
    ]


def start(launcher: Launcher, folder: Path, options: Sequence[str], cpus: int = 2) -> Guest:
    """A machine with a serial console; its log and statistics are kept in `folder`."""
    machine = ["-machine", "pc", "-smp", str(cpus), "-m", "512", *CONSOLE]
    return Guest(
        launcher, [*machine, *options, *launcher.options(folder / "stats.json")], folder / "console.log"
    )


def finish(guest: Guest) -> judge.Facts:
    """Follows the guest to its power-off and checks what every boot must have in common."""
    guest.expect("reboot: Power down", silence=SILENCE_SECONDS)
    status = guest.wait(silence=SILENCE_SECONDS)
    assert status == 0, guest.errors()
    facts = judge.facts(guest.text(), guest.launcher.excused)
    assert facts.complaints == []
    assert facts.marks["kernel"] == pieces.modules_dir().name
    assert facts.marks["log"] == "end"
    return facts
