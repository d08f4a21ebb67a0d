"""The host's CPU as oracle: a state and an instruction in, the state behind it or its exception out."""

from __future__ import annotations

import ctypes
import functools
import mmap
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).with_name("native.c")
MAP_FIXED_NOREPLACE = 0x100000


@functools.cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "native.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
        return ctypes.CDLL(str(library))


@dataclass
class State:
    """What user mode sees of a CPU; fx is an FXSAVE image in the 64-bit format (SDM vol. 1 table 10-2)."""

    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    rflags: int = 0x202
    fx: bytearray = field(default_factory=lambda: bytearray(512))

    def copy(self) -> State:
        return State(list(self.gpr), self.rflags, bytearray(self.fx))

    def word(self, offset: int, size: int) -> int:
        return int.from_bytes(self.fx[offset:offset + size], "little")

    def set_word(self, offset: int, size: int, value: int) -> None:
        self.fx[offset:offset + size] = value.to_bytes(size, "little")


class _Native(ctypes.Structure):
    _fields_ = [("gpr", ctypes.c_uint64 * 16), ("rflags", ctypes.c_uint64), ("unused", ctypes.c_uint64 * 15),
                ("fx", ctypes.c_uint8 * 512)]


def run(state: State, code: bytes) -> tuple[State, int]:
    """(state behind the instruction, 0), or (the state given, number of the exception). RSP is not used."""
    native = _Native()
    native.gpr[:] = state.gpr
    native.rflags = state.rflags
    native.fx[:] = state.fx
    trap = _library().native_run(ctypes.byref(native), code, len(code))
    if trap:
        return state, trap
    return State(list(native.gpr), native.rflags, bytearray(native.fx)), 0


class Window:
    """Memory of the host at an address of one's choice, nothing behind it. Made by window()."""

    def __init__(self, address: int, size: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        at = libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE,
                       mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0)
        if at != address:
            raise OSError(ctypes.get_errno(), f"no memory at {address:#x}")
        self.address, self.size = address, size

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)


window = functools.cache(Window)
