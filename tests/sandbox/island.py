"""Test islands: they take a role's sandbox, and then try to get out of it.

python -m tests.sandbox.island ROLE FOLDER VICTIM ATTEMPT - prints the errno, 0 where it got out.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from coordinator.contract.sandbox import Access, Sandbox
from tests.sandbox import attempts


def main(role: str, folder: str, victim: str, attempt: str) -> None:
    attempts.prepare(Path(folder), int(victim))
    begun, go = threading.Event(), threading.Event()
    results: list[int] = []
    allowed = (str(Path(folder) / "allowed"), Access.READ | Access.WRITE | Access.NAMES)
    sandbox = Sandbox(role, f"{role}0", True, [allowed] if role == "blockd" else [])
    sandbox.enter()

    def other() -> None:
        begun.set()
        go.wait()
        results.append(attempts.ATTEMPTS[attempt]())

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait()
    sandbox.seal()
    go.set()  # a thread that was there before is bound, too
    thread.join()
    results.append(attempts.ATTEMPTS[attempt]())
    print(*results)


if __name__ == "__main__":
    main(*sys.argv[1:])
