"""The processes of a machine, by what they call themselves."""

from __future__ import annotations

import contextlib
from pathlib import Path


def islands(name: str) -> dict[str, int]:
    """PID by role of those of machine ``name`` that live."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").decode(errors="replace").split(" ")
                if words[0] == "atoll" and words[-1] == name and len(words) == 3:
                    found[words[1]] = int(entry.name)
    return found
