"""SET FEATURES, subcommand 03h: the transfer mode (ATA/ATAPI-6 8.46.11, table 44)."""

from __future__ import annotations

#: PIO default, PIO default without IORDY
_DEFAULT_PIO = (0x00, 0x01)
#: flow-control PIO 0-4, multiword DMA 0-2, Ultra DMA 0-2
_MODES = {*_DEFAULT_PIO, *range(0x08, 0x0D), *range(0x20, 0x23), *range(0x40, 0x43)}

SET_TRANSFER_MODE = 0x03
#: revert, or keep, settings over a software reset: settings are always kept
KEEP_SETTINGS, REVERT_SETTINGS = 0x66, 0xCC


def transfer_mode_known(mode: int) -> bool:
    """Whether the drive has this mode (as IDENTIFY words 63, 64 and 88 say)."""
    return mode in _MODES
