"""What a caller can get wrong, said clearly: which argument, what it got, what it wants.

A public function calls these where its arguments come in, and what is inside does not check again. Sizes, dtypes and
devices cost nothing to look at. The numbers in a tensor do, as the host waits for the device until they are there: so
a function says all that it requires of them in one call, `look(finite(..), token_ids(..))`, which reads once.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import NamedTuple

import torch
from torch import Tensor

# --- tensors: type and axes -------------------------------------------------------------------------------------------


def tensor(name: str, value, *axes) -> Tensor:
    """Return `value` if it is a floating-point tensor with these axes, none of them empty.

    axes: their names, for the message; a first one of `...` stands for any number of leading axes.
    Raises TypeError for something that is no floating-point tensor, ValueError for other axes.
    """
    floating = isinstance(value, Tensor) and value.is_floating_point()
    if floating and (len(axes) - 1 <= value.ndim if axes[0] is ... else len(axes) == value.ndim) and value.numel():
        return value
    wanted = f"{name} must be a floating-point tensor [{', '.join('..' if axis is ... else axis for axis in axes)}]"
    if not floating:
        raise TypeError(f"{wanted}; got {_kind(value)}")
    raise ValueError(f"{wanted}, no axis empty; got shape {list(value.shape)}")


def _kind(value) -> str:
    """What something is that is no tensor, or none of the wanted dtype."""
    return f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


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


def suits(name: str, value: Tensor, weight: Tensor) -> None:
    """Raise unless a tensor has the dtype (TypeError) and the device (ValueError) of a model's weights."""
    if value.dtype != weight.dtype:
        raise TypeError(f"{name} must have the dtype of the model, {weight.dtype}; got {value.dtype}")
    if value.device != weight.device:
        raise ValueError(f"{name} must be on the device of the model, {weight.device}; got {value.device}")


