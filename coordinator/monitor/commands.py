"""The monitor's commands in one table. Each takes the words of its line and returns text.

Spelling and arguments follow QEMU's human monitor.
"""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from coordinator import media, screen
from coordinator.cli.options import nearest
from coordinator.contract import messages
from coordinator.contract.errors import AtollError, UsageError
from coordinator.machine import Vm
from coordinator.migrate import snapshot
from coordinator.monitor import info, memory

log = logging.getLogger(__name__)

#: words behind ``info`` that need no island
EARLY_TOPICS: tuple[list[str], ...] = ([], ["status"], ["version"])


@dataclass(frozen=True)
class Context:
    vm: Vm
    cpu: int
    #: the part of the command word behind a slash, as in ``x/4xw``
    suffix: str


@dataclass(frozen=True)
class Command:
    """``early``: can be carried out while the machine is still starting."""

    run: Callable[[Context, list[str]], Awaitable[str]]
    arguments: str
    about: str
    early: bool = False


async def execute(vm: Vm, line: str, cpu: int = 0) -> str:
    """Run one line; errors come back as text, as a person wants to read them."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return f"{error}\n"
    if not words:
        return ""
    if not 0 <= cpu < vm.machine.vcpus:
        return f"there is no CPU {cpu}\n"
    head, slash, suffix = words[0].partition("/")
    command = COMMANDS.get(_ALIASES.get(head, head))
    if command is None:
        return f"unknown command: '{head}'; the nearest known one is '{nearest(head, COMMANDS)}'\n"
    try:
        if not (command.early or (words[0] == "info" and words[1:2] in EARLY_TOPICS)):
            await vm.started()
        return await command.run(Context(vm, cpu, suffix if slash else ""), words[1:])
    except UsageError as error:
        return f"{error}\nusage: {head} {command.arguments}\n"
    except (AtollError, OSError) as error:
        return f"Error: {error}\n"
    except Exception as error:  # a mistake of ours, or a name no system call takes: the monitor goes on
        log.info("monitor: %s: %r", line, error, exc_info=error)
        return f"Error: the command failed: {error!r}\n"


def _expect(words: list[str], least: int, most: int) -> None:
    if not least <= len(words) <= most:
        raise UsageError("too few words" if len(words) < least else "too many words")


async def _help(c: Context, words: list[str]) -> str:
    if words and words[0] == "info":
        return "".join(f"info {name:<12} {topic.about}\n" for name, topic in info.TOPICS.items())
    return "".join(f"{f'{name} {cmd.arguments}':<44} {cmd.about}\n" for name, cmd in COMMANDS.items())


async def _info(c: Context, words: list[str]) -> str:
    if not words:
        return await _help(c, ["info"])
    topic = info.TOPICS.get(words[0])
    if topic is None:
        return f"unknown topic: '{words[0]}'; the nearest known one is '{nearest(words[0], info.TOPICS)}'\n"
    return await topic.show(c.vm, c.cpu)


async def _stop(c: Context, words: list[str]) -> str:
    await c.vm.stop()
    return ""


async def _cont(c: Context, words: list[str]) -> str:
    await c.vm.cont()
    return ""


async def _quit(c: Context, words: list[str]) -> str:
    c.vm.quit()
    return ""


async def _reset(c: Context, words: list[str]) -> str:
    await c.vm.reset()
    return ""


async def _powerdown(c: Context, words: list[str]) -> str:
    await c.vm.command("devhost0", messages.PowerButton(serial=c.vm.next_serial()))
    c.vm.event("POWERDOWN")
    return ""


async def _eject(c: Context, words: list[str]) -> str:
    force = "-f" in words
    words = [word for word in words if word != "-f"]
    _expect(words, 1, 1)
    await media.eject(c.vm, words[0], force)
    return ""


async def _change(c: Context, words: list[str]) -> str:
    force = "-f" in words
    words = [word for word in words if word != "-f"]
    _expect(words, 2, 3)
    await media.change(c.vm, words[0], words[1], words[2] if len(words) > 2 else None, force)
    return ""


async def _screendump(c: Context, words: list[str]) -> str:
    image_format = "ppm"
    if "-f" in words:
        at = words.index("-f")
        _expect(words[at:], 2, 2 + len(words))
        image_format = words[at + 1]
        del words[at : at + 2]
    _expect(words, 1, 1)
    if image_format not in screen.FORMATS:
        raise UsageError(f"format {image_format} is not known")
    await screen.dump(c.vm, os.path.abspath(words[0]), image_format)
    return ""


async def _sendkey(c: Context, words: list[str]) -> str:
    _expect(words, 1, 2)
    try:
        hold = int(words[1]) if len(words) > 1 else 100
    except ValueError:
        raise UsageError(f"'{words[1]}' is not a time in milliseconds") from None
    keys = tuple(words[0].split("-"))
    await c.vm.command("devhost0", messages.SendKeys(serial=c.vm.next_serial(), keys=keys, hold_ms=hold))
    return ""


async def _nmi(c: Context, words: list[str]) -> str:
    for role in c.vm.vcpus:
        await c.vm.command(role, messages.InjectNmi(serial=c.vm.next_serial()))
    return ""


async def _savevm(c: Context, words: list[str]) -> str:
    _expect(words, 0, 1)
    await snapshot.save(c.vm, words[0] if words else snapshot.new_tag(), replace=True)
    return ""


async def _loadvm(c: Context, words: list[str]) -> str:
    _expect(words, 1, 1)
    await snapshot.load(c.vm, words[0])
    return ""


async def _delvm(c: Context, words: list[str]) -> str:
    _expect(words, 1, 1)
    await snapshot.delete(c.vm, words[0])
    return ""


async def _dump(c: Context, words: list[str]) -> str:
    flags = {word for word in words if word.startswith("-")}
    words = [word for word in words if word not in flags]
    if wrong := flags - {"-p", "-d"}:
        raise UsageError(f"{min(wrong)} is not known")
    if len(words) not in (1, 3):
        raise UsageError("a file, or a file, where to begin and how many bytes")
    try:
        begin, length = (int(word, 0) for word in words[1:]) if words[1:] else (None, None)
    except ValueError:
        raise UsageError(f"'{words[1]}' and '{words[2]}' are not both numbers") from None
    protocol = words[0] if words[0].startswith(("file:", "fd:")) else f"file:{words[0]}"
    wanted, fd = c.vm.dumps.begin("-p" in flags, protocol, begin, length, "elf")
    if "-d" in flags:
        c.vm.spawn(c.vm.dumps.run_detached(wanted, fd))
    else:
        await c.vm.dumps.run(wanted, fd)
    return ""


def _format(c: Context, words: list[str]) -> tuple[str, str]:
    """Format and address of ``x/4xw ADDRESS`` and of ``x /4xw ADDRESS``."""
    suffix = c.suffix
    if not suffix and words and words[0].startswith("/"):
        suffix, words = words[0][1:], words[1:]
    if not words:
        raise UsageError("too few words")
    return suffix, "".join(words)


async def _x(c: Context, words: list[str]) -> str:
    return await memory.dump_virtual(c.vm, c.cpu, *_format(c, words))


async def _xp(c: Context, words: list[str]) -> str:
    return await memory.dump_physical(c.vm, *_format(c, words))


COMMANDS: dict[str, Command] = {
    "help": Command(_help, "[info]", "this list", early=True),
    "info": Command(_info, "TOPIC", "state of the machine; 'help info' lists the topics"),
    "stop": Command(_stop, "", "pause the guest"),
    "cont": Command(_cont, "", "let the guest run"),
    "quit": Command(_quit, "", "end the machine", early=True),
    "system_reset": Command(_reset, "", "reset the machine"),
    "system_powerdown": Command(_powerdown, "", "press the power button"),
    "eject": Command(_eject, "[-f] DRIVE", "open the tray and take the medium out"),
    "change": Command(_change, "[-f] DRIVE FILE [FORMAT]", "put another medium in"),
    "screendump": Command(_screendump, "FILE [-f ppm|png]", "save the screen as a picture"),
    "sendkey": Command(_sendkey, "KEYS [HOLD_MS]", "press keys, as in ctrl-alt-delete"),
    "nmi": Command(_nmi, "", "inject an NMI on every CPU"),
    "savevm": Command(_savevm, "[TAG]", "keep memory, devices and disks in the disks, as a snapshot"),
    "loadvm": Command(_loadvm, "TAG", "go back to a snapshot of the whole machine"),
    "delvm": Command(_delvm, "TAG", "forget a snapshot of the whole machine"),
    "dump-guest-memory": Command(
        _dump, "[-p] [-d] FILE [BEGIN LENGTH]", "memory and registers as an ELF core; -p by linear addresses"
    ),
    "x": Command(_x, "/FMT ADDRESS", "memory at a linear address"),
    "xp": Command(_xp, "/FMT ADDRESS", "memory at a guest-physical address"),
}
_ALIASES = {"c": "cont", "q": "quit", "?": "help"}
