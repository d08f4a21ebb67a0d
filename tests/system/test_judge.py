"""The judge of the boots, on logs of a healthy kernel and on the lines of sick ones."""

import pytest

from tests.system import judge

SHA = "4cc0b18f69829131ad2fe05c6d4f79bb5c65f781c3a2cbf76aa1109783d5c7b1"
HEALTHY = f"""\
ISOLINUX 6.04 20200816  Copyright (C) 1994-2015 H. Peter Anvin et al
[    0.000000] Linux version 6.1.0-56-cloud-amd64 (debian-kernel@lists.debian.org)
[    0.000000] DMI: [Firmware Bug]: nothing to worry about
[    0.186422] Spectre V1 : Mitigation: usercopy/swapgs barriers and __user pointer sanitization
[    0.400000] ACPI: 1 ACPI AML tables successfully acquired and loaded, no errors
[    0.900000] rcu: Hierarchical SRCU implementation.
[    1.291310] Unstable clock detected, switching default tracing clock to "global"\r
atoll: init 1.48\r
atoll: nproc 2
atoll: kernel 6.1.0-56-cloud-amd64
atoll: cdrom 83310592 bytes
atoll: dma UDMA/33
atoll: sha256 {SHA}
atoll: log begin
<6>[    1.649861] ata2: PATA max MWDMA2 cmd 0x170 ctl 0x376 bmdma 0xc008 irq 15
<6>[    1.836877] ata2: found unknown device (class 0)
<6>[    1.839740] ata2.00: ATAPI: DVD-ROM, 2.5+, max UDMA/100
<7>[    2.094134] sr 1:0:0:0: Attached scsi CD-ROM sr0
atoll: log end
atoll: poweroff 4.01
[    4.036483] reboot: Power down
"""


def verdict(console: str, exit_status: int | None = 0, cpus: int = 2) -> list[str]:
    return judge.verdict(
        judge.facts(console),
        sha256=SHA, cd_bytes=83310592, cpus=cpus, release="6.1.0-56-cloud-amd64", exit_status=exit_status,
    )


def test_a_healthy_log_passes() -> None:
    assert verdict(HEALTHY) == []


# The texts are those of Linux 6.1's sources: kernel/watchdog.c, kernel/rcu/tree_stall.h,
# arch/x86/mm/extable.c, kernel/irq/spurious.c, arch/x86/kernel/tsc.c, drivers/ata/libata-eh.c.
@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("WARN", "[    3.1] WARNING: CPU: 0 PID: 1 at kernel/time/timer.c:1729 call_timer_fn+0x1"),
        ("BUG", "[    3.1] BUG: kernel NULL pointer dereference, address: 0000000000000008"),
        ("BUG", "[    3.1] kernel BUG at mm/slub.c:379!"),
        ("BUG", "[    3.1] Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"),
        ("BUG", "[    3.1] Oops: 0002 [#1] PREEMPT SMP NOPTI"),
        ("BUG", "[   30.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [swapper/1:0]"),
        ("RCU stall", "[   30.1] rcu: INFO: rcu_preempt self-detected stall on CPU"),
        ("RCU stall", "[   30.1] rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:"),
        ("RCU stall", "[   30.1] rcu: rcu_preempt kthread starved for 5250 jiffies! g-1155 f0x0"),
        ("MSR", "[    0.1] unchecked MSR access error: RDMSR from 0x852 at rIP: 0xffffffff"),
        ("interrupt", "[    2.1] irq 15: nobody cared (try booting with the \"irqpoll\" option)"),
        ("TSC", "[    0.2] tsc: Marking TSC unstable due to TSCs unsynchronized"),
        ("TSC", "[    9.2] clocksource: timekeeping watchdog on CPU0: Marking clocksource 'tsc' as unstable"),
        ("libata", "<3>[    9.2] ata2.00: exception Emask 0x0 SAct 0x0 SErr 0x0 action 0x6 frozen"),
        ("libata", "<3>[    9.2] ata2.00: failed command: PACKET"),
        ("libata", "<3>[    9.2] ata2.00: qc timeout (cmd 0xa1)"),
        ("libata", "<4>[    9.2] ata2.00: limiting speed to UDMA/25:PIO4"),
        ("libata", "<3>[    9.2] ata2: soft resetting link"),
        ("libata", "<3>[    9.2] ata2: lost interrupt (Status 0x58)"),
        ("I/O", "<3>[    9.2] I/O error, dev sr0, sector 0 op 0x0:(READ) flags 0x80700 phys_seg 1"),
        ("lockup", "[  130.1] INFO: task init:1 blocked for more than 120 seconds."),
    ],
)
def test_each_complaint_fails(kind: str, line: str) -> None:
    found = judge.complaints(line)
    assert len(found) == 1
    assert kind in (found[0].partition(":")[0], "lockup")
    assert len(verdict(HEALTHY + line + "\n")) == 1


@pytest.mark.parametrize(
    ("old", "new", "word"),
    [
        (SHA, SHA[::-1], "SHA-256"),
        ("nproc 2", "nproc 1", "CPUs"),
        ("83310592", "83310590", "size"),
        ("UDMA/33", "", "DMA"),
        ("log end", "log", "log"),
        ("reboot: Power down", "", "power off"),
        ("kernel 6.1.0-56", "kernel 6.1.0-55", "release"),
    ],
)
def test_each_claim_can_fail(old: str, new: str, word: str) -> None:
    reasons = verdict(HEALTHY.replace(old, new))
    assert reasons and all(word in reason for reason in reasons)


def test_a_guest_that_said_nothing_fails_every_claim() -> None:
    assert len(verdict("", exit_status=None)) == 8


def test_exit_status_is_judged() -> None:
    assert verdict(HEALTHY, exit_status=1) == ["the machine's exit status is 1, not 0"]
