"""What lies between guest memory and a connection that is compressed, or in TLS.

The C of ram.c reads and writes plain descriptors. Where a connection is more than that, a pipe and a thread
stand between them: pieces of up to 1 MiB, each with its length in front, each compressed by itself if at all;
a length of zero is the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import zstandard

from coordinator.contract.errors import MigrationError
from coordinator.migrate.ram import Counts

#: of a piece before it is packed, and of the pipe, bytes
PIECE = 1 << 20
#: zstd may make incompressible data a little larger (its documentation: ZSTD_compressBound)
LONGEST = PIECE + (PIECE >> 8) + 64

_LENGTH = struct.Struct("<I")

Job = Callable[[int], None]


@dataclass(frozen=True)
class Wire:
    """How guest memory goes over a connection. ``level`` of zstd, 0 for none; ``tls`` says that sockets are
    TLS ones."""

    level: int = 0
    tls: bool = False

    @property
    def plain(self) -> bool:
        return not self.level and not self.tls


@dataclass
class Tally:
    """Bytes that one connection has carried, where it is not plain; without what TLS adds."""

    bytes: int = 0


def on_the_wire(wire: Wire, counts: Counts, tallies: Iterable[Tally]) -> Counts:
    """What C has counted before it was packed, with the bytes as they travel."""
    return counts if wire.plain else replace(counts, bytes=sum(tally.bytes for tally in tallies))


def send(sock: socket.socket, wire: Wire, tally: Tally, job: Job) -> None:
    """Let ``job`` write to a descriptor; what it writes goes out. In a thread: it blocks."""
    if wire.plain:
        job(sock.fileno())
        return
    read_end, write_end = _pipe()
    _side_by_side(sock, job, write_end, lambda: _pack(read_end, sock, wire, tally), read_end)


def receive(sock: socket.socket, wire: Wire, tally: Tally, job: Job) -> None:
    """Let ``job`` read what comes in from a descriptor, to its end. In a thread: it blocks."""
    if wire.plain:
        job(sock.fileno())
        return
    read_end, write_end = _pipe()
    _side_by_side(sock, job, read_end, lambda: _unpack(sock, write_end, wire, tally), write_end)


def _pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIECE)
    return read_end, write_end


def _side_by_side(
    sock: socket.socket, job: Job, jobs_end: int, pump: Callable[[], None], pumps_end: int
) -> None:
    """The job here and the pump in a thread, each closing its end of the pipe when it is done. Where the
    connection is at fault, that is what is raised, rather than what it did to the job."""
    failures: list[MigrationError] = []

    def work() -> None:
        try:
            pump()
        except MigrationError as error:
            failures.append(error)
        finally:
            os.close(pumps_end)

    thread = threading.Thread(target=work, name="migration-pump", daemon=True)
    thread.start()
    try:
        job(jobs_end)
    except BaseException:
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # the pump may wait for the peer
        raise
    finally:
        os.close(jobs_end)
        thread.join()
        if failures:
            raise failures[0] from None


def _pack(source: int, sock: socket.socket, wire: Wire, tally: Tally) -> None:
    """From the pipe to the connection, up to the pipe's end."""
    compressor = zstandard.ZstdCompressor(level=wire.level) if wire.level else None
    buffer = memoryview(bytearray(PIECE))
    try:
        while n := _fill(source, buffer):
            piece = compressor.compress(buffer[:n]) if compressor else buffer[:n]
            sock.sendall(_LENGTH.pack(len(piece)))
            sock.sendall(piece)
            tally.bytes += _LENGTH.size + len(piece)
        sock.sendall(_LENGTH.pack(0))
    except OSError as error:
        raise _broken(error) from None


def _fill(source: int, buffer: memoryview) -> int:
    """As much as there is room for; less at the end."""
    done = 0
    while done < len(buffer) and (n := os.readv(source, [buffer[done:]])):
        done += n
    return done


def _unpack(sock: socket.socket, target: int, wire: Wire, tally: Tally) -> None:
    """From the connection to the pipe, up to the connection's end mark."""
    decompressor = zstandard.ZstdDecompressor() if wire.level else None
    buffer = memoryview(bytearray(LONGEST))
    try:
        while True:
            (length,) = _LENGTH.unpack(_take(sock, buffer, _LENGTH.size))
            if not length:
                return
            if length > LONGEST:
                raise MigrationError(f"guest memory: a piece of {length} bytes was announced")
            piece = _take(sock, buffer, length)
            tally.bytes += _LENGTH.size + length
            if decompressor is not None:
                piece = _inflate(decompressor, piece)
            while piece:
                piece = piece[os.write(target, piece) :]
    except zstandard.ZstdError as error:
        raise MigrationError(f"guest memory: a compressed piece is damaged: {error}") from None
    except BrokenPipeError:
        return  # the reader has given up, and says why
    except OSError as error:
        raise _broken(error) from None


def _inflate(decompressor: zstandard.ZstdDecompressor, piece: memoryview) -> memoryview:
    """What a piece was. Its own word on its size is looked at first: the library makes room for whatever that
    says, and for ``max_output_size`` only where it says nothing."""
    size = zstandard.get_frame_parameters(piece).content_size
    if size > PIECE:
        raise MigrationError("guest memory: a compressed piece is larger than it may be")
    return memoryview(decompressor.decompress(piece, max_output_size=PIECE))


def _take(sock: socket.socket, buffer: memoryview, n: int) -> memoryview:
    done = 0
    while done < n:
        got = sock.recv_into(buffer[done:n])
        if not got:
            raise MigrationError("the stream of guest memory ends too early")
        done += got
    return buffer[:n]


def _broken(error: OSError) -> MigrationError:
    return MigrationError(f"guest memory: {error.strerror or error}")
