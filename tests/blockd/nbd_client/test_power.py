"""What a flush has confirmed is there, however often the server loses power and with it what it had only
acknowledged."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from blockd.nbd.remote import NbdImage
from tests.blockd.nbd_client.script import name, read
from tests.blockd.nbd_client.volatile import Volatile

PART = 64 << 10
THREADS = 3


@pytest.mark.parametrize("seed", range(4))
def test_no_write_is_lost(runtime: Path, seed: int) -> None:
    rnd = random.Random(seed)
    server = Volatile(str(runtime / "s"), PART * THREADS, rnd, outages=10)
    image = NbdImage(name(str(runtime / "s"), reconnect_delay=60))
    models = [bytearray(PART) for _ in range(THREADS)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        own, model, base = random.Random(100 * seed + number), models[number], number * PART
        try:
            for _ in range(300):
                length = own.choice([1, 100, 512, 5000])
                offset = own.randrange(PART - length)
                kind = own.random()
                if kind < 0.6:
                    model[offset : offset + length] = own.randbytes(length)
                    image.write(base + offset, model[offset : offset + length], fua=kind < 0.1)
                elif kind < 0.75:
                    model[offset : offset + length] = bytes(length)
                    image.write_zeroes(base + offset, length, unmap=True, fast=False)
                elif kind < 0.85:
                    image.flush()
                    assert server.durable[base : base + PART] == model
                else:
                    assert read(image, base + offset, length) == model[offset : offset + length]
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and server.outages >= 5
    image.flush()
    assert server.durable == b"".join(models)
    image.close()
    server.close()
