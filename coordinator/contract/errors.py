"""Errors of the project, one root.

    AtollError                 anything a user can be told in one line
     +-- UsageError            the command line or a QMP argument is wrong (exit 2)
     +-- ConfigError           a file, size or option does not fit (exit 1)
     +-- SegmentError          the shared segment is not ours, or of another layout
     +-- MessageError          a message from another process does not parse
     +-- RecordError           a state record is unknown, incomplete, or has left-over fields
     +-- IslandError           a process of the machine failed or died
     +-- BlockError            a block request or export failed
     +-- MigrationError        a stream does not fit or ends, or the other side is gone

Guest faults are data, not exceptions: nothing a guest does raises one of these.
"""

from __future__ import annotations


class AtollError(Exception):
    """Root. ``str()`` is one line: what failed, on what, what to do."""

    exit_status = 1


class UsageError(AtollError):
    """The command line is wrong."""

    exit_status = 2


class ConfigError(AtollError):
    """Something the user named cannot be used."""


class SegmentError(AtollError):
    """The segment has another magic, layout or size."""


class MessageError(AtollError):
    """A frame that is no message of ours."""


class RecordError(AtollError):
    """A state record that cannot be loaded."""


class IslandError(AtollError):
    """A process of the machine could not start, or died."""


class BlockError(AtollError):
    """An image or NBD request failed; ``errno`` is the POSIX number."""

    def __init__(self, message: str, errno: int = 5) -> None:
        super().__init__(message)
        self.errno = errno


class MigrationError(AtollError):
    """A machine could not be moved, saved or taken over."""
