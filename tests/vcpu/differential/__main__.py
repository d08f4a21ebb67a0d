"""Instructions against the host's CPU, as many as one likes: python -m tests.vcpu.differential --help"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

from tests.vcpu.differential.shapes import left_out
from tests.vcpu.differential.suite import Suite


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.vcpu.differential", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--cases", type=int, default=1_000_000, help="how many (default: a million)")
    parser.add_argument(
        "--seed",
        type=int,
        default=int(time.time()),
        help="the same seed gives the same cases (default: the time)",
    )
    parser.add_argument(
        "--start", type=int, default=0, help="number of the first case: with --cases 1, one failure again"
    )
    parser.add_argument(
        "--only", default="", help="shapes that contain this text; numbers of cases depend on it"
    )
    parser.add_argument("--sequences", action="store_true", help="several instructions a case")
    parser.add_argument("--show", type=int, default=20, help="stop after so many that differ (default: 20)")
    args = parser.parse_args()
    suite = Suite(args.only)
    if not suite.shapes:
        parser.error(f"no shape contains {args.only!r}")
    rows = {shape.row.key for shape in suite.shapes}
    print(f"seed {args.seed}, {len(suite.shapes)} shapes of {len(rows)} rows", flush=True)
    for reason, keys in left_out().items():
        print(f"left out ({reason}): {', '.join(keys)}")
    if suite.lacking:
        print(f"left out (not in this host): {', '.join(suite.lacking)}")
    began, shown = time.monotonic(), 0
    progress = itertools.count(1)
    for differing in suite.batches(args.seed, args.start, args.start + args.cases, args.sequences):
        for number, text in differing:
            print(f"case {number}: {text}", flush=True)
        shown += len(differing)
        if shown >= args.show:
            break
        if next(progress) % 400 == 0:
            print(f"{suite.coverage.cases} cases, {time.monotonic() - began:.0f} s", flush=True)
    spent = time.monotonic() - began
    missing = (
        []
        if args.sequences or args.start or args.cases < 3 * len(suite.shapes)
        else suite.coverage.missing(suite.shapes)
    )
    for line in missing:
        print(f"not covered: {line}")
    vectors = ", ".join(f"{vector}: {n}" for vector, n in sorted(suite.coverage.vectors.items()))
    print(f"{shown} differ; {spent:.1f} s; exceptions seen: {vectors or 'not counted'}")
    suite.close()
    return 1 if shown or missing else 0


if __name__ == "__main__":
    sys.exit(main())
