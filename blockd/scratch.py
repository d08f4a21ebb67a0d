"""Files without a name, for what is thrown away at the end: nobody can find them, and none is left behind,
however the process ends.

Those of a machine are made and held by the coordinator, since they are to outlive a block daemon that dies:
the next one finds in them what this one has written. They are opened again through /proc/self/fd, as open(2)
has it for O_TMPFILE.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import IO

from coordinator.contract.errors import BlockError

#: descriptors of those that were handed in, by export
_held: dict[str, int] = {}


def hold(files: dict[str, int]) -> None:
    """Use these from now on."""
    _held.clear()
    _held.update(files)


@contextlib.contextmanager
def nameless(ident: str) -> Iterator[str]:
    """A path to the file of export ``ident``, empty or as a predecessor has left it; what has opened it in
    the end keeps it. BlockError."""
    if ident in _held:
        yield f"/proc/self/fd/{_held[ident]}"
        return
    with _make() as file:
        yield f"/proc/self/fd/{file.fileno()}"


def _make() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(buffering=0)
    except OSError as error:
        text = f"no temporary file can be made: {error.strerror or error}"
        raise BlockError(text, error.errno or 5) from None
