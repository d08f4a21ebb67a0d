"""NBD on the wire: what the block daemon and the device host's client agree on.

Source: "The NBD protocol", doc/proto.md of the NetworkBlockDevice project; section names are
given in quotes. All integers are big-endian.
"""

from __future__ import annotations

import enum
import errno
import os
import re
import struct

# ---- "Newstyle negotiation", "Fixed newstyle negotiation" --------------------------------------
NBD_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9

#: server: NBDMAGIC, IHAVEOPT, handshake flags
GREETING = struct.Struct(">QQH")
#: client flags
CLIENT_FLAGS = struct.Struct(">I")
#: client: IHAVEOPT, option, length of the data that follows
OPTION = struct.Struct(">QII")
#: server: magic, option, reply type, length of the data that follows
OPTION_REPLY = struct.Struct(">QIII")
#: answer to NBD_OPT_EXPORT_NAME: size, transmission flags; then 124 zeroes unless NO_ZEROES was agreed
EXPORT_NAME_REPLY = struct.Struct(">QH")
EXPORT_NAME_ZEROES = 124

#: "Values", strings: a string is at most 4096 bytes
MAX_STRING = 4096
#: data of an option or of its reply that is looked at: a name and a list of wishes fit many times
MAX_OPTION = 64 << 10


def string(data: bytes) -> bytes:
    """A string in an option's data: its length, 32 bits, and its bytes."""
    return len(data).to_bytes(4, "big") + data


#: "Block size constraints": payload that every server takes when nothing else was agreed
MAX_PAYLOAD = 32 << 20
#: "Size of the export": an offset must fit a signed 64-bit number
MAX_SIZE = (1 << 63) - 1


class HandshakeFlag(enum.IntFlag):
    """ "Handshake flags"; the client's flags have the same bits."""

    FIXED_NEWSTYLE = 1 << 0
    NO_ZEROES = 1 << 1


class Option(enum.IntEnum):
    """ "Option types" """

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class OptionReply(enum.IntEnum):
    """ "Option reply types"; bit 31 marks an error."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9


OPTION_ERROR = 1 << 31


class Info(enum.IntEnum):
    """ "Option reply types", NBD_REP_INFO"""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


#: NBD_INFO_EXPORT: type, size, transmission flags
INFO_EXPORT = struct.Struct(">HQH")
#: NBD_INFO_BLOCK_SIZE: type, minimum, preferred, maximum payload
INFO_BLOCK_SIZE = struct.Struct(">HIII")


class TransmissionFlag(enum.IntFlag):
    """ "Transmission flags" """

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


# ---- "Transmission phase" ------------------------------------------------------------------------
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF

#: "Request message": magic, command flags, command, cookie, offset, length
REQUEST = struct.Struct(">IHHQQI")
#: "Simple reply message": magic, error, cookie
SIMPLE_REPLY = struct.Struct(">IIQ")
#: "Structured reply chunk message": magic, flags, type, cookie, length of what follows
CHUNK = struct.Struct(">IHHQI")


class Command(enum.IntEnum):
    """ "Request types" """

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CommandFlag(enum.IntFlag):
    """ "Command flags" """

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


#: "Structured reply flags"
CHUNK_DONE = 1 << 0


class ChunkType(enum.IntEnum):
    """ "Structured reply types"; bit 15 marks an error."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


#: "Metadata contexts", "base:allocation"
BASE_ALLOCATION = "base:allocation"
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

# ---- "Error values" --------------------------------------------------------------------------------
EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EOVERFLOW = 75
ENOTSUP = 95
ESHUTDOWN = 108

_FROM_ERRNO = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.EOPNOTSUPP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
}
_TO_ERRNO = {
    EPERM: errno.EPERM,
    EIO: errno.EIO,
    ENOMEM: errno.ENOMEM,
    EINVAL: errno.EINVAL,
    ENOSPC: errno.ENOSPC,
    EOVERFLOW: errno.EOVERFLOW,
    ENOTSUP: errno.EOPNOTSUPP,
    ESHUTDOWN: errno.ESHUTDOWN,
}


def wire_error(number: int | None) -> int:
    """The wire's number for an errno; EIO for what the protocol has no number for."""
    return _FROM_ERRNO.get(number or errno.EIO, EIO)


def host_errno(error: int) -> int:
    """The errno for a wire error. "Error values": an unknown one is to be treated as EINVAL; a
    client cannot act on that, so it is EIO here."""
    return _TO_ERRNO.get(error, errno.EIO)


# ---- names ---------------------------------------------------------------------------------------------
#: "The NBD Uniform Resource Indicator (URI) format", schemes; QEMU's older nbd:HOST:PORT and nbd:unix:PATH
_NETWORK_NAME = re.compile(r"nbds?(\+[a-z]+)?:", re.IGNORECASE)


def is_network_name(name: str) -> bool:
    """Does an image's name mean an NBD server? A file of such a name is reached as ./NAME."""
    return _NETWORK_NAME.match(name) is not None


def absolute_name(name: str) -> str:
    """An image's name that means the same in every folder."""
    return name if is_network_name(name) else os.path.abspath(name)
