"""A device host with one device more, which does what a guest that has taken its model over would do.

As devhost/main.py, but for the device. A byte written to its port is the number of an attempt
(attempts.py); a byte read is what came of it.

python -m tests.sandbox.device_host CONFIG VICTIM FOLDER, CONFIG being DevhostConfig as JSON.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

import msgspec

from coordinator.contract.config import DevhostConfig
from coordinator.contract.device import Device
from coordinator.contract.island import enter
from coordinator.contract.registers import Register, RegisterMap
from coordinator.contract.sandbox import Sandbox
from coordinator.contract.segment import Segment
from coordinator.contract.state import Record
from devhost.commands import Commands
from devhost.main import places
from devhost.pc import Pc
from devhost.service import Service
from tests.sandbox import attempts

PORT = 0x700


class BurglarRecord(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "burglar"
    result: int


class Burglar(Device):
    kind = "burglar"
    ranges = {"main": RegisterMap(Register("ATTEMPT", 0))}

    def __init__(self) -> None:
        self._result = 0

    def read(self, offset: int, width: int, range_name: str = "main") -> int:
        return self._result

    def write(self, offset: int, width: int, value: int, range_name: str = "main") -> None:
        self._result = attempts.ATTEMPTS[attempts.NAMES[value]]()

    def reset(self, hard: bool = True) -> None:
        self._result = 0

    def save(self) -> BurglarRecord:
        return BurglarRecord(result=self._result)

    def load(self, record: Record) -> None:
        assert isinstance(record, BurglarRecord)
        self._result = record.result


def main(config: DevhostConfig) -> None:
    sandbox = Sandbox("devhost", "devhost0", True, places(config))
    enter("devhost0", config.vm, config.parent, config.log, sandbox)
    service = Service(config, Segment.attach(config.segment_fd))
    pc = Pc(service, config.machine)
    pc.plug("burglar", Burglar(), (PORT, "main"))
    service.handle = Commands(pc).handle
    sandbox.seal()
    service.run()


if __name__ == "__main__":
    attempts.prepare(Path(sys.argv[3]), int(sys.argv[2]))
    main(msgspec.json.decode(sys.argv[1], type=DevhostConfig))
