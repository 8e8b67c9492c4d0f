"""What every loss of the book returns."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class NonFiniteLoss(ValueError, FloatingPointError):
    """A term of a loss came out NaN or infinite; the message names it."""


class LossTerms(NamedTuple):
    """A loss and the weighted terms that it is the sum of.

    total: scalar tensor, to call `backward()` on.
    terms: {name: scalar tensor}; each with its weight already in it, so that they sum to total.
    """

    total: Tensor
    terms: dict[str, Tensor]

    @classmethod
    def of(cls, **terms: Tensor) -> "LossTerms":
        """Add up the given terms. Raises NonFiniteLoss, naming the term, if one of them is NaN or infinite."""
        loss = cls(sum(terms.values()), terms)
        loss.values()
        return loss

    def values(self) -> dict[str, float]:
        """The terms as Python numbers. Raises NonFiniteLoss, naming the term, if one of them is NaN or infinite."""
        numbers = torch.stack([term.detach() for term in self.terms.values()]).tolist()
        for name, value in zip(self.terms, numbers, strict=True):
            if not math.isfinite(value):
                raise NonFiniteLoss(f"the term {name!r} of the loss is {value}; every term must be a finite number")
        return dict(zip(self.terms, numbers, strict=True))
