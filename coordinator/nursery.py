"""The fork server's own modules: imported there once, so that an island starts by a fork of some
milliseconds instead of an interpreter and its imports.

Nothing here starts a thread or opens a ZeroMQ context; the fork server never has more than one thread.
"""

from __future__ import annotations

import importlib
import os

import setproctitle

import blockd.main
import coordinator.contract.island
import devhost.main
import vcpu.main
from coordinator.islands import NAME_VARIABLE, redirect

PRELOADED = (blockd.main, coordinator.contract.island, devhost.main, vcpu.main)

for _late in blockd.main.LATE:
    importlib.import_module(_late)

if NAME_VARIABLE in os.environ:  # not where somebody only wants the modules
    redirect(0, os.devnull, os.O_RDONLY)
    redirect(1, os.devnull, os.O_WRONLY)
    setproctitle.setproctitle(f"atoll nursery {os.environ.pop(NAME_VARIABLE)}")
