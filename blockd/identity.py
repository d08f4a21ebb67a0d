"""Which medium an image holds, by size and content: what two machines on different hosts can compare.

A whole digest of a DVD would take seconds, so samples stand for it: the first and last 64 KiB and 256 blocks
spread evenly, which tell apart media that differ in content rather than in single bytes.
"""

from __future__ import annotations

import hashlib
from typing import Any

from blockd.image import Image

EDGE = 64 << 10
BLOCK = 4 << 10
BLOCKS = 256


def identify(image: Image) -> dict[str, Any]:
    """``size`` in bytes, ``content`` a digest of samples (empty where the image is open for writing, since it
    changes), ``writable``. OSError when it cannot be read."""
    content = "" if not image.read_only else _digest(image)
    return {"size": image.size, "content": content, "writable": not image.read_only}


def _digest(image: Image) -> str:
    digest = hashlib.sha256(str(image.size).encode())
    edge = min(EDGE, image.size)
    places = {(0, edge), (image.size - edge, edge)}
    if image.size > 2 * EDGE:
        step = (image.size - BLOCK) / (BLOCKS - 1)
        places |= {(int(index * step) // BLOCK * BLOCK, BLOCK) for index in range(BLOCKS)}
    for offset, length in sorted(places):
        data = bytearray(min(length, image.size - offset))
        image.read_into(offset, memoryview(data))
        digest.update(data)
    return digest.hexdigest()
