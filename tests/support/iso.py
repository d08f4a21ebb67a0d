"""Builds a bootable ISO 9660 image: El Torito, ISOLINUX, a kernel, an initramfs and a payload.

El Torito 1.0 for the boot catalogue; ISOLINUX wants a "no emulation" entry that loads four
512-byte sectors and a boot information table in its image.
"""

import io
from pathlib import Path

import numpy
import pycdlib

SECTOR = 2048

CONFIG = """\
serial 0
prompt 0
default atoll
label atoll
  kernel /boot/vmlinuz
  initrd /boot/initrd
  append {command_line}
"""


def build(
    path: Path,
    *,
    isolinux: Path,
    ldlinux: Path,
    kernel: Path,
    initrd: Path,
    command_line: str,
    payload_bytes: int,
    seed: int,
) -> None:
    """Writes the image; its size is a multiple of the CD's sector."""
    config = CONFIG.format(command_line=command_line).encode()
    payload = numpy.random.Generator(numpy.random.PCG64(seed)).bytes(payload_bytes)
    image = pycdlib.PyCdlib()
    image.new(interchange_level=3, vol_ident="ATOLL", sys_ident="")
    try:
        image.add_directory("/BOOT")
        image.add_directory("/ISOLINUX")
        image.add_file(str(isolinux), "/ISOLINUX/ISOLINUX.BIN;1")
        image.add_file(str(ldlinux), "/ISOLINUX/LDLINUX.C32;1")
        image.add_fp(io.BytesIO(config), len(config), "/ISOLINUX/ISOLINUX.CFG;1")
        image.add_file(str(kernel), "/BOOT/VMLINUZ.;1")
        image.add_file(str(initrd), "/BOOT/INITRD.;1")
        image.add_fp(io.BytesIO(payload), len(payload), "/PAYLOAD.BIN;1")
        image.add_eltorito(
            "/ISOLINUX/ISOLINUX.BIN;1",
            bootcatfile="/ISOLINUX/BOOT.CAT;1",
            boot_load_size=4,
            boot_info_table=True,
        )
        image.write(str(path))
    finally:
        image.close()
    with path.open("ab") as file:  # a drive reports whole sectors only
        file.write(bytes(-file.tell() % SECTOR))
