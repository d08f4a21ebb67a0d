"""What ``migrate-set-parameters`` sets, by QEMU's names where QEMU has them.

Sources: QEMU's QAPI schema (MigrationParameters); names that begin with ``x-`` and the two about time are our
own.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from coordinator.contract.errors import ConfigError
from coordinator.migrate.aim import Aim
from coordinator.migrate.faults import Fault

Count = Annotated[int, msgspec.Meta(ge=1, le=16)]


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="kebab"):
    """``multifd-channels``: connections for guest memory; ``multifd-compression`` of it; ``tls-creds``:
    folder of X.509 credentials (ca-cert.pem and so on), empty for plain connections; ``tls-hostname``: name
    that the target's certificate must carry, if not that of the URI. ``stopped-time``: whether the guest's
    clock stands still or goes on while it is stopped. ``x-data-port``: where a TCP target listens for guest
    memory, 0 for any port. ``x-aim``: see aim.py, ``x-fault``: faults.py."""

    multifd_channels: Count = 1
    multifd_compression: Literal["none", "zstd"] = "none"
    multifd_zstd_level: Annotated[int, msgspec.Meta(ge=1, le=20)] = 1
    tls_creds: str = ""
    tls_hostname: str = ""
    stopped_time: Literal["stands", "passes"] = "stands"
    x_data_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    x_aim: str = ""
    unleased_disks: Literal["refuse", "allow"] = "refuse"
    x_fault: str = ""

    @property
    def zstd_level(self) -> int:
        """0 without compression."""
        return self.multifd_zstd_level if self.multifd_compression == "zstd" else 0

    def as_dict(self) -> dict[str, Any]:
        """For query-migrate-parameters."""
        result: dict[str, Any] = msgspec.to_builtins(self)
        return result

    def changed(self, values: dict[str, Any]) -> Parameters:
        """With some set anew; ConfigError names what cannot be."""
        known = self.as_dict()
        for name in values:
            if name not in known:
                raise ConfigError(f"Parameter '{name}' is unexpected (known: {', '.join(known)})")
        try:
            fresh = msgspec.convert(known | values, Parameters)
        except msgspec.ValidationError as error:
            raise ConfigError(f"migrate-set-parameters: {error}") from None
        Fault.parse(fresh.x_fault)
        Aim.parse(fresh.x_aim)
        return fresh
