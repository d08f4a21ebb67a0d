"""``atoll img bench``: time requests to an image."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from blockd.img import common
from coordinator.contract.errors import UsageError


def run(arguments: list[str]) -> int:
    parser = common.Parser("bench", "Time requests to an image.")
    parser.format_option()
    parser.add_argument("-c", dest="count", type=int, default=75000, help="requests")
    parser.add_argument("-d", dest="depth", type=int, default=64, help="requests at once")
    parser.add_argument("-o", dest="offset", type=common.size, default=0, help="where the first one is")
    parser.add_argument("-s", dest="size", type=common.size, default=4096, help="bytes of each")
    parser.add_argument("-S", dest="step", type=common.size, help="bytes from one to the next")
    parser.add_argument("-w", dest="write", action="store_true", help="write, not read")
    parser.add_argument("--pattern", type=int, default=0, help="byte to be written")
    parser.add_argument("--flush-interval", type=int, default=0, help="flush after so many writes")
    parser.quiet_option()
    parser.ignored("-t", "-i")
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    step = given.step or given.size
    if given.count < 1 or given.size < 1 or not 0 <= given.pattern <= 255 or given.depth < 1:
        raise UsageError("bench: count, depth and size must be at least 1, the pattern a byte")
    image = common.open_image(given.file, given.format, not given.write, given.allow_backing)
    if image.size < given.size:
        image.close()
        raise UsageError("bench: the image is smaller than one request")
    data = bytes([given.pattern]) * given.size
    span = image.size - given.size + 1

    def work(first: int) -> None:
        view = memoryview(bytearray(given.size))
        for number in range(first, given.count, workers):
            at = (given.offset + number * step) % span
            if ended.is_set():
                return
            if not given.write:
                image.read_into(at, view)
                continue
            image.write(at, data)
            if given.flush_interval and number % given.flush_interval == given.flush_interval - 1:
                image.flush()

    workers = min(given.depth, given.count)
    ended = threading.Event()
    kind = "write" if given.write else "read"
    print(
        f"Sending {given.count} {kind} requests, {given.size} bytes each, {given.depth} in parallel "
        f"(starting at offset {given.offset}, step size {step})"
    )
    begin = time.perf_counter()
    try:
        with common.told_of(given.file), ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(work, range(workers)))
            finally:  # after an error or SIGINT, nobody goes on
                ended.set()
    finally:
        image.close()
    print(f"Run completed in {time.perf_counter() - begin:.3f} seconds.")
    return 0
