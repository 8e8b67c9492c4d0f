"""What a caller can get wrong, said clearly: which argument, what it got, what it wants."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def tensor(name: str, value, *axes, finite: bool = True) -> Tensor:
    """Return `value` if it is a floating-point tensor with these axes, none of them empty, and (unless told) finite.

    axes: their names, for the message; a first one of `...` stands for any number of leading axes.
    Raises TypeError for something that is no floating-point tensor, ValueError for wrong axes or non-finite entries.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{_wanted_tensor(name, axes)}; got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{_wanted_tensor(name, axes)}; got dtype {value.dtype}")
    right_axes = value.ndim >= len(axes) - 1 if axes[0] is ... else value.ndim == len(axes)
    if not right_axes or 0 in value.shape:
        raise ValueError(f"{_wanted_tensor(name, axes)}, no axis empty; got shape {list(value.shape)}")
    if finite:
        all_finite(name, value)
    return value


def _wanted_tensor(name: str, axes: tuple) -> str:
    """The first half of a message about a tensor."""
    return f"{name} must be a floating-point tensor [{', '.join('..' if axis is ... else axis for axis in axes)}]"


def all_finite(name: str, value: Tensor, error: type[ValueError] = ValueError) -> None:
    """Raise ValueError, or the given kind of it, if a tensor holds NaN or infinity."""
    if math.isfinite(value.detach().sum().item()):  # quick; only a sum that overflows is not so without a bad entry
        return
    bad = value.numel() - int(torch.isfinite(value).sum())
    if bad:
        raise error(f"{name} must hold finite numbers only; {bad} of its {value.numel()} are NaN or infinite")


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


def indices(name: str, value, size: int) -> tuple[int, ...]:
    """Return the places that one index or several name on an axis of `size`, a negative index counted from its end.

    Raises TypeError for what is no index, ValueError for none at all, one out of range, or one place named twice.
    """
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    wanted = f"{name} must be an index from {-size} to {size - 1}, or several that differ"
    if any(isinstance(index, bool) or not isinstance(index, Integral) for index in given):
        raise TypeError(f"{wanted}; got {value!r}")
    places = tuple(int(index) + size if index < 0 else int(index) for index in given)
    if not places or len(set(places)) < len(places) or not all(0 <= place < size for place in places):
        raise ValueError(f"{wanted}; got {value!r}")
    return places


def odd(name: str, value, most: int | None = None) -> int:
    """Return `value` if it is odd, at least 1 and at most `most`, the time steps to average. Raises as integer does."""
    if integer(name, value) % 2 == 0:
        raise ValueError(f"{name} must be odd, so that the average has a middle; got {value}")
    return integer(name, value, most=most, why="as there are no more time steps")


def divides(name: str, value, whole_name: str, whole) -> int:
    """Return `value` if it is a whole number of which `whole` is a multiple. Raises TypeError, ValueError."""
    if integer(whole_name, whole) % integer(name, value):
        raise ValueError(f"{whole_name} must be a multiple of {name}; got {whole} and {value}")
    return int(value)


def fraction(name: str, value) -> float:
    """Return `value` if it is at least 0 and less than 1, as a share to leave out is. Raises TypeError, ValueError."""
    if number(name, value, least=0) >= 1:
        raise ValueError(f"{name} must be less than 1; got {value}")
    return float(value)


def patches(time: int, patch_length, stride) -> None:
    """Raise unless patches of a length, `stride` steps apart, cover all time steps. Raises TypeError, ValueError."""
    integer("patch_length", patch_length, most=time, why="as there are no more time steps")
    integer("stride", stride, most=patch_length, why="the patch_length, or steps would be skipped")
    if rest := (time - patch_length) % stride:
        raise ValueError(
            f"{time} time steps cannot be cut into patches of {patch_length}, {stride} apart: the last {rest} would be "
            "left out; time - patch_length must be a multiple of stride"
        )


def hides_some(name: str, ratio, visible: int, patch_count: int) -> None:
    """Raise ValueError unless a mask leaves some of the patches visible and hides some."""
    if not 0 < visible < patch_count:
        raise ValueError(
            f"{name} must leave some of the {patch_count} patches visible and hide some; "
            f"{ratio} leaves {visible} visible"
        )


def flag(name: str, value) -> bool:
    """Return `value` if it is True or False. Raises TypeError."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return value


def number(name: str, value, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return `value` if it is finite, at least `least` and greater than `above`. Raises TypeError, ValueError."""
    wanted = f"{name} must be a finite number"
    if above > -math.inf:
        wanted += f" greater than {above:g}"
    elif least > -math.inf:
        wanted += f" of at least {least:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{wanted}; got {value!r}")
    if not math.isfinite(value) or value < least or value <= above:
        raise ValueError(f"{wanted}; got {value}")
    return float(value)


def device(name: str, value) -> torch.device:
    """Return the torch.device if something can be put there now. Raises ValueError."""
    try:
        probe = torch.zeros(1, device=value)
        probe.cpu()  # the meta device takes tensors, but holds no numbers
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises any of them
        raise ValueError(f"{name}: {value!r} cannot be used here ({str(error).splitlines()[0]})") from None


