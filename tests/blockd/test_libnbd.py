"""libnbd's own interface (Debian's python3-libnbd) and nbdkit's client against our server.

The module belongs to the system's Python, so each test is a script for that.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from blockd.nbd.handshake import Terms
from coordinator.contract.config import Export, Media
from coordinator.contract.tls import server_context
from tests.blockd.conftest import PORTS, Serve, make_image
from tests.support.certificates import Certificates
from tests.support.tools import require_tool, run_tool

MIB = 1 << 20
PYTHON = "/usr/bin/python3"


@pytest.fixture(autouse=True)
def libnbd() -> None:
    """Skip where it is not installed; fail where CI installs it."""
    found = os.path.exists(PYTHON) and not subprocess.run(
        [PYTHON, "-c", "import nbd"], stderr=subprocess.DEVNULL, timeout=60
    ).returncode  # fmt: skip
    if not found:
        message = "python3-libnbd is not installed"
        if os.environ.get("ATOLL_REQUIRE_TOOLS") == "1":
            pytest.fail(message)
        pytest.skip(message)


def script(text: str, *arguments: str) -> Any:
    """Run a script with ``nbd`` and a handle ``h``; what it leaves in ``told``."""
    prelude = "import errno, json, sys, nbd\nh = nbd.NBD()\n"
    return json.loads(run_tool(PYTHON, "-c", f"{prelude}{text}\nprint(json.dumps(told))", *arguments))


def make_qcow2(path: Path) -> str:
    run_tool("qemu-img", "create", "-q", "-f", "qcow2", str(path), "8M")
    run_tool("qemu-img", "bitmap", "--add", str(path), "b0")
    run_tool("qemu-io", "-f", "qcow2", "-c", "write -P 1 1M 1M", str(path))
    return str(path)


def test_negotiation_by_hand(serve: Serve, tmp_path: Path) -> None:
    disk = Export("hd0", make_qcow2(tmp_path / "disk"), "qcow2", bitmaps=("b0",), description="the disk")
    cd = Export("cd0", make_image(tmp_path / "cd", 4096), media=Media.CDROM)
    told = script(
        """
h.set_opt_mode(True)
h.connect_unix(sys.argv[1])
told = {"list": [], "contexts": [], "unknown": 0}
h.opt_list(lambda name, text: told["list"].append((name, text)))
h.set_export_name("none")
try:
    h.opt_info()
except nbd.Error as error:
    told["unknown"] = error.errnum
h.set_export_name("hd0")
h.set_full_info(True)
h.opt_info()
told["info"] = [h.get_size(), h.is_read_only(), h.get_canonical_export_name(), h.get_export_description()]
told["blocks"] = [h.get_block_size(kind) for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
h.opt_list_meta_context(lambda name: told["contexts"].append(name))
h.add_meta_context("base:allocation")
h.add_meta_context("qemu:dirty-bitmap:b0")
h.opt_go()
told["can"] = [h.can_meta_context("base:allocation"), h.can_meta_context("qemu:dirty-bitmap:b0"),
               h.can_multi_conn(), h.can_df(), h.can_fua(), h.can_fast_zero(), h.can_cache()]
extents = {}
h.block_status(8 << 20, 0, lambda name, offset, entries, error: extents.update({name: list(entries)}))
told["extents"] = extents
""",
        serve(disk, cd),
    )
    assert told["list"] == [["hd0", "the disk"], ["cd0", "cdrom, raw"]]
    assert told["unknown"] == 2  # ENOENT
    assert told["info"] == [8 * MIB, False, "hd0", "the disk"]
    assert told["blocks"] == [1, 4096, 32 * MIB]
    assert told["contexts"] == ["base:allocation", "qemu:dirty-bitmap:b0"]
    assert all(told["can"])
    assert told["extents"] == {
        "base:allocation": [MIB, 3, MIB, 0, 6 * MIB, 3],
        "qemu:dirty-bitmap:b0": [MIB, 0, MIB, 1, 6 * MIB, 0],
    }


def test_what_one_connection_writes_another_reads(serve: Serve, tmp_path: Path) -> None:
    """ "NBD_FLAG_CAN_MULTI_CONN": a flush on one connection covers what was written on others."""
    told = script(
        """
others = [nbd.NBD() for _ in range(3)]
for one in (h, *others):
    one.connect_uri(sys.argv[1])
for number, one in enumerate(others):
    one.pwrite(bytes([number + 1]) * 65536, number << 20)
h.flush()
told = [set(h.pread(65536, number << 20)) == {number + 1} for number in range(3)]
others[0].zero(65536, 0, nbd.CMD_FLAG_FAST_ZERO)
others[1].trim(65536, 1 << 20, nbd.CMD_FLAG_FUA)
told.append(h.pread(65536, 0) == bytes(65536))
try:
    h.pread(512, (8 << 20) - 511)
except nbd.Error as error:
    told.append(error.errnum == errno.EINVAL)
""",
        f"nbd+unix:///hd0?socket={serve(Export('hd0', make_qcow2(tmp_path / 'disk'), 'qcow2'))}",
    )
    assert told == [True] * 5


def test_tls(serve: Serve, tmp_path: Path, certificates: Certificates) -> None:
    terms = Terms(server_context(str(certificates.server)))
    path = serve(Export("hd0", make_image(tmp_path / "disk")), terms=terms, tcp="127.0.0.1")
    text = """
h.set_tls(nbd.TLS_REQUIRE)
h.set_tls_certificates(sys.argv[1])
h.set_export_name("hd0")
try:
    h.connect_tcp("localhost", sys.argv[2])
    told = [h.get_tls_negotiated(), len(h.pread(65536, 0)), h.get_structured_replies_negotiated()]
except nbd.Error as error:
    told = "refused"
"""
    port = str(PORTS[path])
    assert script(text, str(certificates.client), port) == [True, 65536, True]
    assert script(text, str(certificates.stranger), port) == "refused"
    assert script(text, str(certificates.anonymous), port) == "refused"


def test_nbdkit_as_a_client(serve: Serve, tmp_path: Path) -> None:
    """nbdkit's nbd plugin passes everything through."""
    require_tool("nbdkit")
    path = serve(Export("hd0", make_qcow2(tmp_path / "disk"), "qcow2", description="the disk"))
    again = f"nbd+unix:///hd0?socket={path}"
    assert "export-size: 8388608" in run_tool("nbdkit", "-U", "-", "nbd", again, "--run", 'nbdinfo "$uri"')
    told = run_tool("nbdkit", "-U", "-", "nbd", again, "--run", 'nbdinfo --map "$uri"')
    assert [[int(field) for field in line.split()[:3]] for line in told.splitlines()] == [
        [0, MIB, 3],
        [MIB, MIB, 0],
        [2 * MIB, 6 * MIB, 3],
    ]
    script_text = 'qemu-io -f raw -c "write -P 5 3M 1M" -c "read -P 5 3M 1M" "$uri"'
    assert "failed" not in run_tool("nbdkit", "-U", "-", "nbd", again, "--run", script_text)
