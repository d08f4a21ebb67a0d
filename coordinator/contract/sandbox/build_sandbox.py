"""Builds ``coordinator.contract.sandbox._sandbox``: the system calls that confine a process."""

from pathlib import Path

from cffi import FFI

FOLDER = Path(__file__).resolve().parent

ffibuilder = FFI()
ffibuilder.cdef((FOLDER / "sandbox.h").read_text())
ffibuilder.set_source(
    "coordinator.contract.sandbox._sandbox",
    '#include <stdint.h>\n#include "sandbox.h"',
    # relative to the project's root, where setup.py runs: setuptools refuses absolute names
    sources=["coordinator/contract/sandbox/sandbox.c"],
    include_dirs=["coordinator/contract/sandbox"],
    depends=[str(path) for path in FOLDER.glob("*.h")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
