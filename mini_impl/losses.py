"""What every loss of the book returns, and the penalties that several chapters share."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mini_impl import checks


class NonFiniteLoss(ValueError, FloatingPointError):
    """A term of a loss came out NaN or infinite, or what it is made of did; the message names it."""


class LossTerms(NamedTuple):
    """A loss and the weighted terms that it is the sum of.

    total: scalar tensor, to call `backward()` on.
    terms: {name: scalar tensor}; each with its weight already in it, so that they sum to total.
    """

    total: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def of(cls, **terms: Tensor) -> "LossTerms":
        """Add up the given terms. No number is read, as that would make the host wait for the device."""
        first, *others = terms.values()
        return cls(sum(others, first), terms)

    def values(self) -> dict[str, float]:
        """The terms as Python numbers, read from the device at once: `fit` and `fine_tune` do it at every step.

        Raises NonFiniteLoss, naming it, if a term or the total is NaN or infinite; TypeError for one that is no scalar.
        """
        scalars = {**self.terms, "total": self.total}
        for name, value in scalars.items():
            if not isinstance(value, Tensor) or value.ndim:
                raise TypeError(f"the term {name!r} of the loss must be a scalar tensor; got {value!r}")
        numbers = torch.stack([value.detach() for value in scalars.values()]).tolist()
        for name, value in zip(scalars, numbers, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(f"the term {name!r} of the loss is {value}; every term must be a finite number")
        return dict(zip(self.terms, numbers, strict=False))  # the last number is the total


def orthogonality(matrix: Tensor, norm: str = "fro") -> Tensor:
    """How far the columns of a matrix are from orthonormal: the mean over the leading axes of ||W'W - I||^2.

    matrix: [.., row, column], W of the formula.
    norm: "fro" sums the squares of all entries of W'W - I; "spectral" takes its largest eigenvalue in size, squared.
    With more columns than rows W'W cannot be I: the squared Frobenius norm is then at least columns - rows.
    Raises TypeError, ValueError for something that is no matrix, NonFiniteLoss if it holds NaN or infinity or W'W does.
    Source: documented iTransformer and TimeXer.
    """
    checks.tensor("matrix", matrix, ..., "row", "column")
    checks.choice("norm", norm, ("fro", "spectral"))
    checks.look(checks.finite("W'W of the penalised matrix W", _gram(matrix), NonFiniteLoss))
    return _orthogonality(matrix, norm)


def _orthogonality(matrix: Tensor, norm: str = "fro") -> Tensor:
    """orthogonality of what a model has made: NaN is for `LossTerms.values` to name."""
    rows, columns = matrix.shape[-2:]
    excess = _gram(matrix) - torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    missing = max(0, columns - rows)  # so many eigenvalues of W'W are 0; each is 1 away from that of I
    if norm == "fro":
        return (excess.square().sum((-2, -1)) + missing).mean()
    largest = torch.linalg.eigvalsh(excess).abs().amax(-1)
    return (largest.clamp(min=1) if missing else largest).square().mean()


def _gram(matrix: Tensor) -> Tensor:
    """W'W or, where it is smaller, WW': they share their eigenvalues, but for zeros, so the smaller one says all."""
    rows, columns = matrix.shape[-2:]
    return matrix @ matrix.mT if rows < columns else matrix.mT @ matrix


def kl_from_uniform(probabilities: Tensor) -> Tensor:
    """KL(p || uniform) = sum_i p_i log(n p_i) in nats, over the last axis; the mean over the leading axes.

    probabilities: [.., choice], not negative, each row with sum 1. 0 log 0 counts as 0.
    Between 0 (p uniform) and log n (all on one choice).
    Raises TypeError, ValueError for rows that are no probabilities, NonFiniteLoss for NaN or infinity among them.
    Source: documented PatchTST and DAPO.
    """
    checks.tensor("probabilities", probabilities, ..., "choice")
    checks.look(_probabilities(probabilities.detach()))
    return _kl_from_uniform(probabilities)


def _kl_from_uniform(probabilities: Tensor) -> Tensor:
    """kl_from_uniform of what a softmax has made."""
    positive = probabilities.where(probabilities > 0, torch.finfo(probabilities.dtype).tiny)  # log 0 has no gradient
    return (probabilities * (probabilities.shape[-1] * positive).log()).sum(-1).mean()


def _probabilities(values: Tensor) -> checks.Requirement:
    """Rows that are not negative and sum to 1."""
    (low, high), all_finite = checks.finite("probabilities", values, NonFiniteLoss)
    rounding = 2e-2 if values.dtype.itemsize == 2 else 1e-3  # half precision has 2 or 3 digits

    def judge(low: float, high: float, least: float, most: float) -> None:
        all_finite(low, high)
        if low < 0 or max(abs(least - 1), abs(most - 1)) > rounding:
            raise ValueError(
                "probabilities must not be negative and must sum to 1 over the last axis; "
                f"got a smallest entry of {low:.4g} and sums from {least:.4g} to {most:.4g}"
            )

    return checks.Requirement((low, high, *values.float().sum(-1).aminmax()), judge)
