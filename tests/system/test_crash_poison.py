"""A device that kills its host whenever a register is accessed: unplugged, and the rest goes on."""

from __future__ import annotations

from typing import Any

from tests.system.machine import CONSOLE, until, with_qmp

RESET_PORT = 0xCF9


def test_a_poisoned_register_costs_its_device() -> None:
    """The guest asks for a reset ("R"), and the reset port's device dies of it."""
    options = ["-smp", "2", "-x-fault", f"port:{RESET_PORT:#x}"]
    with with_qmp(*CONSOLE, *options) as machine, machine.qmp() as qmp:
        machine.says("ready")
        events: list[dict[str, Any]] = []

        def told() -> list[dict[str, Any]]:
            events.extend(qmp.get_events())
            return [event["data"] for event in events if event["event"] == "DEVICE_UNPLUGGED_BY_FAULT"]

        machine.type(b"R")
        access = f"a write to port {RESET_PORT:#x}"
        (data,) = until(told, "the event")
        assert data == {"device": "reset", "role": "devhost0", "access": access, "deaths": 3}
        machine.type(b"a")
        machine.says("got 61")
        machine.type(b"R")  # there is no such port any more
        machine.type(b"b")
        machine.says("got 62")
        until(lambda: told() and len(restarts(events)) == 3, "three replacements")
        assert all("SIGSEGV" in data["cause"] for data in restarts(events))
        machine.type(b"O")
        assert machine.wait() == 0
        assert f"reset: unplugged: devhost0 has died 3 times at {access}" in machine.errors()
        machine.gone()


def restarts(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event["data"] for event in events if event["event"] == "ISLAND_RESTARTED"]
