"""``atoll img check``: check an image and repair it. Exit 0 good, 1 failed, 2 corrupt, 3 leaks, 63 raw."""

from __future__ import annotations

import sys

from blockd import opening
from blockd.img import common
from blockd.qcow2.check import Report, check, repair
from blockd.qcow2.image import Qcow2Image

NOT_SUPPORTED = 63


def run(arguments: list[str]) -> int:
    parser = common.Parser("check", "Check an image for errors.")
    parser.format_option()
    parser.output_option()
    parser.quiet_option()
    parser.add_argument("-r", dest="repair", choices=("leaks", "all"), help="repair what is found")
    parser.share_option()
    parser.ignored("-T")
    parser.add_argument("file")
    given = parser.parse_intermixed_args(arguments)
    if (given.format or opening.probe(given.file)) != "qcow2":
        print("atoll img: raw images cannot be checked", file=sys.stderr)
        return NOT_SUPPORTED
    image = Qcow2Image(
        given.file, read_only=given.repair is None, repair=True, backed=False, locked=not given.force_share
    )
    try:
        report = check(image) if given.repair is None else repair(image, given.repair == "all")
    finally:
        image.close()
    if given.output == "json":
        common.print_json(report.as_dict(given.file))
    elif not given.quiet:
        _print(report)
    return report.exit_status()


def _print(report: Report) -> None:
    for line in report.lines:
        print(line, file=sys.stderr)
    if report.leaks_fixed or report.corruptions_fixed:
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {report.leaks_fixed} leaked clusters\n    {report.corruptions_fixed} corruptions\n")
        print("Double checking the fixed image now...")
    if not report.corruptions and not report.leaks:
        print("No errors were found on the image.")
    if report.corruptions:
        print(f"\n{report.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if report.leaks:
        print(f"\n{report.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if report.total_clusters and report.allocated_clusters:
        allocated, total = report.allocated_clusters, report.total_clusters
        print(
            f"{allocated}/{total} = {allocated * 100 / total:.2f}% allocated, "
            f"{report.fragmented_clusters * 100 / allocated:.2f}% fragmented, "
            f"{report.compressed_clusters * 100 / allocated:.2f}% compressed clusters"
        )
    print(f"Image end offset: {report.image_end_offset}")
