"""Why the core came out of the guest: ``enum vcpu_exit`` of segment.h."""

from __future__ import annotations

import enum


class Exit(enum.IntEnum):
    NONE = 0
    #: counted only: a sync access is answered inside run()
    IO = 1
    CONTROL = 2
    #: counted only: the PIC was asked for its vector
    INTA = 3
    SHUTDOWN = 4
    BUDGET = 5
    DEBUG = 6
    ERROR = 7
