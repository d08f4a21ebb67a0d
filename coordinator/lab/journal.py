"""A file of records, one line of JSON each, that begins with the plan they are of.

A record is written whole when what it tells of is over, so a run that ended early goes on behind its last
record (``--resume``).
"""

from __future__ import annotations

import os
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import msgspec

from coordinator.contract.errors import ConfigError

R = TypeVar("R", bound=msgspec.Struct)


class Journal(Generic[R]):
    """All records of a run, in memory (``keep``) and in a file if there is one. A subclass names its types:
    ``begin`` is that of the first line, with a field ``plan``."""

    begin: ClassVar[type[msgspec.Struct]]
    decoder: ClassVar[msgspec.json.Decoder[Any]]

    def __init__(self, plan: Any, path: Path | None = None, resume: bool = False) -> None:
        """ConfigError where the file cannot be used, is of another plan, or is there already and is not to be
        gone on with."""
        self.plan = plan
        self.path = path
        self._file = None
        if path is None:
            return
        try:
            if path.exists() and path.stat().st_size:
                if not resume:
                    raise ConfigError(f"{path}: is there already; --resume goes on with it")
                self._resume(path)
            self._file = path.open("ab", buffering=0)
            if not path.stat().st_size:
                self._append(self.begin(plan=plan))
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from None

    def _resume(self, path: Path) -> None:
        records, whole = self.read(path)
        if not records or not isinstance(records[0], self.begin):
            raise ConfigError(f"{path}: does not begin with a plan")
        if records[0].plan != self.plan:  # type: ignore[attr-defined]
            raise ConfigError(f"{path}: is of another plan than the one asked for now")
        for record in records[1:]:
            self.keep(record)  # type: ignore[arg-type]
        os.truncate(path, whole)

    @abstractmethod
    def keep(self, record: R) -> None:
        """Take a record in."""

    def _append(self, record: msgspec.Struct) -> None:
        if self._file is not None:
            self._file.write(msgspec.json.encode(record) + b"\n")

    def add(self, record: R) -> None:
        self.keep(record)
        self._append(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @classmethod
    def read(cls, path: Path) -> tuple[list[msgspec.Struct], int]:
        """Records of a file, and how many bytes of it are whole lines: the last one may have been cut off.
        ConfigError names a line that is no record."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        records = []
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                records.append(cls.decoder.decode(line))
            except msgspec.MsgspecError as error:
                raise ConfigError(f"{path}, line {number}: {error}") from None
        return records, whole
