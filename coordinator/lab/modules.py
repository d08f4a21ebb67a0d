"""Kernel modules in the order in which `insmod` must load them.

Debian's package has no `modules.dep` (depmod writes it at installation), so the dependencies are
read from the modules themselves: `modinfo` keeps them as NUL-terminated `key=value` strings in the
section `.modinfo`, and `modules.builtin` names what needs no loading.
"""

import lzma
import re
from collections.abc import Iterable
from pathlib import Path

DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def module_name(path: str) -> str:
    """The kernel's name of a module file: `drivers/ata/ata_piix.ko.xz` is `ata_piix`."""
    return path.rpartition("/")[2].split(".")[0].replace("-", "_")


def module_bytes(path: Path) -> bytes:
    """The module as ELF, uncompressed."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def depends(elf: bytes) -> list[str]:
    """The names of the modules that this one needs."""
    match = DEPENDS.search(elf)
    return [name for name in match.group(1).decode().split(",") if name] if match else []


def load_order(modules_dir: Path, wanted: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, ELF) of the wanted modules and all that they need, each after what it needs.

    Raises KeyError with the name of a module that the kernel package lacks.
    """
    files = {module_name(path.name): path for path in (modules_dir / "kernel").rglob("*.ko*")}
    builtin = {module_name(line) for line in (modules_dir / "modules.builtin").read_text().split()}
    order: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in builtin or name in order:
            return
        elf = module_bytes(files[name])
        for needed in depends(elf):
            add(needed.replace("-", "_"))
        order[name] = elf

    for name in wanted:
        add(name)
    return list(order.items())
