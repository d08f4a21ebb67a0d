"""QEMU's option syntax. Source: qemu-system-x86_64(1), "Options", and QemuOpts (key=value lists)."""

from __future__ import annotations

import pytest

from coordinator.cli import options
from coordinator.cli.options import KeyValues
from coordinator.contract.errors import UsageError


def test_options_in_order_with_one_dash_or_two() -> None:
    assert options.parse(["-m", "512", "--S", "-smp", "2", "-no-reboot"]) == [
        ("m", "512"),
        ("S", ""),
        ("smp", "2"),
        ("no-reboot", ""),
    ]


def test_a_value_may_look_like_an_option() -> None:
    assert options.parse(["-append", "-m"]) == [("append", "-m")]


@pytest.mark.parametrize(
    ("word", "near"),
    [("-cdrm", "-cdrom"), ("-nografic", "-nographic"), ("--serail", "-serial"), ("-no-rebot", "-no-reboot")],
)
def test_an_unknown_option_names_the_nearest(word: str, near: str) -> None:
    with pytest.raises(
        UsageError, match=f"unknown option '{word}'; the nearest known one is '{near}'"
    ) as error:
        options.parse([word])
    assert error.value.exit_status == 2


@pytest.mark.parametrize("arguments", [["-m"], ["image"], ["-"], [""]])
def test_what_is_no_option(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        options.parse(arguments)


def test_a_doubled_comma_is_a_comma() -> None:
    assert options.split("a,,b,c=d,,,e") == ["a,b", "c=d,", "e"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512", 512 << 20),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("2G", 2 << 30),
        ("1.5G", 3 << 29),
        ("2048k", 2 << 20),
        ("1048576b", 1 << 20),
        ("0x10", 16 << 20),
        ("1t", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert options.size("m", text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-5", "1e3", "nan", "inf", "5X", "5MM", "５", "1,5", "0x", "9" * 400]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        options.size("m", text)


def test_flags_in_every_spelling() -> None:
    for text, expected in (
        ("a=on", True),
        ("a=off", False),
        ("a=yes", True),
        ("a=no", False),
        ("a", True),
        ("noa", False),
        ("b=1", None),
    ):
        assert KeyValues("x", text).flag("a", None) is expected  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        KeyValues("x", "a=maybe").flag("a")


def test_left_overs_are_refused() -> None:
    kv = KeyValues("x", "one,two=2", implied="first")
    assert kv.take("first") == "one"
    with pytest.raises(UsageError, match="unknown property 'two'; the nearest known one is 'tow'"):
        kv.done(("tow", "zzz"))


@pytest.mark.parametrize(("text", "number"), [("n=5", 5), ("n=0x1f", 31), ("", 7)])
def test_numbers(text: str, number: int) -> None:
    assert KeyValues("x", text).number("n", 7, 0, 100) == number


@pytest.mark.parametrize("text", ["n=101", "n=-1", "n=", "n=five", "n=1.5"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(UsageError):
        KeyValues("x", text).number("n", 7, 0, 100)


def test_every_option_is_in_the_help() -> None:
    text = options.help_text()
    assert all(f"-{option.name}" in text for option in options.OPTIONS)


@pytest.mark.parametrize(("option", "why"), options.ABSENT.items())
def test_an_option_known_from_elsewhere_says_why_it_is_not_here(option: str, why: str) -> None:
    assert option not in {known.name for known in options.OPTIONS}
    with pytest.raises(UsageError, match=f"'-{option}' cannot be used: ") as caught:
        options.parse([f"-{option}"])
    assert why in str(caught.value)
