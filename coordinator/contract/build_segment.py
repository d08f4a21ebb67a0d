"""Builds ``coordinator.contract._segment``: the contract's C library for Python.

The same C files are compiled into ``vcpu._core``; both take layout and prototypes from the same
texts, so no offset or signature is written twice.
"""

from pathlib import Path

from cffi import FFI

FOLDER = Path(__file__).resolve().parent
#: layout, then prototypes: what cffi parses
DECLARATIONS = ("segment.h", "fabric.h")
SOURCES = ("timebase.c", "attention.c", "map.c", "memory.c", "ring.c", "state.c", "fabric.c", "ioapic.c")


def declarations(folder: Path = FOLDER, names: tuple[str, ...] = DECLARATIONS) -> str:
    """The text of headers that cffi can parse, without lines meant for the C preprocessor only."""
    lines = "\n".join((folder / name).read_text() for name in names).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#pragma", "#include")))


ffibuilder = FFI()
ffibuilder.cdef(declarations())
ffibuilder.set_source(
    "coordinator.contract._segment",
    '#include "seg.h"',
    # relative to the project's root, where setup.py runs: setuptools refuses absolute names
    sources=[f"coordinator/contract/{name}" for name in SOURCES],
    include_dirs=["coordinator/contract"],
    depends=[str(path) for path in FOLDER.glob("*.h")],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fno-strict-aliasing"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
