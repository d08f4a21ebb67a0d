"""How the MC146818A writes down a time: BCD or binary, 12 or 24 hours, alarms with "don't care".

Source: MC146818A datasheet, "Time, calendar and alarm locations", table 2. The century at 32h is
the PC's (PS/2 and ACPI, where the FADT names it).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

REG_SECONDS = 0x00
REG_SECONDS_ALARM = 0x01
REG_MINUTES = 0x02
REG_MINUTES_ALARM = 0x03
REG_HOURS = 0x04
REG_HOURS_ALARM = 0x05
REG_WEEKDAY = 0x06
REG_DAY = 0x07
REG_MONTH = 0x08
REG_YEAR = 0x09
REG_A = 0x0A
REG_B = 0x0B
REG_C = 0x0C
REG_D = 0x0D
REG_CENTURY = 0x32

BINARY = 0x04  # register B, DM
HOURS_24 = 0x02  # register B, 24/12
PM = 0x80

#: "an alarm byte of C0h to FFh is a don't care"
DONT_CARE = 0xC0

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST = -int(timedelta(days=719_162).total_seconds())  # year 1
_LAST = int((datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC) - _EPOCH).total_seconds())

DAY = 86_400


def _to_register(value: int, mode: int) -> int:
    return value if mode & BINARY else value // 10 << 4 | value % 10


def _from_register(value: int, mode: int) -> int:
    return value if mode & BINARY else (value >> 4) * 10 + (value & 15)


def _hour_to_register(hour: int, mode: int) -> int:
    if mode & HOURS_24:
        return _to_register(hour, mode)
    return _to_register((hour + 11) % 12 + 1, mode) | (PM if hour >= 12 else 0)


def _hour_from_register(value: int, mode: int) -> int:
    if mode & HOURS_24:
        return _from_register(value, mode)
    hour = _from_register(value & ~PM, mode)
    return (0 if hour == 12 else hour) + (12 if value & PM else 0)


def encode(seconds: int, mode: int, weekday_shift: int) -> dict[int, int]:
    """UNIX seconds -> register values; ``mode`` is register B. Years outside 1 to 9999 stick at the end."""
    date = _EPOCH + timedelta(seconds=min(max(seconds, _FIRST), _LAST))
    return {
        REG_SECONDS: _to_register(date.second, mode),
        REG_MINUTES: _to_register(date.minute, mode),
        REG_HOURS: _hour_to_register(date.hour, mode),
        REG_WEEKDAY: (date.isoweekday() + weekday_shift) % 7 + 1,  # Sunday = 1
        REG_DAY: _to_register(date.day, mode),
        REG_MONTH: _to_register(date.month, mode),
        REG_YEAR: _to_register(date.year % 100, mode),
        REG_CENTURY: _to_register(date.year // 100, mode),
    }


def decode(registers: Sequence[int]) -> tuple[int, int]:
    """Register values -> (UNIX seconds, weekday shift for `encode`). A guest may have stored
    nonsense: fields beyond their range carry over, as a running clock would bring them in."""
    mode = registers[REG_B]

    def field(address: int) -> int:
        return _from_register(registers[address], mode)

    year = min(max(field(REG_CENTURY) * 100 + field(REG_YEAR), 1), 9998)
    month = min(max(field(REG_MONTH), 1), 12)
    date = datetime(year, month, 1, tzinfo=UTC) + timedelta(
        days=max(field(REG_DAY), 1) - 1,
        hours=_hour_from_register(registers[REG_HOURS], mode),
        minutes=field(REG_MINUTES),
        seconds=field(REG_SECONDS),
    )
    seconds = int((date - _EPOCH).total_seconds())
    return seconds, (registers[REG_WEEKDAY] - 1 - date.isoweekday()) % 7


def _matching(value: int | None, limit: int) -> Sequence[int]:
    """The times that an alarm field fits: all (None), one, or none."""
    if value is None:
        return range(limit)
    return (value,) if value < limit else ()


def next_alarm(seconds: int, registers: Sequence[int]) -> int | None:
    """The first second after ``seconds`` that the alarm bytes fit, or None."""
    mode = registers[REG_B]

    def field(address: int) -> int | None:
        value = registers[address]
        if value & DONT_CARE == DONT_CARE:
            return None
        return _hour_from_register(value, mode) if address == REG_HOURS_ALARM else _from_register(value, mode)

    hours = _matching(field(REG_HOURS_ALARM), 24)
    minutes = _matching(field(REG_MINUTES_ALARM), 60)
    tail = _matching(field(REG_SECONDS_ALARM), 60)
    midnight, of_day = (seconds + 1) // DAY * DAY, (seconds + 1) % DAY
    for start, earliest in ((midnight, of_day), (midnight + DAY, 0)):
        for hour in hours:
            if hour * 3600 + 3599 < earliest:
                continue
            for minute in minutes:
                if hour * 3600 + minute * 60 + 59 < earliest:
                    continue
                for second in tail:
                    if hour * 3600 + minute * 60 + second >= earliest:
                        return start + hour * 3600 + minute * 60 + second
    return None
