"""What `make bench` times computes the same numbers as its peers; only where these are installed (make bench)."""

import pytest
import torch

pytest.importorskip("neuralforecast", reason="the extra 'parity' is not installed")
pytestmark = pytest.mark.slow  # the import alone takes seconds

from bench import lora  # noqa: E402
from bench.forecasting import VARIANTS, largest_difference, training  # noqa: E402
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


def test_lora_and_its_peer_begin_with_one_loss_and_learn(monkeypatch):
    pytest.importorskip("peft", reason="the extra 'parity' is not installed")
    monkeypatch.setattr(lora, "SETTINGS", {**lora.SETTINGS, "vocab_size": 97, "layers": 2})
    steps = {variant: lora.training(variant) for variant in lora.VARIANTS}
    first, *others = (step() for step in steps.values())
    assert others == pytest.approx([first] * len(others), abs=1e-5)
    assert all(step() < first for step in steps.values())
