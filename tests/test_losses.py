"""What every loss returns, and the shared penalties: by hand, in closed form, against scipy-free numpy arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl.losses import LossTerms, NonFiniteLoss, kl_from_uniform, orthogonality
from tests.tensors import random

# --- LossTerms --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5))
def test_terms_sum_to_total(values):
    loss = LossTerms.of(**{f"t{i}": torch.tensor(value, dtype=torch.float64) for i, value in enumerate(values)})
    assert loss.total.item() == pytest.approx(sum(values), rel=1e-12, abs=1e-9)
    assert list(loss.values().values()) == pytest.approx(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_term_is_named(bad):
    with pytest.raises(NonFiniteLoss, match="the term 'b' of the loss is"):
        LossTerms.of(a=torch.tensor(1.0), b=torch.tensor(bad)).values()
    assert issubclass(NonFiniteLoss, ValueError)


# --- orthogonality ----------------------------------------------------------------------------------------------------


def test_orthogonality_by_hand():
    matrix = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)  # W'W - I = [[0, 1], [1, 1]]
    assert orthogonality(matrix).item() == pytest.approx(3)
    assert orthogonality(matrix, norm="spectral").item() == pytest.approx(((1 + 5**0.5) / 2) ** 2)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_orthogonality_against_numpy_and_its_floor(batch, rows, columns, seed):
    matrix = random(batch, rows, columns, seed=seed)
    excess = [w.T @ w - np.eye(columns) for w in matrix.numpy()]
    assert orthogonality(matrix).item() == pytest.approx(np.mean([(e**2).sum() for e in excess]), rel=1e-10)
    largest = np.mean([np.abs(np.linalg.eigvalsh(e)).max() ** 2 for e in excess])
    assert orthogonality(matrix, norm="spectral").item() == pytest.approx(largest, rel=1e-8)
    assert orthogonality(matrix).item() >= max(0, columns - rows) - 1e-9
    q, _ = torch.linalg.qr(random(rows, rows, seed=seed))
    frame = q[:, :columns] if columns <= rows else torch.cat([q, torch.zeros(rows, columns - rows)], 1)
    assert orthogonality(frame).item() == pytest.approx(max(0, columns - rows), abs=1e-10)  # the floor is reached


@pytest.mark.parametrize("norm", ["fro", "spectral"])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 4, 3), (3, 3), (1, 5), (5, 1)])
def test_orthogonality_gradient(norm, shape):
    matrix = random(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: orthogonality(w, norm), (matrix,))
    if norm == "fro":
        w = matrix.detach()
        derived = 4 * w @ (w.mT @ w - torch.eye(shape[-1], dtype=torch.float64)) / math.prod(shape[:-2])
        torch.testing.assert_close(torch.autograd.grad(orthogonality(matrix), matrix)[0], derived)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_orthogonality_of_rows_or_of_columns(rows, columns, seed):
    """||W'W - I||^2 = ||WW' - I||^2 + columns - rows in the Frobenius norm: another floor, and the same gradient."""
    matrix = random(rows, columns, seed=seed).requires_grad_()
    here, there = orthogonality(matrix), orthogonality(matrix.mT)
    torch.testing.assert_close(here, there + columns - rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(here, matrix), torch.autograd.grad(there, matrix))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_the_spectral_norm_tells_rows_from_columns(rows, more, seed):
    """With more columns than rows W'W has an eigenvalue 0, 1 away from that of I, whatever W is: no gradient there."""
    wide = (0.5 * random(rows, rows + more, seed=seed) / (rows + more)).requires_grad_()  # all singular values below 1
    assert torch.linalg.matrix_norm(wide, 2) < 1
    value = orthogonality(wide, "spectral")
    assert value.item() == 1 and not torch.autograd.grad(value, wide)[0].any()
    tall = orthogonality(wide.mT, "spectral")
    assert 0 < tall.item() < 1 and torch.autograd.grad(tall, wide)[0].any()
    rows_orthonormal = torch.linalg.qr(random(rows + more, rows, seed=seed)).Q.mT
    assert orthogonality(rows_orthonormal, "spectral").item() == pytest.approx(1)
    assert orthogonality(rows_orthonormal.mT, "spectral").item() == pytest.approx(0, abs=1e-20)
    assert orthogonality(rows_orthonormal).item() == pytest.approx(more)
    assert orthogonality(2 * rows_orthonormal, "spectral").item() == pytest.approx(9)  # 2^2 is further from 1 than 0


@given(st.integers(1, 8), st.integers(0, 10**6))
def test_orthogonality_of_one_row(columns, seed):
    """(|w|^2 - 1)^2 + columns - 1; a row of probabilities reaches the floor by picking one, and uniform it is worst."""
    row = random(1, columns, seed=seed).softmax(-1)
    expected = (row.square().sum().item() - 1) ** 2 + columns - 1
    assert orthogonality(row).item() == pytest.approx(expected)
    assert orthogonality(torch.eye(columns, dtype=torch.float64)[:1]).item() == columns - 1
    uniform = orthogonality(torch.full_like(row, 1 / columns)).item()
    assert uniform == pytest.approx((1 / columns - 1) ** 2 + columns - 1)
    assert columns - 1 <= expected <= uniform + 1e-9


