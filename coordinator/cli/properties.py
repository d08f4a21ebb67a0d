"""-global and the properties of -device that say what migration does with a drive's command."""

from __future__ import annotations

import msgspec

from coordinator.cli.options import KeyValues
from coordinator.cli.settings import Settings
from coordinator.contract.drives import PROPERTIES, DrivePolicy, set_property
from coordinator.contract.errors import UsageError


def global_property(s: Settings, value: str) -> None:
    """``ide-cd.migrate-drain=500``, or the same as driver=, property= and value=."""
    if value.startswith("driver="):
        kv = KeyValues("global", value)
        driver, name, text = kv.need("driver"), kv.need("property"), kv.need("value")
        kv.done(("driver", "property", "value"))
    else:
        left, equals, text = value.partition("=")
        driver, dot, name = left.partition(".")
        if not equals or not dot:
            raise UsageError(f"-global {value}: say DRIVER.PROPERTY=VALUE, like ide-cd.migrate-stream=full")
    _check("-global", driver, name, text)
    s.globals.append((driver, name, text))


def take(s: Settings, kv: KeyValues, driver: str, ident: str) -> None:
    """Of -device: these stand above -global."""
    own = [(name, text) for name in PROPERTIES[driver] if (text := kv.take(name)) is not None]
    for name, text in own:
        _check(f"-device {driver}", driver, name, text)
    s.own_properties[ident] = own


def _check(option: str, driver: str, name: str, text: str) -> None:
    try:
        set_property(DrivePolicy(), driver, name, text)
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def apply(s: Settings) -> None:
    """Give each drive its policy, when all of them are known."""
    for at, drive in enumerate(s.drives):
        policy = drive.policy
        wanted = [(name, text) for driver, name, text in s.globals if driver == drive.driver]
        for name, text in wanted + s.own_properties.get(drive.id, []):
            policy = set_property(policy, drive.driver, name, text)
        s.drives[at] = msgspec.structs.replace(drive, policy=policy)
