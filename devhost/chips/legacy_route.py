"""Who drives IRQ0 or IRQ8: the old chip, or the HPET's legacy replacement (HPET 1.0a, 2.3.5)."""

from __future__ import annotations

from coordinator.contract.device import Pin


class _Input:
    def __init__(self, route: LegacyRoute, replacement: bool) -> None:
        self._route, self._replacement = route, replacement
        self.level = False

    def set(self, level: bool) -> None:
        self.level = level
        if self._route.replaced is self._replacement:
            self._route.irq.set(level)


class LegacyRoute:
    """A switch in front of an interrupt line. ``chip`` and ``hpet`` are its inputs; the HPET's
    ``legacy`` output calls `set` (so a `LegacyRoutes` of both lines is that pin)."""

    def __init__(self, irq: Pin) -> None:
        self.irq = irq
        self.replaced = False
        self.chip = _Input(self, False)
        self.hpet = _Input(self, True)

    def set(self, replaced: bool) -> None:
        if replaced is not self.replaced:
            self.replaced = replaced
            self.irq.set((self.hpet if replaced else self.chip).level)


class LegacyRoutes:
    """The pin that switches several lines at once."""

    def __init__(self, *routes: LegacyRoute) -> None:
        self._routes = routes

    def set(self, level: bool) -> None:
        for route in self._routes:
            route.set(level)
