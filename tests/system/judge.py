"""Judges a guest by its serial console. Pure functions: text in, findings out."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

# Linux 6.1: what its log must not have. Case matters: "[Firmware Bug]" or "bugs" are no BUG.
COMPLAINTS = {
    "WARN": r"\bWARN(ING)?\b",
    "BUG": r"\bBUG\b|\bOops\b|Kernel panic|general protection fault|Call Trace",
    "lockup": r"(soft|hard) ?(lockup|LOCKUP)|blocked for more than \d+ seconds",
    "RCU stall": r"rcu.*(self-detected stall|detected stalls|kthread starved)",
    "MSR": r"unchecked MSR access",
    "interrupt": r"nobody cared|Disabling IRQ|spurious .*interrupt.*\bexceeded\b",
    "TSC": r"TSC unstable|Marking clocksource 'tsc' as unstable",
    "libata": r"\bata\d+(\.\d+)?: .*(exception|failed|error|timeout|timed out|reset|lost interrupt"
    r"|limiting|frozen|disabled|disabling)",
    "I/O": r"I/O error|Sense Key|Unhandled sense|critical (medium|target) error",
    "clock": r"clocksource.*(skewed|unstable)",
}

MARK = re.compile(r"^atoll: (\S+) ?(.*)$", re.MULTILINE)


@dataclass
class Facts:
    """What a guest said of itself."""

    marks: dict[str, str] = field(default_factory=dict)  # the last value of each "atoll: KEY VALUE"
    powered_down: bool = False  # the kernel asked ACPI for S5
    complaints: list[str] = field(default_factory=list)

    def number(self, mark: str) -> int | None:
        """The mark's first word as a number."""
        words = self.marks.get(mark, "").split()
        return int(words[0]) if words and words[0].isdigit() else None


def complaints(console: str, excused: Collection[str] = ()) -> list[str]:
    """The lines of a kernel's log that no healthy boot has, each with the kind of its complaint."""
    found = []
    for line in console.splitlines():
        for kind, pattern in COMPLAINTS.items():
            if kind not in excused and re.search(pattern, line):
                found.append(f"{kind}: {line.strip()}")
                break
    return found


def facts(console: str, excused: Collection[str] = ()) -> Facts:
    """Reads the marks that tests/guests/init prints, and the kernel's log around them."""
    console = console.replace("\r", "")
    return Facts(
        marks={key: value.strip() for key, value in MARK.findall(console)},
        powered_down="reboot: Power down" in console,
        complaints=complaints(console, excused),
    )


def verdict(
    guest: Facts, *, sha256: str, cd_bytes: int, cpus: int, release: str, exit_status: int | None
) -> list[str]:
    """Why the demo did not hold; empty if all of it did."""
    reasons = []
    expected = {
        "sha256": (guest.marks.get("sha256", "nothing"), sha256, "the guest's SHA-256 of the CD"),
        "cdrom": (guest.number("cdrom"), cd_bytes, "the size of the CD in the guest"),
        "nproc": (guest.number("nproc"), cpus, "the number of CPUs in the guest"),
        "kernel": (guest.marks.get("kernel", "nothing"), release, "the kernel's release"),
    }
    for got, wanted, what in expected.values():
        if got != wanted:
            reasons.append(f"{what} is {got}, not {wanted}")
    if "DMA" not in guest.marks.get("dma", ""):
        reasons.append("the drive did not use DMA")
    if guest.marks.get("log") != "end":
        reasons.append("the guest's log is incomplete")
    if not guest.powered_down:
        reasons.append("the guest did not power off")
    if exit_status != 0:
        reasons.append(f"the machine's exit status is {exit_status}, not 0")
    return reasons + [f"kernel log: {line}" for line in guest.complaints]
