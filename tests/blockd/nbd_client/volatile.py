"""A server that keeps writes in memory until it is told to flush, and loses power again and again."""

from __future__ import annotations

import random
import socket
import threading

from tests.blockd.nbd_client.script import FLUSH, READ, WRITE, ZEROES, Asked, data, done, negotiate, take

FUA = 1


class Volatile:
    """Listens at ``path``. Each connection ends after some requests, for the power fails: any of the writes
    since the last flush are gone then, and the last replies may not have been sent."""

    def __init__(self, path: str, size: int, rnd: random.Random, outages: int) -> None:
        self.durable = bytearray(size)
        self.outages = 0
        self._now = bytearray(size)
        self._written: list[tuple[int, bytes]] = []
        self._rnd = rnd
        self._limit = outages
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                try:
                    self._serve(sock)
                except (EOFError, OSError):
                    pass
            self._power_fails()

    def _serve(self, sock: socket.socket) -> None:
        negotiate(sock, len(self.durable))
        last = self._rnd.randrange(20, 120) if self.outages < self._limit else 1 << 30
        for number in range(last):
            asked = take(sock)
            reply = self._answer(asked)
            if number < last - 1 or self._rnd.random() < 0.5:
                sock.sendall(reply)

    def _answer(self, asked: Asked) -> bytes:
        end = asked.offset + asked.length
        if asked.command == READ:
            return data(asked.cookie, asked.offset, bytes(self._now[asked.offset : end]))
        if asked.command in (WRITE, ZEROES):
            content = asked.data or bytes(asked.length)
            self._now[asked.offset : end] = content
            if asked.flags & FUA:
                self.durable[asked.offset : end] = content
            else:
                self._written.append((asked.offset, content))
        elif asked.command == FLUSH:
            self.durable[:] = self._now
            self._written.clear()
        return done(asked.cookie)

    def _power_fails(self) -> None:
        """Some of what was written had reached the disk by chance."""
        self.outages += 1
        for offset, content in self._written:
            if self._rnd.random() < 0.3:
                self.durable[offset : offset + len(content)] = content
        self._written.clear()
        self._now[:] = self.durable

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
