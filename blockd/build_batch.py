"""Builds ``blockd._batch``: batches of plain NBD requests (see batch.h)."""

from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).resolve().parent / "batch.h"
_lines = HEADER.read_text().splitlines()

ffibuilder = FFI()
ffibuilder.cdef("\n".join(line for line in _lines if not line.startswith(("#pragma", "#include"))))
ffibuilder.set_source(
    "blockd._batch",
    '#include "batch.h"',
    # relative to the project's root, where setup.py runs: setuptools refuses absolute names
    sources=["blockd/batch.c"],
    include_dirs=["blockd"],
    depends=[str(HEADER)],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fno-strict-aliasing"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
