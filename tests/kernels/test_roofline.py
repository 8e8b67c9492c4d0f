"""Counted traffic against counts by hand, and the least times that follow from it."""

import pytest
import torch
import torch.nn.functional as F

from mini_impl.finetuning.policy import _token_logprobs
from mini_impl.forecasting.dlinear import decompose
from mini_impl.kernels.clipped_loss import clipped_loss_torch
from mini_impl.kernels.roofline import CARDS, Card, Traffic, count, memory_bound, seconds
from tests.tensors import random, whole

NOTHING = Traffic(0, 0, 0, 0)
A, B = (random(2, 3, seed=seed, dtype=torch.float32) for seed in range(2))  # 24 bytes each
ROWS = random(4, 10, dtype=torch.float32)
MASK = torch.tensor([[True, False, True], [False, True, False]])


def test_traffic_is_added_up_field_by_field():
    both = Traffic(1, 2, 3, 4) + Traffic(10, 20, 30, 40)
    assert both == Traffic(11, 22, 33, 44) and both.moved == 33
    assert sum([Traffic(1, 2, 3, 4), both], NOTHING) == Traffic(12, 24, 36, 48)


@pytest.mark.parametrize(
    ("work", "read", "written", "operations"),
    [
        (lambda: A + B, 48, 24, 6),
        (lambda: A * A, 24, 24, 6),  # one tensor, given twice
        (lambda: A + 1, 24, 24, 6),
        (lambda: A.bfloat16(), 24, 12, 0),
        (lambda: A.double().exp(), 24 + 48, 48 + 48, 6),
        (lambda: A @ B.T, 48, 16, 2 * 2 * 2 * 3),
        (lambda: torch.addmm(torch.zeros(2, 2), A, B.T), 16 + 48, 16 + 16, 2 * 2 * 2 * 3),
        (lambda: A.sum(), 24, 4, 6),
        (lambda: A.sum(1), 24, 8, 6),
        (lambda: ROWS.softmax(-1), 160, 160, 40),
        (lambda: A > 0, 24, 6, 6),
        (lambda: MASK.sum(1), 6, 16, 0),
        (lambda: F.avg_pool1d(ROWS, 3, stride=1), 160, 4 * 8 * 4, 4 * 8 * 3),
        (lambda: ROWS.gather(1, torch.zeros(4, 1, dtype=torch.long)), 16 + 32 + 0, 16 + 32, 0),
    ],
)
def test_what_one_operation_moves_and_computes(work, read, written, operations):
    got = count(work)
    assert got[:3] == (read, written, operations)


@pytest.mark.parametrize(
    "view",
    [
        lambda: A.view(3, 2),
        lambda: A.mT,
        lambda: A[:, 1:],
        lambda: A.expand(5, 2, 3),
        lambda: A.reshape(6).detach(),
        lambda: torch.empty(7),
        lambda: torch.empty_like(A),
        lambda: A[:0] + B[:0],
    ],
)
def test_a_view_and_what_is_empty_move_nothing(view):
    assert count(view) == NOTHING


def test_an_expanded_tensor_counts_what_is_stored():
    assert count(lambda: A.expand(5, 2, 3) + 1) == Traffic(24, 5 * 24, 30, 1)
    windows = torch.arange(10.0).unfold(0, 4, 1)  # [7, 4], of 10 numbers
    assert count(lambda: windows * 2) == Traffic(40, 4 * 28, 28, 1)


def test_what_is_changed_in_place_is_read_and_written_and_what_is_overwritten_only_written():
    here = torch.zeros(2, 3)
    assert count(lambda: here.add_(A)) == Traffic(48, 24, 6, 1)
    assert count(lambda: here.mul_(2)) == Traffic(24, 24, 6, 1)
    assert count(lambda: here.zero_()) == Traffic(0, 24, 0, 1)
    assert count(lambda: here.copy_(A)) == Traffic(24, 24, 0, 1)
    assert count(lambda: torch.mul(A, B, out=here)) == Traffic(48, 24, 6, 1)
    assert count(lambda: here[:, :1].fill_(3)) == Traffic(0, 8, 0, 1)


def test_a_backward_pass_is_counted():
    x = A.clone().requires_grad_()
    y = x.exp().sum()
    # the slope of the sum is a 1, expanded; its product with e^x is the gradient; nothing was there to add it to
    assert count(y.backward) == Traffic(4 + 24, 4 + 24, 6, 2)
    forward = count(lambda: x.exp().sum())
    assert count(lambda: x.exp().sum().backward()).read > forward.read == 48


