"""Snapshots of a whole machine: of several images at once, all or none, one of them with the machine's state.

Each image gets its new tables beside the old ones (qcow2/switch.py). Then they are taken into use, image
after image, and only when all are is anything of the old ones given up; so an error on the way leads back. A
crash between two images leaves each of them whole. A snapshot's machine state comes last and goes first:
where it is listed, the disks are, too.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from blockd.image import Image
from blockd.lease.image import LeasedImage
from blockd.lease.manager import LeasedExports
from blockd.qcow2 import operations, snapshots
from blockd.qcow2.image import Qcow2Image
from blockd.qcow2.switch import Change
from blockd.qcow2.vmstate import StoredState, VmState, named
from coordinator.contract import messages
from coordinator.contract.errors import BlockError

log = logging.getLogger(__name__)

#: a piece of a machine's state: whole clusters of any size
PIECE = 4 << 20
#: how long the coordinator may leave a connection alone, seconds
PATIENCE = 60.0


class MachineSnapshots:
    """The commands. One thread calls them."""

    def __init__(self, exports: LeasedExports) -> None:
        self._exports = exports
        self._stored: tuple[str, VmState] | None = None
        self._sending: tuple[threading.Thread, socket.socket] | None = None

    def table(self) -> dict[type, Callable[[Any], Any]]:
        return {
            messages.QuerySnapshots: lambda command: self.query(command.images),
            messages.StoreVmState: lambda command: self.store(command.id, command.path),
            messages.DropVmState: lambda command: self.drop(),
            messages.FetchVmState: lambda command: self.fetch(command.id, command.tag, command.path),
            messages.CreateSnapshots: self._create,
            messages.ApplySnapshots: lambda command: self.apply(command.tag, command.images),
            messages.DeleteSnapshots: lambda command: self.delete(command.tag, command.images),
        }

    def close(self) -> None:
        """Nothing is kept, nothing under way any more."""
        self._end_sending()
        self.drop()

    # ---- what there is -----------------------------------------------------------------------------
    def query(self, images: Iterable[str] = ()) -> list[dict[str, Any]]:
        rows = []
        for ident in tuple(images) or self._exports.table.names():
            image = self._exports.table.named(ident).image
            row: dict[str, Any] = {"id": ident, "file": image.file, "refusal": None, "snapshots": []}
            try:
                self._image(ident)
            except (BlockError, OSError) as error:
                row["refusal"] = getattr(error, "strerror", None) or str(error)
            inner = image.inner if isinstance(image, LeasedImage) else image
            if isinstance(inner, Qcow2Image):
                with _told(inner), inner.lock:
                    row["snapshots"] = [_row(s) for s in snapshots.load(inner.host, inner.header)]
            rows.append(row)
        return rows

    def _image(self, ident: str) -> Qcow2Image:
        """The image of an export that is written under a lease and can have snapshots; BlockError or OSError
        says why it cannot."""
        image: Image = self._exports.table.named(ident).image
        file = image.file
        inner = image.inner if isinstance(image, LeasedImage) else image
        if not isinstance(inner, Qcow2Image):
            raise BlockError(f"{file}: a {inner.format} image has no snapshots", errno.ENOTSUP)
        if not isinstance(image, LeasedImage):
            raise BlockError(f"{file}: is not written under a lease", errno.ENOLCK)
        image.held()
        if inner.data is not inner.host:
            raise BlockError(f"{file}: has an external data file, so it can have no snapshots", errno.ENOTSUP)
        return inner

    def _held(self, ident: str) -> None:
        """OSError when the lease has gone meanwhile."""
        image = self._exports.table.named(ident).image
        assert isinstance(image, LeasedImage)
        image.held()

    # ---- the machine's state -----------------------------------------------------------------------
    def store(self, ident: str, path: str) -> int:
        self.drop()
        with _said():
            image = self._image(ident)
        state = VmState(image)
        self._stored = ident, state
        try:
            with _told(image), _connected(path) as sock:
                buffer = memoryview(bytearray(PIECE))
                while (length := _fill(sock, buffer)) == PIECE:
                    state.append(buffer)
                state.append(buffer[:length])
        except BaseException:
            self.drop()
            raise
        return state.size

    def drop(self) -> None:
        if self._stored is not None:
            self._stored[1].drop()
            self._stored = None

    def fetch(self, ident: str, tag: str, path: str) -> int:
        self._end_sending()
        with _said():
            image = self._image(ident)
        with _told(image):
            snapshot = named(image, tag)
            if snapshot is None:
                raise BlockError(f"{image.file}: there is no snapshot {tag!r}", errno.ENOENT)
            state = StoredState(image, snapshot)
            try:
                sock = _connected(path)
            except BaseException:
                state.close()
                raise
        thread = threading.Thread(target=_send, args=(state, sock, image.file), daemon=True)
        self._sending = thread, sock
        thread.start()
        return state.size

    def _end_sending(self) -> None:
        if self._sending is not None:
            thread, sock = self._sending
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join()
            self._sending = None

    # ---- all or none -------------------------------------------------------------------------------
    def _create(self, command: messages.CreateSnapshots) -> None:
        if self._stored is None or self._stored[0] != command.vmstate:
            raise BlockError(f"no machine state has been stored in {command.vmstate}", errno.EINVAL)
        state = self._stored[1]
        others = [ident for ident in command.images if ident != command.vmstate]

        def change(ident: str, image: Qcow2Image) -> Change:
            mine = state if ident == command.vmstate else None
            _, change = operations.creation(
                image, command.tag, command.date_ns, command.clock_ns, mine, command.replace
            )
            return change

        try:
            self._together([*others, command.vmstate], change)
        except BaseException:
            self.drop()
            raise
        self._stored = None

    def apply(self, tag: str, images: Iterable[str]) -> None:
        images = tuple(images)

        def change(ident: str, image: Qcow2Image) -> Change:
            snapshot = named(image, tag)
            if snapshot is None:
                raise BlockError(f"{image.file}: there is no snapshot {tag!r}", errno.ENOENT)
            if snapshot.disk_size != image.size:
                text = f"{image.file}: has another size than in snapshot {tag!r}"
                raise BlockError(text, errno.EINVAL)
            return operations.application(image, snapshot)

        for ident in images:
            self._exports.table.named(ident).end_sessions()
        self._together(images, change)

    def delete(self, tag: str, images: Iterable[str]) -> None:
        having: list[tuple[bool, str]] = []
        for ident in images:
            with _said():
                image = self._image(ident)
            with _told(image), image.lock:
                known = [s for s in snapshots.load(image.host, image.header) if s.name == tag]
            if known:
                having.append((not any(s.vm_state_size for s in known), ident))

        def change(ident: str, image: Qcow2Image) -> Change:
            known = [s for s in snapshots.load(image.host, image.header) if s.name != tag]
            return Change(image, image.mapping.l1, image.header.size, known)

        self._together([ident for _, ident in sorted(having)], change)

    def _together(self, images: Iterable[str], change: Callable[[str, Qcow2Image], Change]) -> None:
        """Make a change to each, in this order, or to none."""
        with contextlib.ExitStack() as rest:
            changes: list[tuple[str, Change]] = []
            for ident in images:
                with _said():
                    image = self._image(ident)
                with _told(image):
                    rest.enter_context(operations.at_rest(image))
                    changes.append((ident, change(ident, image)))
            begun: list[Change] = []
            try:
                for ident, each in changes:
                    with _told(each.image):
                        self._held(ident)
                        begun.append(each)
                        each.commit()
            except BaseException:
                for each in reversed(begun):
                    _undo(each)
                raise
            for _, each in changes:
                each.finish()


def _undo(change: Change) -> None:
    try:
        change.undo()
    except OSError as error:
        log.error("%s: cannot go back: %s", change.image.file, error.strerror or error)


def _row(snapshot: snapshots.Snapshot) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "size": snapshot.vm_state_size,
        "date_ns": snapshot.date_sec * 10**9 + snapshot.date_nsec,
        "clock_ns": snapshot.vm_clock_nsec,
    }


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """An OSError whose text says all becomes a BlockError."""
    try:
        yield
    except OSError as error:
        raise BlockError(error.strerror or str(error), error.errno or errno.EIO) from None


@contextlib.contextmanager
def _told(image: Qcow2Image) -> Iterator[None]:
    """An OSError becomes a BlockError that names the image."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        text = text if image.file in text else f"{image.file}: {text}"
        raise BlockError(text, error.errno or errno.EIO) from None


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def _fill(sock: socket.socket, buffer: memoryview) -> int:
    """Bytes that came, fewer than there is room for at the end."""
    done = 0
    while done < len(buffer) and (got := sock.recv_into(buffer[done:])):
        done += got
    return done


def _send(state: StoredState, sock: socket.socket, file: str) -> None:
    """In a thread of its own."""
    buffer = memoryview(bytearray(PIECE))
    try:
        for at in range(0, state.size, PIECE):
            piece = buffer[: min(PIECE, state.size - at)]
            state.read_into(at, piece)
            sock.sendall(piece)
    except OSError as error:
        log.error("%s: the machine's state: %s", file, error.strerror or error)
    finally:
        sock.close()
        state.close()
