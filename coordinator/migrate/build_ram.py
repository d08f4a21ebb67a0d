"""Builds ``coordinator.migrate._ram``: guest memory to and from a socket or file (ram.h)."""

from pathlib import Path

from cffi import FFI

FOLDER = Path(__file__).resolve().parent

ffibuilder = FFI()
ffibuilder.cdef((FOLDER / "ram.h").read_text())
ffibuilder.set_source(
    "coordinator.migrate._ram",
    '#include "ram.h"',
    # relative to the project's root, where setup.py runs: setuptools refuses absolute names
    sources=["coordinator/migrate/ram.c"],
    include_dirs=["coordinator/migrate"],
    depends=[str(FOLDER / "ram.h")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
