"""Which files an image may name as its backing file, and opening the chain.

An image comes from anywhere, and the name in its header is not the user's word. So a backing file is
opened without being asked for only when it is a plain file in the folder of the image that names it (or
below); anything else must lie in a place that the user has allowed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from blockd.image import Image
from coordinator.contract.errors import BlockError

MAX_DEPTH = 200
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Chain(NamedTuple):
    """What holds for all images of one chain."""

    #: files, and folders with all below them, that may be used; "*" stands for every file
    allowed: tuple[str, ...] = ()
    #: (device, inode) of the images above
    above: tuple[tuple[int, int], ...] = ()

    def below(self, file: str, identity: tuple[int, int]) -> Chain:
        """The chain as the backing file of ``file`` sees it. BlockError for a loop, or without end."""
        if identity in self.above:
            raise BlockError(f"{file}: its chain of backing files is a loop", errno.ELOOP)
        if len(self.above) >= MAX_DEPTH:
            raise BlockError(f"{file}: its chain of backing files is longer than {MAX_DEPTH}", errno.ELOOP)
        return self._replace(above=(*self.above, identity))


def plain_path(image: str, name: str) -> str | None:
    """The path that a backing file name means, as seen from the image; None when it is no file name."""
    if _PROTOCOL.match(name):
        if not name.startswith("file:"):
            return None
        name = name[len("file:") :]
    return os.path.join(os.path.dirname(os.path.realpath(image)), name)


def resolve(image: str, name: str, allowed: tuple[str, ...], what: str = "backing file") -> str:
    """The path of a backing or data file; BlockError when the user has not allowed it."""
    path = plain_path(image, name)
    if path is None:
        raise BlockError(f"{image}: {what} {name!r} is no plain file name; refused", errno.EACCES)
    real = os.path.realpath(path)
    places = (os.path.dirname(os.path.realpath(image)), *(os.path.realpath(p) for p in allowed if p != "*"))
    if "*" not in allowed and not any(_within(real, place) for place in places):
        text = f"{image}: {what} {name!r} lies outside the image's folder; allow-backing=PLACE allows it"
        raise BlockError(text, errno.EACCES)
    return path


def _within(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


#: opens a file of a format read-only within a chain
Opener = Callable[[str, str | None, Chain], Image]


def open_backing(image: str, name: str, image_format: str | None, chain: Chain, opener: Opener) -> Image:
    """The backing file of an image, read-only. A format that is not known here is refused by name."""
    path = resolve(image, name, chain.allowed)
    try:
        return opener(path, image_format, chain)
    except BlockError as error:
        raise BlockError(f"{image}: backing file: {error}", error.errno) from None
