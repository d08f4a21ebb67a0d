"""Names of exports: the examples of uri.md, QEMU's older spelling, and what is no name."""

from __future__ import annotations

import pytest

from blockd.nbd.uri import Address, allowed_by, parse
from coordinator.contract.errors import BlockError
from coordinator.contract.nbd import absolute_name, is_network_name

PORT = 10809  # "must default to the NBD port number assigned by IANA"


def reached(address: Address) -> tuple[bool, str | None, str, int, str]:
    return address.tls, address.socket, address.host, address.port, address.export


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # "NBD URI export name"
        ("nbd://example.com/disk", (False, None, "example.com", PORT, "disk")),
        ("nbd+unix:///disk?socket=sock", (False, "sock", "localhost", PORT, "disk")),
        ("nbd://example.com/", (False, None, "example.com", PORT, "")),
        ("nbd://example.com", (False, None, "example.com", PORT, "")),
        ("nbd://example.com//disk", (False, None, "example.com", PORT, "/disk")),
        ("nbd://example.com/hello%20world", (False, None, "example.com", PORT, "hello world")),
        ("nbd://example.com:10810/a/b%23c", (False, None, "example.com", 10810, "a/b#c")),
        ("nbds://alice@example.com/d", (True, None, "example.com", PORT, "d")),
        ("nbds+unix:///d?socket=/run/a+b%20c", (True, "/run/a+b c", "localhost", PORT, "d")),
        ("NBD://[2001:db8::1]:5/d", (False, None, "2001:db8::1", 5, "d")),
        # QEMU's manual, "NBD access"
        ("nbd:unix:/tmp/my_socket", (False, "/tmp/my_socket", "localhost", PORT, "")),
        ("nbd:unix:/tmp/my_socket:exportname=a:b", (False, "/tmp/my_socket", "localhost", PORT, "a:b")),
        ("nbd:192.0.2.1:30000", (False, None, "192.0.2.1", 30000, "")),
        ("nbd:[::1]:10809:exportname=disk", (False, None, "::1", PORT, "disk")),
        ("nbd:localhost:10809:exportname=", (False, None, "localhost", PORT, "")),
    ],
)
def test_names(name: str, expected: tuple[bool, str | None, str, int, str]) -> None:
    assert reached(parse(name)) == expected
    assert is_network_name(name) and absolute_name(name) == name


def test_parameters() -> None:
    address = parse(
        "nbds://10.0.0.1/d?tls-certificates=/etc/pki&tls-hostname=disks&reconnect-delay=2.5"
        "&answer-timeout=7&tls-type=x509&tls-verify-peer=1"
    )
    assert (address.certificates, address.tls_hostname) == ("/etc/pki", "disks")
    assert (address.reconnect_delay, address.answer_timeout) == (2.5, 7)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nbd:", "neither"),
        ("nbd:host", "neither"),
        ("nbd:host:99999", "neither"),
        ("nbd:unix:", "neither"),
        ("nbd:///x", "no host"),
        ("nbd://host:99999/", "range"),
        ("nbd://[::1/", "IPv6"),
        ("nbd://host/x#y", "fragment"),
        ("nbd+unix:///x", "no socket"),
        ("nbd+unix://host/x?socket=s", "three slashes"),
        ("nbd://host/x?socket=s", "+unix"),
        ("nbd+vsock:///", "'nbd+vsock' is not supported"),
        ("nbd://host/x?colour=red", "colour=red is not supported"),
        ("nbds://host/x?tls-verify-peer=0", "not supported"),
        ("nbds://host/x?tls-type=psk", "not supported"),
        ("nbd://host/x?reconnect-delay=soon", "no number of seconds"),
        ("nbd://host/x?reconnect-delay=-1", "no number of seconds"),
        ("nbd://host/x?reconnect-delay=nan", "no number of seconds"),
        ("nbd://host/x?tls-hostname=", "no value"),
        ("nbd://host/a\0b", "zero byte"),
    ],
)
def test_names_that_are_none(name: str, words: str) -> None:
    with pytest.raises(BlockError) as caught:
        parse(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["disk", "./nbd:disk", "/nbd://x/y", "json:{}", "snbd://x", "nbdx:y"])
def test_files(name: str) -> None:
    assert not is_network_name(name)


@pytest.mark.parametrize(
    ("name", "place", "opened"),
    [
        ("nbd://h/x", "nbd://h/x", "nbd://h/x"),
        ("nbd://h/x", "*", "nbd://h/x"),
        ("nbd:h:10809:exportname=x", "nbd://H/x?reconnect-delay=3", "nbd://H/x?reconnect-delay=3"),
        # a whole server; how to trust it is the user's word, not the image's
        ("nbds://h/a b?tls-certificates=/evil", "nbds://h?tls-certificates=/ok",
         "nbds://h/a%20b?tls-certificates=/ok"),
        ("nbd+unix:///x?socket=/s", "nbd:unix:/s", "nbd:unix:/s:exportname=x"),
        ("nbd://h/x", "nbd://h/y", None),
        ("nbd://h/x", "nbd://h:1/x", None),
        ("nbd://h/x", "nbd://g/x", None),
        ("nbd://h/x", "nbds://h/x", None),
        ("nbd+unix:///x?socket=/s", "/s", None),
    ],
)  # fmt: skip
def test_what_the_user_allows(name: str, place: str, opened: str | None) -> None:
    assert allowed_by(name, ("/somewhere", place)) == opened
