"""``python -m tests.blockd.fuzz --seconds N --seed S [--target NAME] [--keep FOLDER]``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.blockd.fuzz import runner, targets


def main() -> int:
    """Exit status 1 when an input has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.blockd.fuzz", description="Fuzz blockd.")
    parser.add_argument("--seconds", type=float, default=60, help="for all targets together")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", action="append", choices=targets.NAMES, help="default: all in turn")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="folder of failing inputs")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--one", action="store_true", help="that input alone")
    given = parser.parse_args()
    names = given.target or list(targets.NAMES)
    failed = 0
    for name in names:
        more = runner.for_seconds(given.seconds / len(names))
        if given.one:
            more = runner.for_inputs(given.first + 1)
        first = given.first
        while more(first):
            done, failure = runner.run(targets.make(name, differential=1), given.seed, first, more)
            first += done
            if failure is None:
                break
            failed += 1
            given.keep.mkdir(parents=True, exist_ok=True)
            print(f"{name}: input {failure.number} failed, kept as {failure.save(given.keep)}", flush=True)
            first += 1
        print(f"{name}: {first - given.first} inputs, seed {given.seed}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
