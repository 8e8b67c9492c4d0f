"""What a caller can get wrong, said clearly: which argument, what it got, what it wants."""

import math
from numbers import Integral, Real

import torch
from torch import Tensor


def tensor(name: str, value, *axes: str, finite: bool = True) -> Tensor:
    """Return `value` if it is a floating-point tensor with these axes, none of them empty, and (unless told) finite.

    Raises TypeError for something that is no floating-point tensor, ValueError for wrong axes or non-finite entries.
    """
    wanted = f"{name} must be a floating-point tensor [{', '.join(axes)}]"
    if not isinstance(value, Tensor):
        raise TypeError(f"{wanted}; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{wanted}; got dtype {value.dtype}")
    if value.ndim != len(axes) or 0 in value.shape:
        raise ValueError(f"{wanted}, no axis empty; got shape {list(value.shape)}")
    if finite and not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{wanted} of finite numbers; {bad} of its {value.numel()} are NaN or infinite")
    return value


def alike(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless two tensors agree in shape (ValueError), dtype (TypeError) and device (ValueError)."""
    if value.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape; got {list(value.shape)} and {list(other.shape)}"
        )
    if value.dtype != other.dtype:
        raise TypeError(f"{name} and {other_name} must have one dtype; got {value.dtype} and {other.dtype}")
    if value.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device; got {value.device} and {other.device}")


def integer(name: str, value, least: int = 1) -> int:
    """Return `value` if it is a whole number of at least `least`; a bool is none. Raises TypeError, ValueError."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    return int(value)


def number(name: str, value, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return `value` if it is a finite real number, at least `least` and greater than `above`. Raises TypeError, ValueError."""
    wanted = f"{name} must be a finite number"
    wanted += f" greater than {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{wanted}; got {value!r}")
    if not math.isfinite(value) or value < least or value <= above:
        raise ValueError(f"{wanted}; got {value}")
    return float(value)


def choice(name: str, value, choices) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
