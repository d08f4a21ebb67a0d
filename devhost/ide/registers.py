"""Bits and offsets of the IDE registers.

Sources, cited by section in this package:

* ATA/ATAPI-6: T13/1410D revision 3b
* MMC-5: T10/1675D revision 4; SPC-3: T10/1416D revision 23
* SFF-8020i revision 2.6 (ATA packet interface for CD-ROMs)
* BMIDE: Programming Interface for Bus Master IDE Controller, revision 1.0 (Intel, 1994)
* PIIX3: 82371FB/82371SB data sheet (Intel 290550)
"""

from __future__ import annotations

import enum

#: offsets in the command block, ATA/ATAPI-6 table 7
DATA, FEATURES, COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, COMMAND = range(8)
ERROR, STATUS = FEATURES, COMMAND


class Status(enum.IntFlag):
    """ATA/ATAPI-6 7.15.6."""

    ERR = 0x01
    DRQ = 0x08
    DSC = 0x10  # obsolete, but old drivers wait for "seek complete"
    DF = 0x20
    DRDY = 0x40
    BSY = 0x80


class Error(enum.IntFlag):
    """ATA/ATAPI-6 7.9.6 and the error outputs of each command in clause 8."""

    ABRT = 0x04
    IDNF = 0x10
    UNC = 0x40
    WP = 0x40  # writes: the medium is write protected


#: plain integers for the paths that run on every access
ERR, DRQ, DF, BSY = int(Status.ERR), int(Status.DRQ), int(Status.DF), int(Status.BSY)
READY = int(Status.DRDY | Status.DSC)
BUSY = BSY | READY

#: Device register, ATA/ATAPI-6 7.7
DEVICE_DEV, DEVICE_LBA = 0x10, 0x40
#: bits 7 and 5 are obsolete and read as one on the drives of the time
DEVICE_OBSOLETE = 0xA0

#: Device Control, ATA/ATAPI-6 7.8
CONTROL_NIEN, CONTROL_SRST, CONTROL_HOB = 0x02, 0x04, 0x80

#: Interrupt reason (the Count register during PACKET), ATA/ATAPI-6 7.12
REASON_COD, REASON_IO = 0x01, 0x02

#: what nobody drives: DD7 is pulled down at the host, the rest floats high (ATA/ATAPI-6 table 5, note on DD7)
FLOATING = 0x7F
