"""The version of Atoll as QMP tells it."""

from __future__ import annotations

import importlib.metadata
from typing import Any


def version() -> dict[str, Any]:
    """The reply of query-version. The number is Atoll's own."""
    major, minor, micro = (int(part) for part in importlib.metadata.version("atoll").split(".")[:3])
    return {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "atoll"}
