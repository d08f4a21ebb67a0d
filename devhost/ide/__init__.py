"""IDE: channel, ATA disk, ATAPI CD-ROM drive and the PIIX3 bus master."""
