"""Version 0 of a CD-ROM drive's record: what emulators of 2015 sent, and how this build completes it.

It has the registers, the state between commands (sense, tray, events) and, while DRQ is set, the PIO
buffer with its cursor. It has nothing else of a packet command: for a DMA command neither the address
nor the length, nor that it waits for the bus master. All that is left of one is its packet, which
came through the PIO buffer and still lies there until data takes its place.

So a record whose buffer is a whole packet is a DMA command that was lost: a PIO command would have gone
on to its data phase. It becomes phase "incomplete", and the drive's policy decides when the machine
starts. docs/migration.md lists the fields.
"""

from __future__ import annotations

import enum
from typing import Any

from coordinator.contract.errors import RecordError
from devhost.ide import registers as reg
from devhost.ide.phases import Phase, Request
from devhost.ide.records import AtapiState, OldAtapiState, PioState, RegisterState

PACKET, IDENTIFY_PACKET_DEVICE = 0xA0, 0xA1
PACKET_SIZE = 12
FEATURE_DMA = 0x01
#: MODE SELECT(10) with PF: the one command with a parameter list. Its packet is gone when the list comes
MODE_SELECT = bytes((0x55, 0x10)).ljust(PACKET_SIZE, b"\0")


class Then(enum.Enum):
    """What the PIO buffer is, and so what follows when it is through."""

    PACKET = "packet"  # evaluated when whole; empty: data of a DMA command has taken its place
    REPLY = "reply"  # data of a packet command for the host
    PARAMETERS = "parameters"  # data of a packet command from the host
    STOP = "stop"  # data of an ATA command for the host


def older(state: AtapiState) -> OldAtapiState:
    """The record without the command. RecordError while the drive works on the medium (see Drive.pause)."""
    phase = Phase(state.phase)
    if phase is Phase.MEDIUM:
        raise RecordError("record of ide-cd version 0: the drive is busy with its medium")
    return OldAtapiState(**_registers(state), unit=state.unit, pio=_pio(phase, state))


def _pio(phase: Phase, state: AtapiState) -> PioState | None:
    if phase is Phase.IDLE:
        return None
    buffer, position, end = state.buffer, state.position, state.burst_end
    offset, remaining, shape = state.offset, state.remaining, state.shape
    if phase in (Phase.PIO_IN, Phase.PIO_OUT):
        then = Then.PARAMETERS if phase is Phase.PIO_OUT else Then.REPLY
        if state.opcode != PACKET:
            then = Then.STOP
    else:
        then, end = Then.PACKET, PACKET_SIZE
        overwritten = phase is Phase.DMA_WAIT and (state.begun or state.position > 0)
        position = 0 if overwritten else state.packet_filled
        buffer = state.packet[:position]
        if phase is not Phase.PACKET and not position:
            end = 0
        offset = remaining = shape = 0
    return PioState(
        buffer=buffer,
        position=position,
        end=end,
        then=then.value,
        byte_limit=state.byte_limit,
        offset=offset,
        remaining=remaining,
        shape=shape,
    )


def newer(old: OldAtapiState) -> AtapiState:
    """The record as this build has it. RecordError where its buffer cannot be."""
    fields: dict[str, Any] = {
        "phase": Phase.IDLE.value, "opcode": 0, "request": Request.NONE.value, "use_dma": False,
        "to_host": True, "direct": False, "begun": False, "buffer": b"", "position": 0, "burst_end": 0,
        "offset": 0, "remaining": 0, "packet": bytes(PACKET_SIZE), "packet_filled": 0,
        "byte_limit": 0, "shape": 0,
    }  # fmt: skip
    if old.pio is not None:
        fields |= _command(old, old.pio)
    return AtapiState(**_registers(old), unit=old.unit, **fields)


def _command(old: OldAtapiState, pio: PioState) -> dict[str, Any]:
    """What can be told of the command."""
    try:
        then = Then(pio.then)
    except ValueError as error:
        raise RecordError(f"record of ide-cd version 0: {error}") from None
    if then is Then.PACKET:
        return _packet(old, pio)
    to_host = then is not Then.PARAMETERS
    return {
        "phase": (Phase.PIO_IN if to_host else Phase.PIO_OUT).value,
        "opcode": IDENTIFY_PACKET_DEVICE if then is Then.STOP else PACKET,
        # a read from the medium has moved its cursor before the first byte reaches the host
        "request": (Request.READ if pio.offset else Request.NONE).value,
        "to_host": to_host,
        "buffer": pio.buffer,
        "position": pio.position,
        "burst_end": pio.end,
        "offset": pio.offset,
        "remaining": pio.remaining,
        "packet": bytes(PACKET_SIZE) if to_host else MODE_SELECT,
        "packet_filled": PACKET_SIZE if then is not Then.STOP else 0,
        "byte_limit": pio.byte_limit,
        "shape": pio.shape,
    }


def _packet(old: OldAtapiState, pio: PioState) -> dict[str, Any]:
    dma = bool(old.current[reg.FEATURES - 1] & FEATURE_DMA)  # as PACKET itself reads it
    whole, none = pio.position == PACKET_SIZE, pio.end == 0
    if pio.position != len(pio.buffer) or pio.position > PACKET_SIZE or (whole or none) and not dma:
        raise RecordError("record of ide-cd version 0: a packet that cannot be")
    phase = Phase.INCOMPLETE if whole or none else Phase.PACKET
    return {
        "phase": phase.value,
        "opcode": PACKET,
        "use_dma": dma,
        "packet": pio.buffer.ljust(PACKET_SIZE, b"\0"),
        "packet_filled": pio.position,
        "byte_limit": pio.byte_limit,
    }


def _registers(state: RegisterState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in RegisterState.__struct_fields__}
