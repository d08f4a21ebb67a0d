"""A few inputs of each fuzz target, the same ones each time; tests/blockd/fuzz says what is judged."""

from __future__ import annotations

import pytest

from blockd.qcow2.image import Qcow2Image
from tests.blockd.fuzz import images, runner, targets

IMAGES, CLIENTS = 50, 250


@pytest.mark.parametrize("name", targets.NAMES)
def test_fuzz(name: str) -> None:
    inputs = IMAGES if name in images.TARGETS else CLIENTS
    done, failure = runner.run(targets.make(name, differential=5), 0, 0, runner.for_inputs(inputs))
    assert failure is None, f"input {failure.number}: {failure.text}"
    assert done == inputs


def test_a_target_that_fails_is_noticed() -> None:
    """The judge of images, given a reader that gets one byte wrong, and one that raises what it may not."""
    read_into = Qcow2Image.read_into

    def wrong(image: Qcow2Image, offset: int, view: memoryview) -> None:
        read_into(image, offset, view)
        view[0] ^= 1

    def raises(image: Qcow2Image, offset: int, view: memoryview) -> None:
        raise ValueError("not by the contract")

    for broken, words in ((wrong, "Content mismatch"), (raises, "not by the contract")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Qcow2Image, "read_into", broken)
            _, failure = runner.run(targets.make("header", 1), 0, 0, runner.for_inputs(40))
        assert failure is not None and words in failure.text
        assert failure.data
