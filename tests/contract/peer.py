"""A process that posts: ``python -m tests.contract.peer FD DOORBELL VCPU COUNT``.

Values are VCPU << 32 | n.
"""

from __future__ import annotations

import sys

from coordinator.contract._segment import ffi, lib
from coordinator.contract.segment import Segment


def main() -> None:
    fd, doorbell, vcpu, count = map(int, sys.argv[1:])
    segment = Segment.attach(fd)
    entry = ffi.new("struct posted_entry *")
    entry.width, entry.vcpu = 4, vcpu
    for n in range(count):
        entry.addr, entry.value = 0x3F8 + vcpu, vcpu << 32 | n
        lib.ring_post(segment.header, 0, entry, 0, doorbell)


if __name__ == "__main__":
    main()
