"""Each row of the opcode table against the host's CPU. More of it, or one failure again: python -m
tests.vcpu.differential."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from tests.vcpu.differential.shapes import left_out
from tests.vcpu.differential.suite import Suite
from vcpu import optable

SEED = 1
CASES, SEQUENCES = 50_000, 10_000
# Why a host cannot be asked: see the head of system.tab
REASONS = {"umip", "maker", "kernel", "hypervisor", "model", "time", "counters", "random"}

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the oracle is an x86-64 CPU")


@pytest.fixture(scope="module")
def suite() -> Iterator[Suite]:
    suite = Suite()
    yield suite
    suite.close()


def differing(suite: Suite, cases: int, sequences: bool) -> str:
    """Texts of the first that differ, and how to see one again; empty if none does."""
    found: list[tuple[int, str]] = []
    for batch in suite.batches(SEED, 0, cases, sequences):
        found += batch
        if len(found) >= 5:
            break
    kind = "--sequences " if sequences else ""
    again = f"python -m tests.vcpu.differential --seed {SEED} --cases 1 {kind}--start"
    return "\n".join(f"{text}\n  again: {again} {number}" for number, text in found[:5])


@pytest.mark.timeout(600)
def test_single_instructions(suite: Suite) -> None:
    text = differing(suite, CASES, sequences=False)
    assert not text, text
    missing = suite.coverage.missing(suite.shapes)
    assert not missing, "not covered:\n" + "\n".join(missing)


@pytest.mark.timeout(600)
def test_sequences(suite: Suite) -> None:
    """Flags that no one reads are not computed, host instructions share stubs, blocks are chained: one
    cannot tell."""
    text = differing(suite, SEQUENCES, sequences=True)
    assert not text, text


def test_rows_left_out() -> None:
    """Rows are kept from the host for a reason only, and those are few."""
    reasons = left_out()
    assert set(reasons) <= REASONS
    assert sum(map(len, reasons.values())) < 20


def test_a_row_that_no_case_reaches_is_told(suite: Suite) -> None:
    shape = next(shape for shape in suite.shapes if shape.row.mnemonic == "DIV")
    empty = type(suite.coverage)()
    assert empty.missing([shape]) == [
        f"{shape.key}: never ended as it should, only with []",
        f"{shape.row.key}: exceptions not raised: {sorted(shape.faults)}",
    ]
    assert optable.load()[0].key in {shape.row.key for shape in suite.shapes}