def bool_mask(name: str, mask, like: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless a mask is a bool tensor of this shape, that of `like`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or list(mask.shape) != list(shape):
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a bool tensor {like} {list(shape)}; got {got}")


# --- tensors: the numbers in them -------------------------------------------------------------------------------------


class Requirement(NamedTuple):
    """What must hold of a tensor: some numbers of it that are still on its device, and what judges them."""

    numbers: tuple[Tensor, ...]  # scalars
    judge: Callable[..., None]  # called with them as Python numbers; raises


def look(*requirements: Requirement) -> None:
    """Judge the numbers of all requirements, read from the device together. Nothing is read while torch compiles."""
    if torch.compiler.is_compiling():
        return
    scalars = [number for required in requirements for number in required.numbers]
    # On the CPU there is nothing to wait for, and reading them one by one is quicker.
    numbers = [scalar.item() for scalar in scalars] if scalars[0].is_cpu else torch.stack(scalars).tolist()
    place = 0
    for required in requirements:
        count = len(required.numbers)
        required.judge(*numbers[place : place + count])
        place += count


def finite(name: str, value: Tensor, error: type[ValueError] = ValueError, bound: float = math.inf) -> Requirement:
    """No NaN and no infinity, in any tensor of floats, nor a number beyond a bound; else ValueError, or the given kind.

    bound: how far from 0 a number may be.
    """

    def judge(least: float, most: float) -> None:
        if bound < max(-least, most) < math.inf:
            raise error(f"{name} must hold numbers of at most {bound:.3g} in size; got {max(-least, most):.3g}")
        if not math.isfinite(least + most):
            bad = value.numel() - int(value.isfinite().sum())
            raise error(f"{name} must hold finite numbers only; {bad} of its {value.numel()} are NaN or infinite")

    return Requirement(value.detach().aminmax(), judge)


def logprobs(name: str, value: Tensor, kept: Tensor | None = None, error: type[ValueError] = ValueError) -> Requirement:
    """Logarithms of probabilities where a bool mask counts: at most 0 but for rounding; else ValueError.

    error: what is raised for NaN and infinity.
    """

    def judge(least: float, most: float) -> None:
        if math.isfinite(least) and most <= 1e-3:
            return
        if kept is not None:  # what stands beside the mask may be anything
            look(logprobs(name, value.detach().where(kept, 0), error=error))
            return
        finite(name, value, error).judge(least, most)
        raise ValueError(f"{name} must be logarithms of probabilities, at most 0; got {most:.4g}")

    return Requirement(value.detach().aminmax(), judge)


def counted(mask: Tensor, name: str = "mask") -> list[Requirement]:
    """A mask [row, token] of bool, or of 0 and 1, that counts a token in each row; else ValueError with the rows."""
    kept = mask.bool()

    def judge_rows(all_count: float) -> None:
        if not all_count:
            empty = (~kept.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"{name} counts no token of the rows {empty}; leave those rows out")

    def judge_numbers(binary: float) -> None:
        if not binary:
            raise ValueError(
                f"{name} must be a tensor of bool, or of 0 and 1; got other numbers among its {mask.dtype}"
            )

    rows = Requirement((kept.any(1).all(),), judge_rows)
    return [rows] if mask is kept else [Requirement(((mask == kept).all(),), judge_numbers), rows]


def known_ids(name: str, ids: Tensor, vocab_size: int) -> Requirement:
    """Token ids from 0 to vocab_size - 1; else ValueError."""

    def judge(least: float, most: float) -> None:
        if least < 0 or most >= vocab_size:
            wanted = f"{name} must hold token ids, whole numbers from 0 to {vocab_size - 1}"
            raise ValueError(f"{wanted}; got ids from {least:.0f} to {most:.0f}")

    return Requirement(ids.long().aminmax(), judge)


# --- numbers and names ------------------------------------------------------------------------------------------------


def integer(name: str, value, least: int = 1, most: int | None = None, why: str = "") -> int:
    """Return `value` if it is a whole number from `least` to `most`; a bool is none. Raises TypeError, ValueError.

    why: the reason for `most`, for the message.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of at least {least}; got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}{why and f', {why}'}; got {value}")
    return int(value)


def integers(least: int = 1, **values) -> tuple[int, ...]:
    """Return these as Python's whole numbers if each is at least `least`. Raises as integer does.

    width, layers = integers(width=width, layers=layers): from here on a numpy.uint8 cannot overflow.
    """
    return tuple(integer(name, value, least) for name, value in values.items())


def odd(name: str, value, most: int) -> int:
    """Return `value` if it is odd, at least 1 and at most `most`, the time steps to average. Raises as integer does."""
    if integer(name, value) % 2 == 0 or value > most:
        largest = f"at most {most - (most + 1) % 2}, as there are {most} time steps"
        raise ValueError(f"{name} must be odd, so that the average has a middle, and {largest}; got {value}")
    return int(value)


def divides(name: str, value, whole_name: str, whole) -> int:
    """Return `value` if it is a whole number of which `whole` is a multiple. Raises TypeError, ValueError."""
    if integer(whole_name, whole) % integer(name, value):
        raise ValueError(f"{whole_name} must be a multiple of {name}; got {whole} and {value}")
    return int(value)


def indices(name: str, value, size: int) -> tuple[int, ...]:
    """Return the places that one index or several name on an axis of `size`, a negative index counted from its end.

    Raises TypeError for what is no index, ValueError for none at all, one out of range, or one place named twice.
    """
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    wanted = f"{name} must be an index from {-size} to {size - 1}, or several that differ; got {value!r}"
    if any(isinstance(index, bool) or not isinstance(index, Integral) for index in given):
        raise TypeError(wanted)
    places = tuple(int(index) + size if index < 0 else int(index) for index in given)
    if not places or len(set(places)) < len(places) or not all(0 <= place < size for place in places):
        raise ValueError(wanted)
    return places


def number(
    name: str,
    value,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> float:
    """Return `value` if it is finite, from `least` to `most`, greater than `above` and less than `below`.

    Raises TypeError, ValueError.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if real and least <= value <= most and above < value < below:  # so finite too
        return float(value)
    given = ((" greater than", above), (" of at least", least), (" of at most", most), (" less than", below))
    bounds = " and".join(f"{words} {bound:g}" for words, bound in given if math.isfinite(bound))
    raise (ValueError if real else TypeError)(f"{name} must be a finite number{bounds}; got {value!r}")


def positive(**values) -> None:
    """Raise unless each of these is a finite number greater than 0: positive(temperature=temperature)."""
    for name, value in values.items():
        number(name, value, above=0)


def not_negative(**values) -> None:
    """Raise unless each of these is a finite number of at least 0: not_negative(clip_low=clip_low)."""
    for name, value in values.items():
        number(name, value, least=0)


def flags(**values) -> None:
    """Raise TypeError unless each of these is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False; got {value!r}")


def choice(name: str, value, choices) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if isinstance(value, Tensor) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def instance(name: str, value, kind: type | tuple[type, ...], wanted: str) -> None:
    """Raise TypeError, saying what is `wanted`, unless `value` is of a kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {wanted}; got {type(value).__name__}")


def device(name: str, value) -> torch.device:
    """Return the torch.device if something can be put there now. Raises ValueError."""
    try:
        probe = torch.zeros(1, device=value)
        probe.cpu()  # the meta device takes tensors, but holds no numbers
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them
        raise ValueError(f"{name}: {value!r} cannot be used here ({str(error).splitlines()[0]})") from None


# --- forecasters ------------------------------------------------------------------------------------------------------


def history(value, length: int, weight: Tensor, variables: int | None = None) -> None:
    """Raise unless `value` is a forecaster's input [batch, time, variable] of `length` finite steps like its weights.

    variables: how many it must have; None: any number.
    """
    tensor("history", value, "batch", "time", "variable")
    for size, wanted, axis in ((value.shape[1], length, "time steps"), (value.shape[2], variables, "variables")):
        if wanted is not None and size != wanted:
            made = "as the model was made for"
            raise ValueError(f"history must have {wanted} {axis}, {made}; got {list(value.shape)}")
    suits("history", value, weight)
    look(finite("history", value, bound=torch.finfo(value.dtype).max ** 0.5 / value.shape[1]))  # squares are added up


def forecast(output, target, **extra: tuple) -> None:
    """Raise unless `output` is a forecaster's and `target` fits its prediction [batch, horizon, variable].

    extra: another field that the loss needs, with its axes and the setting that has the model fill it, if one does:
    forecast(output, target, attention=(("window", "head", "query", "key"), "return_attention")).
    """
    for field in ("prediction", *extra):
        if not hasattr(output, field):
            got = f"{type(output).__module__}.{type(output).__name__}"
            raise TypeError(f"output must be what this module's model returned, with .{field}; got {got}")
    tensor("target", target, "batch", "horizon", "variable")
    tensor("output.prediction", output.prediction, "batch", "horizon", "variable")
    alike("output.prediction", output.prediction, "target", target)
    for field, (axes, setting) in extra.items():
        if getattr(output, field) is None:
            wanted = f"make the model with {setting}=True, so that it returns what this loss needs"
            raise ValueError(f"output.{field} is None: {wanted}")
        if axes:
            tensor(f"output.{field}", getattr(output, field), *axes)


# --- language models --------------------------------------------------------------------------------------------------


def token_ids(name: str, value, *axes) -> None:
    """Raise TypeError unless `value` holds whole numbers, ValueError unless it has these axes, none of them empty."""
    wanted = f"{name} must be a tensor of token ids [{', '.join(axes)}], whole numbers"
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{wanted}; got {_kind(value)}")
    if value.ndim != len(axes) or 0 in value.shape:
        raise ValueError(f"{wanted}, no axis empty; got shape {list(value.shape)}")


def token_mask(mask, **values) -> Tensor:
    """Return a mask [sequence, token] as bool, if it fits the values: floating-point tensors of its shape, all alike.

    mask: bool, or 0 and 1 of any dtype; whether it holds others, and counts a token in each row, `counted` says.
    """
    wanted = "mask must be a tensor of bool, or of 0 and 1, [sequence, token], no axis empty"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{wanted}; got {type(mask).__name__}")
    if mask.ndim != 2 or not mask.numel():
        raise ValueError(f"{wanted}; got shape {list(mask.shape)}")
    first = None
    for name, value in values.items():
        tensor(name, value, "sequence", "token")
        first = first or (name, value)
        alike(name, value, *first)
        if mask.shape != value.shape or mask.device != value.device:
            alike("mask", mask.to(value.dtype), name, value)
    return mask.bool()


def groups(name: str, value, **others) -> None:
    """Raise unless `value` is [prompt, group], at least two answers a group, and the others are of the same answers."""
    if tensor(name, value, "prompt", "group").shape[1] < 2:
        raise ValueError(
            f"{name} must hold at least 2 answers a group [prompt, group]; got shape {list(value.shape)}: "
            "an answer alone has nothing to be compared with"
        )
    for other_name, other in others.items():
        alike(other_name, tensor(other_name, other, "prompt", "group"), name, value)
