"""Which files an image may name as its backing file, and opening the chain.

An image comes from anywhere, and the name in its header is not the user's word. So a backing file is
opened without being asked for only when it is a plain file in the folder of the image that names it (or
below); anything else must lie in a place that the user has allowed, and so must an NBD server.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from blockd.hostfile import Identity
from blockd.image import Image
from blockd.nbd import uri
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import is_network_name

MAX_DEPTH = 200
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


class Chain(NamedTuple):
    """What holds for all images of one chain."""

    #: files, folders with all below them, and NBD exports, that may be used; "*" stands for everything
    allowed: tuple[str, ...] = ()
    #: what the images above are
    above: tuple[Identity, ...] = ()

    def below(self, file: str, identity: Identity) -> Chain:
        """The chain as the backing file of ``file`` sees it. BlockError for a loop, or without end."""
        if identity in self.above:
            raise BlockError(f"{file}: its chain of backing files is a loop", errno.ELOOP)
        if len(self.above) >= MAX_DEPTH:
            raise BlockError(f"{file}: its chain of backing files is longer than {MAX_DEPTH}", errno.ELOOP)
        return self._replace(above=(*self.above, identity))


def plain_path(image: str, name: str) -> str | None:
    """What a backing file name means, as seen from the image: a path, or the name of an NBD export. None when
    it is neither."""
    if is_network_name(name):
        return name
    if _PROTOCOL.match(name):
        if not name.startswith("file:"):
            return None
        name = name[len("file:") :]
    if is_network_name(image):  # which lies in no folder
        return name if os.path.isabs(name) else None
    folder, real = os.path.dirname(image), os.path.dirname(os.path.realpath(image))
    # told as the image's own name was, unless that is a link to elsewhere
    return os.path.join(folder if os.path.realpath(folder) == real else real, name)


def resolve(image: str, name: str, allowed: tuple[str, ...], what: str = "backing file") -> str:
    """The path of a backing or data file, or the name of an export; BlockError when the user has not allowed
    it."""
    path = plain_path(image, name)
    if path is None:
        text = f"{image}: {what} {name!r} is no plain file name and no NBD export; refused"
        raise BlockError(text, errno.EACCES)
    if is_network_name(path):
        export = uri.allowed_by(path, allowed)
        if export is None:
            text = f"{image}: {what} {name!r} is on a server, so it is refused"
            text += f"; allow-backing={name} allows it"
            raise BlockError(text, errno.EACCES)
        return export
    real = os.path.realpath(path)
    places = [os.path.realpath(place) for place in allowed if place != "*" and not is_network_name(place)]
    if not is_network_name(image):
        places.append(os.path.dirname(os.path.realpath(image)))
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


def read_below(image: Image, offset: int, view: memoryview) -> None:
    """Read from a backing file, which may be shorter: there are zeroes behind its end."""
    inside = max(0, min(len(view), image.size - offset))
    if inside:
        image.read_into(offset, view[:inside])
    if inside < len(view):
        view[inside:] = bytes(len(view) - inside)