# --- what the kernels replace -----------------------------------------------------------------------------------------


def test_the_eager_decomposition():
    series = random(2, 20, 3, dtype=torch.float32)  # n entries
    n, longer, k = 2 * 20 * 3, 2 * 24 * 3, 5
    checked = count(lambda: series.aminmax())
    padded = Traffic(4 * n, 4 * longer, 0, 1)
    averaged = Traffic(4 * longer, 4 * n, k * n, 1)
    rest = Traffic(4 * 2 * n, 4 * n, n, 1)
    assert count(lambda: decompose(series, k)) == checked + padded + averaged + rest


def test_the_eager_log_probabilities():
    rows, vocabulary = 4, 10
    table, tokens = rows * vocabulary, whole(10, 4)
    logits = ROWS.clone().requires_grad_()
    got = count(lambda: _token_logprobs(logits, tokens))
    softmax = Traffic(4 * table, 4 * table, table, 1)
    chosen = Traffic(rows * (4 + 8), 4 * rows + 4, 0, 1)  # and the total weight, a number
    assert got == softmax + chosen + Traffic(4 * rows, 4 * rows, rows, 1)
    logprobs = _token_logprobs(logits, tokens)
    backward = count(lambda: logprobs.backward(torch.ones(rows)))
    assert backward.written >= 2 * 4 * table and backward.read >= 2 * 4 * table  # -onehot first, its gradient then


def test_the_eager_clipped_loss():
    logprobs, old, advantages, n, rows = A, B, random(2, dtype=torch.float32), 6, 2
    got = count(lambda: clipped_loss_torch(logprobs, old, advantages, MASK))
    parts = {
        "difference": Traffic(8 * n, 4 * n, n, 1),
        "0 where the mask is": Traffic(5 * n + 4, 4 * n + 4, 0, 2),
        "ratio": Traffic(4 * n, 4 * n, n, 1),
        "times A": Traffic(4 * n + 4 * rows, 4 * n, n, 1),
        "clip": Traffic(4 * n, 4 * n, n, 1),
        "clipped times A": Traffic(4 * n + 4 * rows, 4 * n, n, 1),
        "minimum": Traffic(8 * n, 4 * n, n, 1),
        "minus": Traffic(4 * n, 4 * n, n, 1),
        "tokens": Traffic(n, 8 * rows, 0, 1),
        "at least 1": Traffic(8 * rows, 8 * rows, 0, 1),
        "times the sequences": Traffic(8 * rows, 8 * rows, 0, 1),
        "kept losses": Traffic(5 * n + 4, 4 * n + 4, 0, 2),
        "mean": Traffic(4 * n + 8 * rows, 4 * n, n, 1),
        "sum": Traffic(4 * n, 4, n, 1),
    }
    assert got == sum(parts.values(), NOTHING)


# --- the least time ---------------------------------------------------------------------------------------------------


def test_the_cards_are_those_of_the_datasheets():
    figures = {name: card[1:] for name, card in CARDS.items()}
    assert figures == {
        "T4": (320e9, 8.1e12, 65e12, 16e9, (7, 5)),
        "A100": (2039e9, 19.5e12, 312e12, 80e9, (8, 0)),
        "H100": (3350e9, 67e12, 989e12, 80e9, (9, 0)),
    }


def test_the_time_is_that_of_the_bytes_or_of_the_arithmetic():
    card = Card("a card", bandwidth=100.0, arithmetic=1000.0, tensor=1e4, memory=10**9, compute_capability=(8, 0))
    assert seconds(Traffic(150, 50, 1000, 1), card) == 2 and memory_bound(Traffic(150, 50, 1000, 1), card)
    assert seconds(Traffic(150, 50, 3000, 1), card) == 3 and not memory_bound(Traffic(150, 50, 3000, 1), card)
    # A sum of two tensors of 2^28 numbers, 3 GiB moved, on a T4: 10.07 ms; its arithmetic: .03 ms.
    total = Traffic(2**31, 2**30, 2**28, 1)
    assert seconds(total, CARDS["T4"]) == pytest.approx(3 * 2**30 / 320e9) == pytest.approx(10.066e-3, rel=1e-4)
    # A product of two square matrices of 4096: 137 billion operations, .2 GB.
    product = Traffic(2 * 4 * 4096**2, 4 * 4096**2, 2 * 4096**3, 1)
    assert not memory_bound(product, CARDS["H100"]) and seconds(product, CARDS["H100"]) == 2 * 4096**3 / 67e12