def choice(name: str, value, choices) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def pairs(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless [window, .., variable] tensors have as many windows and variables as each other."""
    if len(value) != len(other) or value.shape[-1] != other.shape[-1]:
        raise ValueError(
            f"{name} and {other_name} must have the same windows (first axis) and variables (last axis); "
            f"got {list(value.shape)} and {list(other.shape)}"
        )


def history(value, length: int, parameter: Tensor, variables: int | None = None) -> None:
    """Raise unless `value` is a forecaster's input [batch, time, variable] of `length` steps that suits its weights.

    variables: how many it must have; None: any number.
    """
    tensor("history", value, "batch", "time", "variable", finite=False)
    if value.shape[1] != length:
        raise ValueError(f"history must have {length} time steps, as the model was made for; got {list(value.shape)}")
    if variables is not None and value.shape[2] != variables:
        raise ValueError(f"history must have {variables} variables, as the model was made for; got {list(value.shape)}")
    _suits("history", value, parameter)
    all_finite("history", value)


def _suits(name: str, value: Tensor, parameter: Tensor) -> None:
    """Raise unless a tensor has the dtype and the device of a model's weights."""
    if value.dtype != parameter.dtype:
        raise TypeError(f"{name} must have the dtype of the model, {parameter.dtype}; got {value.dtype}")
    if value.device != parameter.device:
        raise ValueError(f"{name} must be on the device of the model, {parameter.device}; got {value.device}")


def exogenous(history: Tensor, value, mask, in_history: int) -> None:
    """Raise unless there is an exogenous variable, and those given beside the history fit it, with their mask.

    in_history: how many there are in the history already. In each window each given one may be missing, but not all.
    """
    if mask is not None and value is None:
        raise ValueError("exogenous_mask needs the exogenous series that it speaks of; got exogenous=None")
    if value is None:
        if not in_history:
            raise ValueError(
                "there is no exogenous variable: every variable of the history is endogenous; give exogenous series, "
                "or make the model with endogenous=None, where each variable is exogenous to all"
            )
        return
    tensor("exogenous", value, "batch", "time", "variable", finite=False)
    if len(value) != len(history) or value.shape[1] > history.shape[1]:
        raise ValueError(
            "exogenous must have as many windows as history, and at most as many time steps; "
            f"got {list(value.shape)} and {list(history.shape)}"
        )
    _suits("exogenous", value, history)
    if mask is None:
        all_finite("exogenous", value)
        return
    wanted = (torch.bool, value.shape, value.device)
    if not isinstance(mask, Tensor) or (mask.dtype, mask.shape, mask.device) != wanted:
        got = f"{mask.dtype} {list(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"exogenous_mask must be a bool tensor of the shape of exogenous, {list(value.shape)}, on {value.device}; "
            f"got {got}"
        )
    all_finite("exogenous, where exogenous_mask is True,", value.where(mask, 0))
    if not in_history and not (some := mask.any(2).any(1)).all():
        empty = (~some).nonzero().flatten().tolist()
        raise ValueError(f"exogenous_mask leaves no exogenous value at all in the windows {empty}; drop those windows")


def forecast(output, target, extra: str = "prediction") -> None:
    """Raise unless `output` is a forecaster's and `target` fits its prediction [batch, horizon, variable].

    extra: another field that the loss needs, and that another model's output may not have.
    """
    for field in ("prediction", extra):
        if not hasattr(output, field):
            got = f"{type(output).__module__}.{type(output).__name__}"
            raise TypeError(f"output must be what this module's model returned, with .{field}; got {got}")
    tensor("target", target, "batch", "horizon", "variable", finite=False)
    tensor("output.prediction", output.prediction, "batch", "horizon", "variable", finite=False)
    alike("output.prediction", output.prediction, "target", target)
    all_finite("target", target)


def returned(name: str, value, setting: str, *axes) -> None:
    """Raise unless a model's extra output has these axes; it is None if the model was made without a setting."""
    if value is None:
        raise ValueError(f"{name} is None: make the model with {setting}, so that it returns what this loss needs")
    tensor(name, value, *axes, finite=False)


def windows(name: str, value: Tensor, count: int) -> None:
    """Raise ValueError unless the first axis of an extra output is as long as the target asks for."""
    if len(value) != count:
        raise ValueError(f"{name} must have {count} windows, as the target has; got {list(value.shape)}")


def matrices(name: str, value, setting: str) -> None:
    """Raise unless an extra output is a tuple of one matrix a layer; what is in it is for the loss to check."""
    if value is None:
        raise ValueError(f"{name} is None: make the model with {setting}, so that it returns what this loss needs")
    if not isinstance(value, tuple) or not value:
        got = "an empty one" if isinstance(value, tuple) else type(value).__name__
        raise TypeError(f"{name} must be a tuple of one matrix a layer; got {got}")


def patch_mask(name: str, mask, patches: Tensor) -> None:
    """Raise unless a mask [batch, variable, patch] is bool, fits the patches and hides some of them."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != patches.shape[:-1]:
        got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"{name} must be a bool tensor {list(patches.shape[:-1])}; got {got}")
    if not mask.any():
        raise ValueError(f"{name} hides no patch, so that there is nothing to reconstruct")


def frequency_features(value, target: Tensor) -> None:
    """Raise unless TimesNet's extra output was asked for and has the windows and steps of the target."""
    axes = ("batch", "horizon", "period", "feature")
    returned("output.frequency_features", value, "return_frequency_features=True", *axes)
    if value.shape[:2] != target.shape[:2]:
        raise ValueError(
            "output.frequency_features and target must have the same windows and steps, their first two axes; "
            f"got {list(value.shape)} and {list(target.shape)}"
        )
