"""The clipped loss and its slope by the kernel: against float64 arithmetic of the formula, torch, GRPO and DAPO."""

import math
import sys
from collections import defaultdict
from functools import partial

import pytest
import torch

from mini_impl.finetuning import dapo, grpo
from mini_impl.kernels.clipped_loss import (
    REDUCTIONS,
    _ClippedLoss,
    clipped_loss,
    clipped_loss_as_torch,
    clipped_loss_torch,
    traffic,
)
from mini_impl.kernels.roofline import count
from tests.kernels.proof import DTYPES, close, layouts, moved
from tests.tensors import random, same

SIZES = [(1, 1), (1, 17), (3, 2), (5, 33), (2, 1000), (2, 1024), (3, 1500), (64, 5)]


clipped_loss_module = sys.modules[clipped_loss.__module__]


def answers(sequences: int, tokens: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0):
    """Log-probabilities, the old ones, advantages, and a mask without any token of the last sequence but one."""
    old = -random(sequences, tokens, seed=seed).abs() - 0.01
    new = old + 0.3 * random(sequences, tokens, seed=seed + 1)
    advantages = random(sequences, seed=seed + 2)
    mask = random(sequences, tokens, seed=seed + 3) < 0.5
    mask[:, 0] = True
    mask[sequences - 2] &= sequences < 3
    return *(value.to(device, dtype) for value in (new, old, advantages)), mask.to(device)


def by_hand(new, old, advantages, mask, low=0.2, high=0.2, reduce_by="sequence", max_length=None):
    """The loss and its slope [sequence, token], token by token in Python's numbers."""
    sequences = len(new)
    new, old, advantages, mask = (value.detach().cpu().double().tolist() for value in (new, old, advantages, mask))
    tokens = sum(map(sum, mask))
    loss, slopes = [], torch.zeros(len(new), len(new[0]), dtype=torch.float64)
    for row in range(sequences):
        weight = {"sequence": sequences * sum(mask[row]), "token": tokens, "length": sequences * (max_length or 0)}
        for place, kept in enumerate(mask[row]):
            if kept:
                ratio, advantage = math.exp(new[row][place] - old[row][place]), advantages[row]
                held = ratio > 1 + high if advantage > 0 else ratio < 1 - low  # the clip holds
                bound = 1 + high if advantage > 0 else 1 - low
                loss.append(-(bound if held else ratio) * advantage / weight[reduce_by])
                slopes[row, place] = 0 if held else -ratio * advantage / weight[reduce_by]
    return torch.tensor(math.fsum(loss), dtype=torch.float64), slopes


