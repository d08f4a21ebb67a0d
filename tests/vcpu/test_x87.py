"""x87 against the host's FPU executing the same instruction."""

from collections.abc import Iterator

import pytest

from tests.vcpu.host_rows import Pair, Row, check_row, rows


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


# The pointers that FNSTENV stores are those of the last instruction before it: a test of their own
ROWS = rows("x87.tab", "fnstenv")


@pytest.mark.parametrize("unmask", (False, True), ids=("masked", "unmasked"))
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.key)
def test_like_the_host(pair: Pair, row: Row, unmask: bool) -> None:
    check_row(pair, row, 8, unmask)
