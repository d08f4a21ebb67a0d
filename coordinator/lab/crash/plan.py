"""What is to be tried: one guest, so many kills, at moments drawn from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from coordinator.contract.errors import ConfigError
from coordinator.lab.plan import Natural, Positive


class Trial(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """``kills`` of islands of one guest.

    ``spacing``: ms from one to the next, half of it more or less; 0: as soon as the role drawn is there
    again. A role is killed again only once it has been replaced; others may be killed meanwhile.
    ``roles``: a role drawn from these, devhost standing for all device hosts. ``hang``: share of them that
    are stopped (SIGSTOP) instead of killed, so that the coordinator has to find out; ``island-timeout``:
    after how many seconds it does. ``ram``, ``cd``, ``disk`` are MiB. ``patience``: seconds in which an
    island is to be replaced and the guest to read on.
    """

    kills: Positive = 200
    spacing: Natural = 500
    seed: int = 1
    roles: tuple[str, ...] = ("devhost", "blockd")
    hang: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    island_timeout: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    ram: Annotated[int, msgspec.Meta(ge=96, le=16384)] = 192
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    cd: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 4
    disk: Annotated[int, msgspec.Meta(ge=48, le=256)] = 64
    patience: Annotated[float, msgspec.Meta(gt=0)] = 120.0

    def has(self, role: str) -> bool:
        """Whether an island may be drawn."""
        return any(role == word or role.rstrip("0123456789") == word for word in self.roles)


def trial(fields: Mapping[str, Any]) -> Trial:
    """From words as on a command line; ConfigError says what does not fit."""
    words = dict(fields)
    if isinstance(roles := words.get("roles"), str):
        words["roles"] = tuple(dict.fromkeys(filter(None, roles.split(","))))
    try:
        made = msgspec.convert(words, Trial, strict=False)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$.")
        if key := place.removesuffix("`"):
            what = f"{key} = {words.get(key)}: {what}"
        raise ConfigError(what) from None
    for role in made.roles:
        if role.rstrip("0123456789") not in ("devhost", "blockd"):
            raise ConfigError(f"roles = {role}: choose from devhost, devhostN, blockd, which can be replaced")
    if not made.roles:
        raise ConfigError("roles: say at least one of devhost, devhostN, blockd")
    return made