def loss_and_slope(function, logprobs, *given):
    logprobs = logprobs.detach().requires_grad_()
    loss = function(logprobs, *given)
    assert function is not clipped_loss or loss.grad_fn.name() == "_ClippedLossBackward"  # by the kernel
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@pytest.mark.parametrize("reduce_by", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sequences", "tokens"), SIZES)
def test_the_kernel_and_torch_compute_the_formula(kernels, sequences, tokens, dtype, reduce_by):
    given = answers(sequences, tokens, dtype, kernels)
    how = (0.2, 0.28, reduce_by, tokens + 3 if reduce_by == "length" else None)
    expected = by_hand(*given, *how)
    for function in (clipped_loss, clipped_loss_torch):
        loss, slope = loss_and_slope(function, *given, *how)
        close((loss, slope), expected, DTYPES[dtype])
        assert slope.dtype == dtype and loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert loss.shape == () and not slope[~given[3]].any()


def test_every_entry_is_written(kernels, poisoned):
    given = answers(3, 1030, torch.float32, kernels)
    close(loss_and_slope(clipped_loss, *given), by_hand(*given), 1e-5)


def test_without_a_gradient_the_value_is_the_same(kernels):
    new, *given = answers(3, 40, torch.float32, kernels)
    loss, _ = loss_and_slope(clipped_loss, new, *given)
    assert clipped_loss(new, *given) == loss
    with torch.no_grad():
        without = clipped_loss(new.requires_grad_(), *given)
    assert without == loss and not without.requires_grad


@pytest.mark.parametrize("reduce_by", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_it_moves_is_what_the_formula_says(interpreter, monkeypatch, dtype, reduce_by):
    """The bytes of the kernel, and those of torch's operations before and after it."""
    new, *given, mask = answers(3, 1100, dtype)
    given += [torch.ones_like(mask), 0.2, 0.2, reduce_by, 1100 if reduce_by == "length" else None]
    forward, backward = traffic(3, 1100, dtype, reduce_by)
    with moved() as kernel:
        loss = clipped_loss(new.requires_grad_(), *given)
    with moved() as without_slopes, torch.no_grad():
        clipped_loss(new, *given)
    one = torch.ones_like(loss)
    assert count(lambda: torch.autograd.grad(loss, new, one)) == backward
    monkeypatch.setattr(clipped_loss_module, "kernel", lambda: defaultdict(lambda: lambda *_, **how: None))
    rest = count(lambda: clipped_loss(new, *given))
    assert (kernel.once_read + rest.read, kernel.once_written + rest.written) == forward[:2]
    assert kernel.written == kernel.once_written and rest.launches == forward.launches - 1
    assert without_slopes.written == 3 * max(4, dtype.itemsize)


def test_log_probabilities_are_read_where_the_mask_counts_only(interpreter):
    new, old, advantages, mask = answers(3, 50, torch.float32)
    with moved() as kernel:
        clipped_loss(new, old, advantages, mask)
    assert kernel.once_read == 2 * 4 * mask.sum() + mask.numel() + 3 * 4


@pytest.mark.parametrize("reduce_by", REDUCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_masked_is_not_used_and_an_empty_sequence_adds_nothing(kernels, bad, reduce_by):
    new, old, advantages, mask = answers(4, 21, torch.float32, kernels)
    how = (0.2, 0.2, reduce_by, 21 if reduce_by == "length" else None)
    expected = by_hand(new, old, advantages, mask, *how)
    assert not mask[2].any()
    advantages[2] = bad
    spoilt = new.masked_fill(~mask, bad), old.masked_fill(~mask, -bad), advantages, mask
    for function in (clipped_loss, clipped_loss_torch):
        close(loss_and_slope(function, *spoilt, *how), expected, 1e-5)
        loss, slope = loss_and_slope(function, *spoilt[:3], torch.zeros_like(mask), *how)
        assert loss == 0 and not slope.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_are_seen_where_the_mask_counts(kernels, bad):
    new, *given = answers(4, 21, torch.float32, kernels)
    new[1, 0] = bad
    for sign in (1, -1, 0):
        given[1][1] = sign
        loss, slope = loss_and_slope(clipped_loss, new, *given)
        assert not slope[1, 0].isfinite() and slope.isfinite().sum() == slope.numel() - 1
        assert loss.isfinite() == (bad == math.inf and sign == 1)  # where the clip holds the slope alone is NaN
        theirs = loss_and_slope(clipped_loss_torch, new, *given)
        torch.testing.assert_close((loss, slope), theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduce_by", ["sequence", "token"])
def test_a_mask_of_numbers(kernels, dtype, reduce_by):
    *given, mask = answers(3, 700, torch.float32, kernels)
    expected = by_hand(*given, mask, reduce_by=reduce_by)
    close(loss_and_slope(clipped_loss, *given, mask.to(dtype), 0.2, 0.2, reduce_by), expected, 1e-5)


def test_tensors_of_any_strides(kernels):
    new, old, advantages, mask = answers(4, 30, torch.float32, kernels)
    expected = by_hand(new, old, advantages, mask)
    news, olds, masks = ([*layouts(value).values()] for value in (new, old, mask))
    for place, way in enumerate(layouts(advantages).values()):
        for shift in range(len(news)):  # each of its own strides
            these = news[shift], olds[shift - 1], way, masks[shift - 2 - place]
            close(loss_and_slope(clipped_loss, *these), expected, 1e-5)
    row = mask[:1].expand(4, 30)
    nothing = torch.zeros((), device=kernels).expand(4, 30)
    expected = by_hand(new - old, nothing, advantages, row)
    close(loss_and_slope(clipped_loss, new - old, nothing, advantages, row), expected, 1e-5)
    one = advantages[:1].expand(4)
    close(loss_and_slope(clipped_loss, new, old, one, mask), by_hand(new, old, one, mask), 1e-5)


def test_at_the_edge_of_the_clip_and_where_products_are_equal_the_slope_is_torchs(kernels):
    """Within bounds both products are equal and each gets half of the slope; the bounds are within."""
    steps = torch.tensor([0.0, 0.25, -0.25, 0.5, -0.5], dtype=torch.float64, device=kernels)
    least, most = steps.exp()[[2, 1]].tolist()
    low, high = 1 - least, most - 1
    assert (1 - low, 1 + high) == (least, most)  # so some ratio is exactly a bound
    new = steps.repeat(3, 1)
    given = torch.zeros_like(new), torch.tensor([1.0, -1, 0], dtype=torch.float64, device=kernels)
    given += (torch.ones_like(new, dtype=torch.bool), low, high)
    loss, slope = loss_and_slope(clipped_loss, new, *given)
    same((loss, slope), loss_and_slope(clipped_loss_torch, new, *given))
    ratio = steps.exp().cpu() / 15
    held = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    same(slope.cpu(), torch.stack([-ratio, ratio, 0 * ratio]).where(~torch.cat([held, held[:1] & False]), 0))


def test_of_products_that_rounding_makes_equal_each_gets_half_of_the_slope(kernels):
    new = torch.full((1, 1), 0.4, dtype=torch.float64, device=kernels)
    most = math.nextafter(new.exp().item(), 0)  # the bound is next below the ratio
    advantage = random(100).to(kernels).abs()
    advantage = advantage[advantage * most == advantage * new.exp()[0]][:1]
    given = torch.zeros_like(new), advantage, torch.ones_like(new, dtype=torch.bool), 0.2, most - 1
    ours = loss_and_slope(clipped_loss, new, *given)
    same(ours, loss_and_slope(clipped_loss_torch, new, *given))
    assert ours[1] == ours[0] / 2 < 0


def test_bounds_that_are_0_keep_torchs_slope_at_the_old_policy(kernels):
    new, _, advantages, mask = answers(3, 9, torch.float64, kernels)
    given = new.clone(), advantages, mask, 0.0, 0.0
    same(loss_and_slope(clipped_loss, new, *given), loss_and_slope(clipped_loss_torch, new, *given))


@pytest.mark.parametrize("reduce_by", REDUCTIONS)
def test_the_gradient_is_that_of_the_value(kernels, reduce_by):
    new, *given = answers(3, 6, torch.float64, kernels)
    how = (0.2, 0.2, reduce_by, 6 if reduce_by == "length" else None)
    assert torch.autograd.gradcheck(lambda new: clipped_loss(new, *given, *how), new.requires_grad_())


def test_the_slope_is_scaled_by_what_comes_after_and_only_logprobs_have_one(kernels):
    new, old, advantages, mask = answers(3, 20, torch.float32, kernels)
    _, slope = loss_and_slope(clipped_loss, new, old, advantages, mask)
    leaves = [value.clone().requires_grad_() for value in (new, old, advantages)]
    loss = clipped_loss(*leaves, mask)
    (3 * loss.expand(4)).sum().backward(retain_graph=True)
    close([leaves[0].grad], [12 * slope], 1e-6)
    loss.backward()  # once more: what is kept was not changed
    close([leaves[0].grad], [13 * slope], 1e-6)
    assert leaves[1].grad is None and leaves[2].grad is None


def test_a_second_derivative_is_refused(kernels):
    new, *given = answers(3, 6, torch.float32, kernels)
    with pytest.raises(RuntimeError, match="clipped_loss has no second derivative"):
        torch.autograd.grad(clipped_loss(new.requires_grad_(), *given), new, create_graph=True)


def total(loss):
    """A loss that returns its total alone."""
    return lambda *given: loss(*given).total


PUBLISHED = {
    "grpo by sequence": (grpo.published_loss, (0.2, 0.2)),
    "grpo by token": (partial(grpo.published_loss, reduce_by="token"), (0.2, 0.2, "token")),
    "grpo by length": (partial(grpo.published_loss, reduce_by="length", max_length=41), (0.2, 0.2, "length", 41)),
    "dapo": (dapo.published_loss, (0.2, 0.28, "token")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_losses_have_the_kernel_compute_them(kernels, monkeypatch, name):
    loss, how = PUBLISHED[name]
    new, old, advantages, mask = (value[[0, 1, 2]] for value in answers(5, 40, torch.float32, kernels))
    given = new.minimum(torch.full_like(new, -0.1)), old, advantages, mask  # logarithms of probabilities
    ours = loss_and_slope(total(loss), *given)
    with monkeypatch.context() as asked:
        asked.setenv("MINI_IMPL_KERNELS", "0")
        theirs = loss_and_slope(total(loss), *given)
    close(ours, theirs, 1e-5)
    close(loss_and_slope(clipped_loss, *given, *how), theirs, 1e-5)
    monkeypatch.setattr(_ClippedLoss, "apply", lambda *given: torch.tensor(7.0))
    assert loss(*given).total == 7


@pytest.mark.parametrize("kl_gradient", ["plain", "weighted"])
def test_the_kernel_leaves_the_kl_as_it_is(kernels, monkeypatch, kl_gradient):
    new, old, advantages, mask = (value[[0, 1, 2]] for value in answers(5, 40, torch.float32, kernels))
    given = new.minimum(torch.full_like(new, -0.1)), old, advantages, mask, old - 0.3
    loss = total(partial(grpo.published_loss, kl_weight=0.1, kl_gradient=kl_gradient))
    ours = loss_and_slope(loss, *given)
    monkeypatch.setenv("MINI_IMPL_KERNELS", "0")
    close(ours, loss_and_slope(loss, *given), 1e-5)


def test_in_16_bits_the_published_loss_keeps_its_dtype(kernels):
    new, old, advantages, mask = (value[[0, 1, 2]] for value in answers(5, 40, torch.bfloat16, kernels))
    new = new.minimum(torch.full_like(new, -0.1))
    loss = clipped_loss_as_torch(new - old, advantages, mask, 0.2, 0.2, "sequence", None)
    assert loss.dtype == torch.bfloat16
    with torch.autocast(kernels, torch.bfloat16):
        loss = clipped_loss_as_torch(new - old, advantages, mask, 0.2, 0.2, "sequence", None)
    assert loss.dtype == torch.float32


GIVEN = dict(zip(("logprobs", "old_logprobs", "advantages", "mask"), answers(3, 5, torch.float32), strict=True))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"logprobs": [1.0]}, TypeError, "logprobs must be a tensor; got list"),
        ({"logprobs": torch.ones(3, 5, dtype=torch.long)}, TypeError, "logprobs must be of .*; got torch.int64"),
        ({"logprobs": torch.ones(15)}, ValueError, r"logprobs must be \[sequence, token\].*got shape \[15\]"),
        ({"logprobs": torch.ones(3, 0)}, ValueError, "no axis empty"),
        ({"old_logprobs": torch.ones(5)}, ValueError, r"old_logprobs must have the shape \[3, 5\]"),
        ({"old_logprobs": torch.ones(3, 5).double()}, TypeError, "dtype of logprobs, torch.float32; got torch.float64"),
        ({"advantages": torch.ones(3, 1)}, ValueError, r"advantages must have the shape \[3\]"),
        (
            {"mask": torch.ones(3, 5, device="meta")},
            ValueError,
            "mask must be on the device of logprobs, cpu; got meta",
        ),
        ({"mask": None}, TypeError, "mask must be a tensor; got NoneType"),
        ({"clip_low": "0.2"}, TypeError, "clip_low must be a finite number of at least 0; got '0.2'"),
        ({"clip_high": -0.1}, ValueError, "clip_high must be a finite number of at least 0; got -0.1"),
        ({"clip_high": math.nan}, ValueError, "got nan"),
        ({"reduce_by": "mean"}, ValueError, "reduce_by must be one of 'sequence', 'token', 'length'; got 'mean'"),
        ({"reduce_by": "length"}, ValueError, "max_length, the most tokens of an answer, is for"),
        ({"max_length": 5}, ValueError, "is for reduce_by='length', and for that alone"),
        ({"reduce_by": "length", "max_length": 5.0}, TypeError, "max_length must be a whole number .* got 5.0"),
        ({"reduce_by": "length", "max_length": 4}, ValueError, "max_length must be at least 5, .* got 4"),
    ],
)
def test_what_is_wrong_is_said(wrong, error, words):
    with pytest.raises(error, match=words):
        clipped_loss(**{**GIVEN, **wrong})
