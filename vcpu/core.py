"""The C core from Python: one vCPU, its run() and its sync accesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coordinator.contract.errors import IslandError
from vcpu._core import ffi, lib
from vcpu.exits import Exit

NO_ADDRESS: int = lib.SEG_NO_OFFSET
#: run() comes back by itself after so many instructions at the latest
LONG = 1 << 62
DONE, ABANDONED = 0, 1


class Core:
    """vCPU ``index`` of the segment behind ``segment_fd``.

    ``sync`` is called from inside ``run`` for an access that a device host must answer: it gets the
    ``struct io_request *``, puts a read's reply into its ``data`` and returns True; or returns False to
    leave ``run`` with the access not begun - then somebody must have raised attention, or the guest
    tries it again at once.
    """

    def __init__(
        self, segment_fd: int, index: int, sync: Callable[[Any], bool], doorbells: Sequence[int] = ()
    ) -> None:
        self._sync = sync
        #: what went wrong inside ``sync``; raised by ``run``
        self.failure: BaseException | None = None
        self._handle = ffi.new_handle(self)
        self._core = lib.core_create(segment_fd, index, self._handle)
        if self._core == ffi.NULL:
            raise IslandError(f"vcpu{index}: {ffi.string(lib.core_error()).decode()}")
        #: ``struct vcpu_block *``
        self.block: Any = lib.core_block(self._core)
        #: ``struct cpu_arch``
        self.arch: Any = self.block.arch
        self._io = ffi.addressof(self.block, "io")
        for host, fd in enumerate(doorbells):
            lib.core_doorbell(self._core, host, fd)

    @property
    def handle(self) -> Any:
        """``struct cpu *``, for what else of the library is called on it."""
        return self._core

    def close(self) -> None:
        lib.core_destroy(self._core)
        self._core = ffi.NULL

    def run(self, budget: int = LONG) -> Exit:
        """Enter the guest; returns why it came out."""
        reason = Exit(lib.core_run(self._core, budget))
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        return reason

    def power_on(self) -> None:
        """State after power-on."""
        lib.core_power_on(self._core)

    def state_changed(self) -> None:
        """The architectural state was written from outside ``run``."""
        lib.core_state_changed(self._core)

    def translate(self, linear: int) -> int | None:
        """Guest-physical address of a linear one, None where nothing is mapped."""
        gpa = lib.core_translate(self._core, linear & NO_ADDRESS)
        return None if gpa == NO_ADDRESS else int(gpa)

    def error(self) -> str:
        """After Exit.ERROR."""
        text: bytes = ffi.string(self.block.error_text)
        return text.decode(errors="replace")

    def leave(self) -> None:
        """Make ``run`` return at the next instruction boundary; for use inside ``sync``."""
        lib.core_attend(self._core, lib.ATTN_CONTROL)

    def answer(self) -> int:
        """Called by C, inside run()."""
        try:
            if self._sync(self._io):
                return DONE
        except BaseException as error:  # must not cross C: run() raises it
            self.failure = error
            self.leave()
        return ABANDONED


@ffi.def_extern()
def vcpu_sync_access(handle: Any) -> int:
    core: Core = ffi.from_handle(handle)
    return core.answer()