@given(st.integers(1, 5), st.integers(1, 5))
def test_orthogonality_of_uniform_rows(rows, columns):
    """All entries 1 / columns: W'W has one eigenvalue rows / columns, and else zeros."""
    uniform = torch.full((rows, columns), 1 / columns, dtype=torch.float64)
    assert orthogonality(uniform).item() == pytest.approx((rows / columns - 1) ** 2 + columns - 1)
    spectral = max(abs(rows / columns - 1), 1.0 if columns > 1 else 0.0) ** 2
    assert orthogonality(uniform, "spectral").item() == pytest.approx(spectral)


def test_orthogonality_is_a_mean_over_leading_axes():
    matrices = random(2, 3, 4, 5)
    for norm in ("fro", "spectral"):
        alone = [orthogonality(matrix, norm).item() for matrix in matrices.flatten(0, 1)]
        assert orthogonality(matrices, norm).item() == pytest.approx(sum(alone) / 6)


# --- kl_from_uniform --------------------------------------------------------------------------------------------------


def test_kl_by_hand_and_at_its_ends():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0], dtype=torch.float64)
    assert kl_from_uniform(p).item() == pytest.approx(math.log(4) - 1.5 * math.log(2))
    assert kl_from_uniform(torch.full((3, 5), 0.2)).item() == pytest.approx(0, abs=1e-6)
    assert kl_from_uniform(torch.eye(6, dtype=torch.float64)).item() == pytest.approx(math.log(6))


@given(st.integers(1, 4), st.integers(2, 8), st.integers(0, 10**6))
def test_kl_against_torch(batch, choices, seed):
    p = random(batch, choices, seed=seed).softmax(-1)
    uniform = torch.full_like(p, 1 / choices)
    expected = torch.nn.functional.kl_div(uniform.log(), p, reduction="batchmean")
    torch.testing.assert_close(kl_from_uniform(p), expected, rtol=1e-10, atol=1e-12)
    assert -1e-12 <= kl_from_uniform(p).item() <= math.log(choices)


def test_kl_gradient():
    scores = random(3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: kl_from_uniform(s.softmax(-1)), (scores,))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: orthogonality(torch.ones(3)), ValueError, r"matrix.*\[.., row, column\].*got shape \[3\]"),
        (lambda: orthogonality(torch.eye(3).long()), TypeError, "matrix.*int64"),
        (lambda: orthogonality(torch.eye(3), norm="nuclear"), ValueError, "norm must be one of 'fro', 'spectral'"),
        (lambda: orthogonality(torch.eye(3) / 0), NonFiniteLoss, "matrix.*NaN or infinite"),
        (lambda: orthogonality(1e30 * torch.eye(3), "spectral"), NonFiniteLoss, "matrix.*NaN or infinite"),
        (lambda: orthogonality(torch.ones(2, 0, 3)), ValueError, r"matrix.*no axis empty; got shape \[2, 0, 3\]"),
        (lambda: kl_from_uniform(torch.ones(3) / 0), NonFiniteLoss, "probabilities.*NaN or infinite"),
        (lambda: kl_from_uniform(torch.ones(3)), ValueError, "sum to 1.*sums from 3 to 3"),
        (lambda: kl_from_uniform(torch.tensor([1.5, -0.5])), ValueError, "not be negative.*-0.5"),
        (lambda: kl_from_uniform(torch.tensor(1.0)), ValueError, "probabilities"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_probability_of_zero_has_a_gradient():
    scores = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)  # in float32 the second probability is exactly 0
    probabilities = scores.softmax(-1)
    assert probabilities[0, 1] == 0
    kl_from_uniform(probabilities).backward()
    assert torch.isfinite(scores.grad).all() and scores.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_probabilities_are_probabilities(dtype):
    p = random(50, 7).softmax(-1).to(dtype)
    assert kl_from_uniform(p).item() == pytest.approx(kl_from_uniform(random(50, 7).softmax(-1)).item(), abs=0.05)


def test_totals_and_kinds_are_checked_too():
    with pytest.raises(NonFiniteLoss, match="'total'"):
        LossTerms.of(a=torch.tensor(3e38), b=torch.tensor(3e38)).values()
    with pytest.raises(NonFiniteLoss, match="'total'"):
        LossTerms(torch.tensor(math.nan), {"a": torch.tensor(1.0)}).values()
    with pytest.raises(TypeError, match=r"'a'.*scalar tensor"):
        LossTerms(torch.tensor(1.0), {"a": 1.0}).values()
