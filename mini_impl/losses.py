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
        """Add up the given terms. Raises NonFiniteLoss, naming it, if a term or the total is NaN or infinite."""
        loss = cls(sum(terms.values()), terms)
        if not math.isfinite(loss.total.item()):  # quick; a term that is not finite makes the total so
            loss.values()
        return loss

    def values(self) -> dict[str, float]:
        """The terms as Python numbers.

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
        return dict(zip(self.terms, numbers[:-1], strict=True))


def orthogonality(matrix: Tensor, norm: str = "fro") -> Tensor:
    """How far the columns of a matrix are from orthonormal: the mean over the leading axes of ||W'W - I||^2.

    matrix: [.., row, column], W of the formula.
    norm: "fro" sums the squares of all entries of W'W - I; "spectral" takes its largest eigenvalue in size, squared.
    With more columns than rows W'W cannot be I: the squared Frobenius norm is then at least columns - rows.
    Raises TypeError, ValueError for something that is no matrix, NonFiniteLoss if W'W holds NaN or infinity.
    Source: documented iTransformer and TimeXer.
    """
    checks.tensor("matrix", matrix, ..., "row", "column", finite=False)
    checks.choice("norm", norm, ("fro", "spectral"))
    rows, columns = matrix.shape[-2:]
    # W'W and WW' share their eigenvalues, but for zeros: the smaller of them says all, and costs less.
    gram = matrix @ matrix.mT if rows < columns else matrix.mT @ matrix
    checks.all_finite("W'W of the penalised matrix W", gram, NonFiniteLoss)
    excess = gram - torch.eye(min(rows, columns), dtype=matrix.dtype, device=matrix.device)
    missing = max(0, columns - rows)  # so many eigenvalues of W'W are 0; each is 1 away from that of I
    if norm == "fro":
        return (excess.square().sum((-2, -1)) + missing).mean()
    largest = torch.linalg.eigvalsh(excess).abs().amax(-1)
    return (largest.clamp(min=1) if missing else largest).square().mean()


def kl_from_uniform(probabilities: Tensor) -> Tensor:
    """KL(p || uniform) = sum_i p_i log(n p_i) in nats, over the last axis; the mean over the leading axes.

    probabilities: [.., choice], not negative, each row with sum 1. 0 log 0 counts as 0.
    Between 0 (p uniform) and log n (all on one choice).
    Raises TypeError, ValueError for rows that are no probabilities, NonFiniteLoss for NaN or infinity among them.
    Source: documented PatchTST and DAPO.
    """
    checks.tensor("probabilities", probabilities, ..., "choice", finite=False)
    checks.all_finite("probabilities", probabilities, NonFiniteLoss)
    sums = probabilities.detach().float().sum(-1)
    rounding = 2e-2 if probabilities.dtype.itemsize == 2 else 1e-3  # half precision has 2 or 3 digits
    if probabilities.min() < 0 or (sums - 1).abs().max() > rounding:
        raise ValueError(
            "probabilities must not be negative and must sum to 1 over the last axis; "
            f"got a smallest entry of {probabilities.min():.4g} and sums from {sums.min():.4g} to {sums.max():.4g}"
        )
    positive = probabilities.where(probabilities > 0, torch.finfo(probabilities.dtype).tiny)  # log 0 has no gradient
    return (probabilities * (probabilities.shape[-1] * positive).log()).sum(-1).mean()
