"""``atoll migrate`` against machines that run, and its words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli import migrate
from coordinator.contract.errors import AtollError
from tests.migrate.machines import Moved, Source, Target, sequence
from tests.migrate.test_live import started
from tests.support.certificates import make_certificates
from tests.system.machine import until

pytestmark = pytest.mark.timeout(300)


def atoll(machine: Moved, *words: str) -> subprocess.CompletedProcess[str]:
    """With the machine's own runtime folder."""
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli.main", "migrate", *words],
        env=os.environ | {"XDG_RUNTIME_DIR": str(machine.runtime)}, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def name(machine: Moved) -> str:
    return str(machine.machine.name)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["vm"], "NAME and URI are wanted"),
        (["--cancel", "vm", "tcp::1"], "takes a NAME alone"),
        (["--recover", "vm"], "NAME and URI are wanted"),
        (["--resume", "vm", "exec:cat"], "is not one of"),
        (["no-such-machine", "tcp::1"], "no running machine"),
        (["vm", "tcp::1", "-p", "speed=9"], "is not NAME=VALUE"),
    ],
)
def test_words_that_do_not_do(words: list[str], why: str) -> None:
    with pytest.raises(AtollError, match=why) as error:
        migrate.run(words)
    assert "\n" not in str(error.value)


def test_there(home: Path) -> None:
    with started(Source(), Target()) as (a, b):
        done = atoll(a, name(a), "-p", "multifd-channels=2", b.uri)
        assert done.returncode == 0 and done.stdout.startswith("completed in "), done
        b.counts()
        again = atoll(a, name(a), b.uri)
        assert (again.returncode, again.stdout) == (1, "")
        assert "migrated away already" in again.stderr and again.stderr.count("\n") == 1
        sequence(a.quit(), b.quit())


def test_by_tls(home: Path, tmp_path: Path) -> None:
    """Guests that run move by TLS, packed and plain; one with a stranger's certificate stays, and is told."""
    made = make_certificates(tmp_path / "tls")
    with started(Source(), Moved("-incoming", "defer")) as (a, b):
        until(lambda: b.state == "inmigrate", "a machine that waits")
        b.uri = f"unix:{b.runtime / 'migration'}"
        b.cmd("migrate-set-parameters", tls_creds=str(made.server))
        b.cmd("migrate-incoming", uri=b.uri)
        words = [name(a), b.uri, "-p", "tls-hostname=localhost", "-p"]
        wrong = atoll(a, *words, f"tls-creds={made.stranger}")
        assert wrong.returncode == 1 and "TLS: " in wrong.stderr and wrong.stderr.count("\n") == 1, wrong
        a.counts()
        right = [f"tls-creds={made.client}", "-p", "multifd-channels=2", "-p", "multifd-compression=zstd"]
        done = atoll(a, *words, *right)
        assert done.returncode == 0, done
        b.counts()
        ram = a.status["ram"]
        assert 0 < ram["transferred"] < ram["normal-bytes"]
        sequence(a.quit(), b.quit())


def test_cancel(home: Path) -> None:
    with started(Source(), Target()) as (a, b):
        nothing = atoll(a, "--cancel", name(a))
        assert nothing.returncode != 0 and "no migration is under way" in nothing.stderr
        a.fault("send=delay:60000")
        a.cmd("migrate", uri=b.uri)
        a.phase("send")
        there = atoll(b, "--cancel", name(b))
        assert there.returncode != 0 and "is cancelled at the source" in there.stderr
        assert atoll(a, "--cancel", name(a)).returncode == 0
        a.counts()
        assert b.dies() == 1
        sequence(a.quit())


def test_recover_by_the_record_of_a_source_that_was_killed(home: Path) -> None:
    with started(Source(), Target()) as (a, b):
        a.fault("release.done=kill")
        started_command: Any = subprocess.Popen(
            [sys.executable, "-m", "coordinator.cli.main", "migrate", name(a), b.uri],
            env=os.environ | {"XDG_RUNTIME_DIR": str(a.runtime)}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        a.killed()
        assert started_command.wait(60) == 1
        assert started_command.stderr.read().count("\n") == 1
        b.reaches("postcopy-paused")
        until(lambda: f"atoll migrate --recover {name(b)} file:" in b.machine.errors(), "what to do")
        record = home / "state" / "atoll" / "released" / f"transfer-{b.status['x-transfer']}"
        wrong = atoll(b, "--recover", name(b), f"file:{record}x")
        assert wrong.returncode == 1 and "says of no machine" in wrong.stderr
        b.stands()
        done = atoll(b, "--recover", name(b), f"file:{record}")
        assert done.returncode == 0, done
        b.counts()
        sequence(a.text, b.quit())
        record.unlink()


def test_resume_at_another_address(home: Path) -> None:
    with started(Source(), Target()) as (a, b):
        a.fault("resume=delay:5000")
        a.cmd("migrate", uri=b.uri)
        a.phase("resume")
        a.machine.kill(signal.SIGSTOP)  # until all has been said
        Path(b.uri.removeprefix("unix:")).unlink()
        other = f"{b.uri}2"
        said = atoll(b, "--recover", name(b), other)
        assert said.returncode == 0 and f"--resume NAME {other}" in said.stdout
        a.machine.kill(signal.SIGCONT)
        assert atoll(a, "--resume", name(a), other).returncode == 0
        b.counts()
        sequence(a.quit(), b.quit())
