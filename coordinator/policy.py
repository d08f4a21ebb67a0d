"""How a machine behaves, apart from what it is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """``start_paused`` is -S, the others are named as the options are. ``incoming``: where the guest comes
    from, None where it starts here; ``loadvm``: the snapshot that it goes on from."""

    start_paused: bool = False
    no_reboot: bool = False
    no_shutdown: bool = False
    incoming: str | None = None
    loadvm: str | None = None
    #: islands give up what they do not need
    sandbox: bool = True
    #: seconds after which a device host or block daemon that says nothing is killed and replaced; 0: never
    island_timeout: float = 30.0
    #: for experiments: where device hosts die, see devhost/faults.py
    fault: str = ""
    #: device hosts commit what they do, so that another one can go on where one has died
    commits: bool = True
