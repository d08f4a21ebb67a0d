"""Address line 20: two switches - keyboard controller and port 92h - of which either opens it."""

from __future__ import annotations

from collections.abc import Callable

KEYBOARD, PORT_92 = 0, 1


class A20Pin:
    """One switch's end."""

    def __init__(self, gate: A20Gate, number: int) -> None:
        self._gate, self._number = gate, number

    def set(self, level: bool) -> None:
        self._gate.drive(self._number, level)


class A20Gate:
    """``changed(is_open)`` is called when the line is gated or let through."""

    def __init__(self, changed: Callable[[bool], None]) -> None:
        self._changed = changed
        self._levels = [True, True]
        self.is_open = True

    def pin(self, number: int) -> A20Pin:
        return A20Pin(self, number)

    def drive(self, number: int, level: bool) -> None:
        """A switch opens (``level``) or shuts."""
        self._levels[number] = level
        is_open = any(self._levels)
        if is_open != self.is_open:
            self.is_open = is_open
            self._changed(is_open)
