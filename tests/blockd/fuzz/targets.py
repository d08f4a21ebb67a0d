"""All targets by name."""

from __future__ import annotations

from tests.blockd.fuzz import images, wire
from tests.blockd.fuzz.runner import Target

NAMES = (*images.TARGETS, *wire.TARGETS)


def make(name: str, differential: int) -> Target:
    """``differential``: each so many inputs QEMU is asked, too."""
    if name in images.TARGETS:
        return images.Images(name, differential)
    return wire.Wire(name)
