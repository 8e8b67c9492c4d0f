"""The models that `make bench` times compute the same numbers; only where neuralforecast is installed (make bench)."""

import pytest
import torch

pytest.importorskip("neuralforecast", reason="the extra 'parity' is not installed")
pytestmark = pytest.mark.slow  # the import alone takes seconds

from bench.__main__ import VARIANTS, largest_difference, training  # noqa: E402
from bench.pairs import PAIRS  # noqa: E402


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_numbers_out_and_a_step_of_each_variant(name):
    torch.manual_seed(0)
    pair = PAIRS[name]()
    assert largest_difference(pair) < 1e-5
    parameters = sum(p.numel() for p in pair.ours.parameters())
    assert parameters == sum(p.numel() for p in pair.peer.parameters() if p.requires_grad)
    before = [parameter.clone() for parameter in pair.ours.parameters()]
    for variant in VARIANTS:
        training(pair, variant)()
    assert all(not torch.equal(a, b) for a, b in zip(before, pair.ours.parameters(), strict=True))
