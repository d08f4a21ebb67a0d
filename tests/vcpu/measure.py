"""`python -m tests.vcpu.measure` prints millions of guest instructions a second by kind of loop."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.vcpu.flat import Flat, compile_c

LOOPS = {"sha256": (0, 20_000), "sieve": (1, 10), "icall": (2, 8_000_000), "qsort": (3, 40)}
PROGRAM = Path(__file__).parent / "programs" / "loops.c"


def main() -> None:
    code = compile_c(PROGRAM.read_text(), "-mgeneral-regs-only")
    machine = Flat()
    for name, (which, rounds) in LOOPS.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        best = 0.0
        for _ in range(3):
            machine.reset()
            before, start = machine.instructions, time.thread_time()
            machine.run(code, rdi=which, rsi=rounds)
            seconds = time.thread_time() - start
            best = max(best, (machine.instructions - before) / seconds / 1e6)
        print(
            f"{name:8} {best:7.1f} MIPS   {machine.instructions - before:>12} instructions, "
            f"result {machine.get('rax'):#x}"
        )


if __name__ == "__main__":
    main()
