"""Builds vcpu._core: the C of vcpu/core and the shared part of the contract as one cffi API-mode module.

The decode tables come from the opcode table at build time (optable.generate()). Run as a program, it compiles
only what changed, which is what one wants while working on the core.
"""

from __future__ import annotations

import fcntl
import re
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONTRACT = ROOT / "coordinator" / "contract"
# A handler must end in a jump (cpu.h), which gcc does from -O2 on; -foptimize-sibling-calls says it is meant.
# No CET landing pads and no stack protector: they would cost every handler a few instructions.
CFLAGS = [
    "-O2",
    "-std=gnu11",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-fno-strict-aliasing",
    "-fwrapv",
    "-fvisibility=hidden",
    "-foptimize-sibling-calls",
    "-fcf-protection=none",
    "-fno-stack-protector",
    "-fno-plt",
    "-fno-semantic-interposition",
    "-fno-align-functions",
]
INCLUDES = [HERE / "core", CONTRACT]


def sources() -> list[Path]:
    """C files beside the generated one."""
    return sorted((HERE / "core").glob("*.c")) + sorted(CONTRACT.glob("[!_]*.c"))


def _cdef(path: Path) -> str:
    """A header as cffi's parser takes it: no preprocessor but integer #defines."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
    return re.sub(r"^\s*#\s*(if|ifdef|ifndef|endif|include|pragma)\b.*$", "", text, flags=re.M)


def _optable() -> str:
    # not `import vcpu.optable`: setup.py runs this file before the package is importable
    generate = runpy.run_path(str(HERE / "optable.py"), run_name="optable")["generate"]
    return str(generate())


def builder() -> FFI:
    ffi = FFI()
    callbacks = 'extern "Python" int vcpu_sync_access(void *handle);\n'
    ffi.cdef(_cdef(CONTRACT / "segment.h") + _cdef(HERE / "core" / "api.h") + callbacks)
    preamble = (
        '#include "cpu.h"\n#include "api.h"\nstatic int vcpu_sync_access(void *handle);\n'
        "int core_sync_access(void *handle);\n"
        "int core_sync_access(void *handle) { return vcpu_sync_access(handle); }\n"
    )
    ffi.set_source(
        "vcpu._core",
        preamble + _optable(),
        sources=[str(path.relative_to(ROOT)) for path in sources()],
        include_dirs=[str(path.relative_to(ROOT)) for path in INCLUDES],
        extra_compile_args=CFLAGS,
        extra_link_args=["-Wl,-z,now"],
        libraries=["m"],
    )
    return ffi


def incremental() -> None:
    """Compiles what is older than its source or any header, two at a time, and links in place."""
    build = ROOT / "build" / "core"
    build.mkdir(parents=True, exist_ok=True)
    lock = open(build / "lock", "w")  # noqa: SIM115  held until the process ends: one build at a time
    fcntl.flock(lock, fcntl.LOCK_EX)
    generated = build / "_core.c"
    fresh = build / "_core.new.c"
    builder().emit_c_code(str(fresh))
    if generated.exists() and generated.read_text() == fresh.read_text():
        fresh.unlink()
    else:
        fresh.replace(generated)
    headers = max(path.stat().st_mtime for folder in INCLUDES for path in folder.glob("*.[hi]*"))
    flags = [*CFLAGS, "-fPIC", *(f"-I{path}" for path in INCLUDES), f"-I{sysconfig.get_paths()['include']}"]
    jobs: list[tuple[Path, subprocess.Popen[bytes]]] = []
    objects, failed = [], False
    for path in [*sources(), generated]:
        target = build / (path.stem + ".o")
        objects.append(target)
        if target.exists() and target.stat().st_mtime > max(headers, path.stat().st_mtime):
            continue
        if len(jobs) == 2:
            done, process = jobs.pop(0)
            failed |= process.wait() != 0
        extra = ["-Wno-missing-field-initializers"] if path == generated else []
        jobs.append((path, subprocess.Popen(["gcc", *flags, *extra, "-c", str(path), "-o", str(target)])))
    for _, process in jobs:
        failed |= process.wait() != 0
    if failed:
        sys.exit("build_core: compilation failed")
    library = HERE / "_core.abi3.so"  # the name setup.py gives it
    fresh_library = build / "_core.so"
    subprocess.run(
        ["gcc", "-shared", *map(str, objects), "-Wl,-z,now", "-lm", "-lpthread", "-o", str(fresh_library)],
        check=True,
    )
    fresh_library.replace(library)


if __name__ == "__main__":
    incremental()
else:
    ffibuilder = builder()
