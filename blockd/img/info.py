"""``atoll img info``: what an image is."""

from __future__ import annotations

import os
import time
from typing import Any

from blockd import opening
from blockd.img import common
from blockd.qcow2 import bitmaps, snapshots
from blockd.qcow2.backing import Chain, plain_path, resolve
from blockd.qcow2.header import Autoclear, Compatible, Incompatible
from blockd.qcow2.image import Qcow2Image
from coordinator.contract.nbd import is_network_name


def run(arguments: list[str]) -> int:
    parser = common.Parser("info", "What an image is.")
    parser.format_option()
    parser.output_option()
    parser.add_argument("--backing-chain", action="store_true", help="and what lies below it")
    parser.share_option()
    parser.chain_option()
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    rows = _describe(given.file, given.format, given)
    if given.output == "json":
        common.print_json(rows if given.backing_chain else rows[0])
    else:
        print("\n\n".join(_text(row) for row in rows))
    return 0


def _describe(file: str, image_format: str | None, given: Any) -> list[dict[str, Any]]:
    """The image, and with --backing-chain those below it."""
    rows: list[dict[str, Any]] = []
    chain = Chain(tuple(given.allow_backing))
    next_file: str | None = file
    while next_file is not None:
        image: Any = common.open_image(
            next_file, image_format, allowed=given.allow_backing, **_how(given, next_file, image_format)
        )
        try:
            rows.append(_row(image, next_file))
            below = None
            if isinstance(image, Qcow2Image):
                chain = chain.below(next_file, image.host.identity())
                if given.backing_chain and image.header.backing_file is not None:
                    below = resolve(next_file, image.header.backing_file, chain.allowed)
                    image_format = image.header.backing_format
        finally:
            image.close()
        next_file = below
    return rows


def _how(given: Any, file: str, image_format: str | None) -> dict[str, Any]:
    """Nothing below the image is opened, and what is damaged is shown as it is."""
    how: dict[str, Any] = {"locked": not given.force_share}
    if (image_format or opening.probe(file)) == "qcow2":
        how |= {"backed": False, "repair": True}
    return how


def _row(image: Any, file: str) -> dict[str, Any]:
    """The members of ImageInfo."""
    row: dict[str, Any] = {
        "virtual-size": image.size,
        "filename": file,
        "format": image.format,
    }
    if not is_network_name(file):
        row["actual-size"] = os.stat(file).st_blocks * 512
        row["dirty-flag"] = False
    if not isinstance(image, Qcow2Image):
        return row
    header = image.header
    row["cluster-size"] = header.cluster_size
    row["dirty-flag"] = bool(header.incompatible & Incompatible.DIRTY)
    if header.backing_file is not None:
        row["backing-filename"] = header.backing_file
        row["full-backing-filename"] = plain_path(file, header.backing_file) or header.backing_file
        if header.backing_format is not None:
            row["backing-filename-format"] = header.backing_format
    data: dict[str, Any] = {
        "compat": "1.1" if header.version >= 3 else "0.10",
        "compression-type": header.compression,
    }
    if header.version >= 3:
        data["lazy-refcounts"] = bool(header.compatible & Compatible.LAZY_REFCOUNTS)
    data["refcount-bits"] = 1 << header.refcount_order
    if header.version >= 3:
        if header.data_file is not None:
            data["data-file"] = header.data_file
            data["data-file-raw"] = bool(header.autoclear & Autoclear.RAW_DATA_FILE)
        data["corrupt"] = bool(header.incompatible & Incompatible.CORRUPT)
        data["extended-l2"] = bool(header.incompatible & Incompatible.EXTENDED_L2)
        known = bitmaps.load(image.host, header)
        if known:
            data["bitmaps"] = [
                {"name": b.name, "granularity": 1 << b.granularity_bits, "flags": b.flag_names()}
                for b in known
            ]
    row["format-specific"] = {"type": "qcow2", "data": data}
    known_snapshots = snapshots.load(image.host, header)
    if known_snapshots:
        row["snapshots"] = [snapshot_row(s) for s in known_snapshots]
    return row


def snapshot_row(s: snapshots.Snapshot) -> dict[str, Any]:
    """The members of SnapshotInfo."""
    row = {
        "id": s.id,
        "name": s.name,
        "vm-state-size": s.vm_state_size,
        "date-sec": s.date_sec,
        "date-nsec": s.date_nsec,
        "vm-clock-sec": s.vm_clock_nsec // 10**9,
        "vm-clock-nsec": s.vm_clock_nsec % 10**9,
    }
    return row if s.icount == (1 << 64) - 1 else row | {"icount": s.icount}


def snapshot_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Snapshot list:",
        f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}",
    ]
    for row in rows:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["date-sec"]))
        seconds = row["vm-clock-sec"]
        millis = row["vm-clock-nsec"] // 10**6
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{millis:03d}"
        state = common.human(row["vm-state-size"])
        lines.append(
            f"{row['id']:<9} {row['name']:<16} {state:>8}{date:>20}{clock:>13}{row.get('icount', ''):>11}"
        )
    return lines


def _text(row: dict[str, Any]) -> str:
    lines = [
        f"image: {row['filename']}",
        f"file format: {row['format']}",
        f"virtual size: {common.human(row['virtual-size'])} ({row['virtual-size']} bytes)",
        f"disk size: {common.human(row['actual-size']) if 'actual-size' in row else 'unavailable'}",
    ]
    if row.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "cluster-size" in row:
        lines.append(f"cluster_size: {row['cluster-size']}")
    if "backing-filename" in row:
        name, full = row["backing-filename"], row["full-backing-filename"]
        lines.append(f"backing file: {name}" + (f" (actual path: {full})" if full != name else ""))
        if "backing-filename-format" in row:
            lines.append(f"backing file format: {row['backing-filename-format']}")
    if "snapshots" in row:
        lines += snapshot_lines(row["snapshots"])
    if "format-specific" in row:
        lines.append("Format specific information:")
        for name, value in row["format-specific"]["data"].items():
            label = name if name == "compat" else name.replace("-", " ")
            if name == "bitmaps":
                lines.append("    bitmaps:")
                for number, bitmap in enumerate(value):
                    lines.append(f"        [{number}]:")
                    lines.append("            flags:")
                    lines += [f"                [{n}]: {flag}" for n, flag in enumerate(bitmap["flags"])]
                    lines.append(f"            name: {bitmap['name']}")
                    lines.append(f"            granularity: {bitmap['granularity']}")
            else:
                lines.append(f"    {label}: {str(value).lower() if isinstance(value, bool) else value}")
    return "\n".join(lines)
