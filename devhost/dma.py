"""Guest memory for bus masters, over the segment."""

from __future__ import annotations

from typing import Any

from coordinator.contract.segment import Segment


class SegmentDma:
    """``contract.device.Dma``. Every store marks dirty and code pages after it has landed; ``counter`` is the
    host's block in the segment."""

    def __init__(self, segment: Segment, counter: Any) -> None:
        self._segment = segment
        self._counter = counter
        self.read = segment.dma_read

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self._segment.dma_write(gpa, data)
        self._counter.dma_bytes += len(data)

    def span(self, gpa: int, length: int) -> memoryview | None:
        return self._segment.dma_span(gpa, length)

    def written(self, gpa: int, length: int) -> None:
        self._segment.dma_written(gpa, length)
        self._counter.dma_bytes += length
