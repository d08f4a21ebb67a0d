"""Mode 1 sectors of a CD-ROM as they stand on the disc: sync, header, user data, EDC, ECC.

Source: ECMA-130, clause 14 (sector layout), annex A (RSPC) and clause 14.3 (EDC). Needed by READ CD
with more than user data; vectors of sectors are computed at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

USER = 2048
#: bytes of each field (MMC-5 table 352, "Mode 1"): sync, header, user data, EDC with zeros and ECC
SYNC_SIZE, HEADER_SIZE, TRAILER_SIZE = 12, 4, 288
RAW = SYNC_SIZE + HEADER_SIZE + USER + TRAILER_SIZE
#: lead-in: LBA 0 is at 00:02:00
LEAD_IN = 150

#: READ CD fields, as byte 9 of its packet
FIELD_SYNC, FIELD_HEADER, FIELD_USER, FIELD_TRAILER = 0x80, 0x20, 0x10, 0x08
_FIELDS = ((FIELD_SYNC, 0, 12), (FIELD_HEADER, 12, 16), (FIELD_USER, 16, 2064), (FIELD_TRAILER, 2064, RAW))

Bytes = npt.NDArray[np.uint8]

SYNC = b"\x00" + b"\xff" * 10 + b"\x00"


def field_range(fields: int) -> tuple[int, int]:
    """Bytes of the raw sector that contiguous ``fields`` cover; (0, 0) for none."""
    chosen = [(start, end) for bit, start, end in _FIELDS if fields & bit]
    return (chosen[0][0], chosen[-1][1]) if chosen else (0, 0)


def fields_contiguous(fields: int) -> bool:
    """Whether ``fields`` are known ones without a gap between them (MMC-5 table 352)."""
    start, end = field_range(fields)
    return fields == sum(bit for bit, first, last in _FIELDS if start <= first and last <= end)


def msf(lba: int) -> tuple[int, int, int]:
    """Minute, second, frame of a logical address."""
    frames = lba + LEAD_IN
    return frames // 4500, frames // 75 % 60, frames % 75


def _bcd(value: int) -> int:
    return value // 10 << 4 | value % 10


def header(lba: int) -> bytes:
    """Address in BCD, then the mode byte (clause 14.2)."""
    minute, second, frame = msf(lba)
    return bytes([_bcd(minute % 100), _bcd(second), _bcd(frame), 1])


def _edc_table() -> npt.NDArray[np.uint32]:
    """P(x) = (x^16 + x^15 + x^2 + 1)(x^16 + x^2 + x + 1), least significant bit first (clause 14.3)."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(0xD8018001), table >> 1).astype(np.uint32)
    return table


def _double_table() -> Bytes:
    """Multiplication by alpha in GF(2^8), x^8 + x^4 + x^3 + x^2 + 1 (annex A.2)."""
    values = np.arange(256, dtype=np.uint16) << 1
    return np.where(values & 0x100, values ^ 0x11D, values).astype(np.uint8)


def _divide_table() -> Bytes:
    """Division by alpha + 1, which solves the two parity equations of annex A for the second symbol."""
    table = np.zeros(256, dtype=np.uint8)
    values = np.arange(256, dtype=np.uint8)
    table[values ^ _DOUBLE[values]] = values
    return table


_EDC = _edc_table()
_DOUBLE = _double_table()
_DIVIDE = _divide_table()


def edc(data: Bytes) -> npt.NDArray[np.uint32]:
    """Error detection code of each row."""
    code = np.zeros(len(data), dtype=np.uint32)
    for column in data.T:
        code = code >> 8 ^ _EDC[(code ^ column) & 0xFF]
    return code


def _vectors(major: int, minor: int, step_major: int, step_minor: int) -> npt.NDArray[np.intp]:
    """Index of every symbol of each parity vector, relative to the header (annex A.4, A.5)."""
    size = major * minor
    rows = []
    for vector in range(major):
        start = (vector >> 1) * step_major + (vector & 1)
        rows.append([(start + at * step_minor) % size for at in range(minor)])
    return np.array(rows, dtype=np.intp)


#: 86 P vectors of 24 symbols, 52 Q vectors of 43
_P = _vectors(86, 24, 2, 86)
_Q = _vectors(52, 43, 86, 88)


def _parity(body: Bytes, vectors: npt.NDArray[np.intp]) -> Bytes:
    """Two parity symbols a vector: all first symbols, then all second ones, for each row of ``body``.

    The check matrix asks that the symbols and the symbols weighted by powers of alpha both sum to 0.
    """
    total = np.zeros((len(body), len(vectors)), dtype=np.uint8)
    weighted = np.zeros_like(total)
    for column in vectors.T:
        symbol = body[:, column]
        total ^= symbol
        weighted = _DOUBLE[weighted ^ symbol]
    first = _DIVIDE[_DOUBLE[weighted] ^ total]
    return np.concatenate([first, first ^ total], axis=1)


def raw_sectors(user: bytes | bytearray, lba: int) -> Bytes:
    """Rows of 2,352 bytes for the 2,048-byte sectors in ``user``, the first of which is ``lba``."""
    data = np.frombuffer(user, dtype=np.uint8).reshape(-1, USER)
    out = np.zeros((len(data), RAW), dtype=np.uint8)
    out[:, :SYNC_SIZE] = np.frombuffer(SYNC, dtype=np.uint8)
    for row in range(len(data)):
        out[row, 12:16] = np.frombuffer(header(lba + row), dtype=np.uint8)
    out[:, 16:2064] = data
    out[:, 2064:2068] = edc(out[:, :2064]).astype("<u4").view(np.uint8).reshape(-1, 4)
    out[:, 2076:2248] = _parity(out[:, 12:2076], _P)
    out[:, 2248:2352] = _parity(out[:, 12:2248], _Q)
    return out
