"""What a caller can get wrong, said clearly: which argument, what it got, what it wants."""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import torch
from torch import Tensor, nn


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


# --- language models --------------------------------------------------------------------------------------------------


def token_ids(name: str, value, vocabulary: int, *axes) -> None:
    """Raise TypeError unless `value` holds whole numbers, ValueError unless it has these axes and no unknown id."""
    wanted = f"{name} must be a tensor of token ids [{', '.join(axes)}], whole numbers from 0 to {vocabulary - 1}"
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{wanted}; got {value.dtype if isinstance(value, Tensor) else type(value).__name__}")
    if value.ndim != len(axes) or 0 in value.shape:
        raise ValueError(f"{wanted}, no axis empty; got shape {list(value.shape)}")
    least, most = value.aminmax()
    if least < 0 or most >= vocabulary:
        raise ValueError(f"{wanted}; got ids from {least} to {most}")


def text(name: str, value) -> str:
    """Return `value` if it is a string. Raises TypeError."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string; got {value!r}")
    return value


def presence(present, tokens: Tensor, before: int) -> None:
    """Raise ValueError unless a mask of padding is bool [batch, token so far] and leaves a token in each row.

    None is all right. before: how many tokens there are before these.
    """
    wanted = [len(tokens), before + tokens.shape[1]]
    if present is None:
        return
    if not isinstance(present, Tensor) or present.dtype != torch.bool or list(present.shape) != wanted:
        got = f"{present.dtype} {list(present.shape)}" if isinstance(present, Tensor) else type(present).__name__
        raise ValueError(f"present must be a bool tensor [batch, token so far] {wanted}; got {got}")
    if not (some := present.any(1)).all():
        raise ValueError(
            f"present must leave a token in each row; rows {(~some).nonzero().flatten().tolist()} have none"
        )


def fits_cache(keys: Tensor, values: Tensor, kept: Tensor, filled: int) -> None:
    """Raise ValueError unless new keys and values [batch, head, time, size] fit behind `filled` ones, without gradient.

    kept: where those of the block are kept, [batch, head, length, size].
    """
    if len(keys) != len(kept) or filled + keys.shape[2] > kept.shape[2]:
        raise ValueError(
            f"the cache is made for {len(kept)} rows of {kept.shape[2]} tokens and holds {filled} of each; "
            f"{len(keys)} rows of {keys.shape[2]} more do not fit"
        )
    if keys.requires_grad or values.requires_grad:
        raise ValueError("a cache keeps no gradients: call the model under torch.no_grad(), or without a cache")


# --- sampling ---------------------------------------------------------------------------------------------------------


def prompts(name: str, value, vocabulary: int) -> None:
    """Raise unless `value` is a sequence of prompts, each a sequence of token ids that there are, none empty."""
    wanted = f"{name} must be lists of token ids, whole numbers from 0 to {vocabulary - 1}"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{wanted}; got {type(value).__name__}")
    if not value:
        raise ValueError(f"{wanted}; got no prompt at all")
    for number, ids in enumerate(value):
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise TypeError(f"{wanted}; {name}[{number}] is {ids!r}")
        if not ids:
            raise ValueError(f"{wanted}; {name}[{number}] is empty: there must be a token to go on from")
        odd_types = set(map(type, ids)) - {int}  # quick, for there may be many
        if any(issubclass(kind, bool) or not issubclass(kind, Integral) for kind in odd_types):
            raise TypeError(f"{wanted}; {name}[{number}] is {ids!r}")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError(f"{wanted}; {name}[{number}] is {ids!r}")


def truncation(temperature, top_k, top_p, vocabulary: int) -> None:
    """Raise unless temperature, top_k and top_p say which of the tokens of a vocabulary to sample from."""
    number("temperature", temperature, least=0)
    if top_k is not None:
        integer("top_k", top_k, most=vocabulary, why="the number of tokens")
    if top_p is not None and number("top_p", top_p, above=0) > 1:
        raise ValueError(f"top_p must be at most 1, as it is a probability; got {top_p}")


def streams(seed, rows, count: int) -> None:
    """Raise unless a seed and the numbers of rows, one a prompt, name random streams; None is all right for rows."""
    integer("seed", seed, least=0, most=2**64 - 1)
    if rows is None:
        return
    if isinstance(rows, str) or not isinstance(rows, Sequence):
        raise TypeError(f"rows must be a sequence of whole numbers; got {rows!r}")
    if len(rows) != count:
        raise ValueError(f"rows must number each of the {count} prompts; got {len(rows)} of them")
    for row in rows:
        integer("a number among rows", row, least=0, most=2**64 - 1)


def rollout(value, vocabulary: int) -> None:
    """Raise unless prompts and completions are token ids, with masks of their shapes, one completion a prompt."""
    for name, there in (("prompt", "present"), ("completion", "mask")):
        if not hasattr(value, name) or not hasattr(value, there):
            raise TypeError(f"rollout must be what generate returned; got {type(value).__name__}")
        ids, marked = getattr(value, name), getattr(value, there)
        token_ids(f"rollout.{name}", ids, vocabulary, "sequence", "token")
        if not isinstance(marked, Tensor) or marked.dtype != torch.bool or marked.shape != ids.shape:
            got = f"{marked.dtype} {list(marked.shape)}" if isinstance(marked, Tensor) else type(marked).__name__
            raise ValueError(
                f"rollout.{there} must be a bool tensor of the shape of {name} {list(ids.shape)}; got {got}"
            )
    if len(value.prompt) != len(value.completion):
        raise ValueError(
            f"rollout must have a completion for each prompt; got {len(value.completion)} and {len(value.prompt)}"
        )


# --- policies ---------------------------------------------------------------------------------------------------------


def chosen(tokens, vocabulary: int, name: str, scored: Tensor) -> None:
    """Raise unless `tokens` names one token of the vocabulary for each place of a tensor [.., score or feature]."""
    places = scored.shape[:-1]
    if isinstance(tokens, Tensor) and tokens.shape != places:
        raise ValueError(f"tokens must have the leading axes of {name}, {list(places)}; got {list(tokens.shape)}")
    token_ids("tokens", tokens, vocabulary, *[".."] * len(places))
    if tokens.device != scored.device:
        raise ValueError(f"tokens and {name} must be on one device; got {tokens.device} and {scored.device}")


def head(hidden, weight, tokens, temperature, chunk) -> None:
    """Raise unless hidden [.., place, width], a head [vocabulary, width] and the chosen tokens [.., place] fit."""
    tensor("hidden", hidden, ..., "place", "width", finite=False)
    tensor("weight", weight, "vocabulary", "width", finite=False)
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"hidden and weight must have one width, their last axis; got {list(hidden.shape)} and {list(weight.shape)}"
        )
    _suits("hidden", hidden, weight)
    chosen(tokens, len(weight), "hidden", hidden)
    number("temperature", temperature, above=0)
    integer("chunk", chunk)


def groups(name: str, value, **others) -> None:
    """Raise unless `value` is finite, [prompt, group] with at least two answers a group, and the others are alike.

    The others are log-probabilities of the same answers.
    """
    tensor(name, value, "prompt", "group")
    if value.shape[1] < 2:
        raise ValueError(
            f"{name} must hold at least 2 answers a group [prompt, group]; got shape {list(value.shape)}: "
            "an answer alone has nothing to be compared with"
        )
    for other_name, other in others.items():
        logprobs(other_name, other, "prompt", "group")
        alike(other_name, other, name, value)


def logprobs(name: str, value, *axes) -> None:
    """Raise unless `value` holds logarithms of probabilities: finite, at most 0 (but for rounding)."""
    tensor(name, value, *axes)
    if (largest := value.max()) > 1e-3:
        raise ValueError(f"{name} must be logarithms of probabilities, at most 0; got {largest:.4g}")


def sampled(advantages, **others) -> None:
    """Raise unless there is one advantage a sequence, and the others are log-probabilities [sequence, token] of it."""
    tensor("advantages", advantages, "sequence")
    first, *_ = others
    for name, value in others.items():
        logprobs(name, value, "sequence", "token")
        alike(name, value, first, others[first])
    alike("advantages", advantages, f"the first tokens of {first}", others[first][:, 0])


def token_mask(mask, **values) -> Tensor:
    """Return a mask [sequence, token] of what counts as bool, if every row counts a token and it fits the values.

    mask: bool, or 0 and 1 of any dtype. values: floating-point tensors of the same shape, if any; whether what is in
    them is finite is for the caller to check.
    """
    wanted = "mask must be a tensor of bool, or of 0 and 1, [sequence, token], no axis empty"
    if not isinstance(mask, Tensor):
        raise TypeError(f"{wanted}; got {type(mask).__name__}")
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{wanted}; got shape {list(mask.shape)}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{wanted}; got other numbers among its {mask.dtype}")
    for name, value in values.items():
        tensor(name, value, "sequence", "token", finite=False)
        alike("mask", mask.to(value.dtype), name, value)
    counted_rows("mask", mask)
    return mask.bool()


def counted_rows(name: str, mask: Tensor) -> None:
    """Raise ValueError, naming them, if rows of a mask [sequence, token] count no token at all."""
    if not (counts := mask.bool().any(1)).all():
        empty = (~counts).nonzero().flatten().tolist()
        raise ValueError(f"{name} counts no token of the rows {empty}; leave those rows out")


def per_token(losses, logprobs: Tensor) -> None:
    """Raise unless what a loss per token returned is a tensor like the log-probabilities, and depends on them."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"per_token must return a tensor; got {type(losses).__name__}")
    alike("what per_token returned", losses, "its logprobs", logprobs)
    if not losses.requires_grad:
        raise ValueError("per_token must return a function of its logprobs; what it returned has no gradient")


def length_limit(max_length, wanted: bool, mask: Tensor) -> None:
    """Raise unless max_length is given where it is wanted, and only there, and no row of the mask counts more."""
    if not wanted:
        if max_length is not None:
            raise ValueError(f"max_length is for by='length' alone; got {max_length!r}")
        return
    if max_length is None:
        raise ValueError("by='length' divides by max_length, the most tokens that an answer may have; got None")
    if (longest := int(mask.sum(1).max())) > integer("max_length", max_length):
        raise ValueError(f"max_length must be at least {longest}, the tokens of the longest row; got {max_length}")


def reference(kl_weight, kl_gradient, ref_logprobs) -> None:
    """Raise unless the weight of the KL is a number of at least 0, its gradient is chosen, and there is a reference."""
    choice("kl_gradient", kl_gradient, ("plain", "weighted"))
    if number("kl_weight", kl_weight, least=0) and ref_logprobs is None:
        raise ValueError(f"kl_weight {kl_weight} needs the reference to stay near to; got ref_logprobs=None")


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


def labels(value, logits, ignore_index) -> None:
    """Raise unless labels [sentence, token] fit logits [sentence, token, vocabulary] one in each sentence counts."""
    tensor("logits", logits, "sentence", "token", "vocabulary", finite=False)
    integer("ignore_index", ignore_index, least=-(2**63))
    name = f"labels (but for {ignore_index}, which is ignored)"
    kept = value != ignore_index
    ids = value.masked_fill(~kept, 0) if isinstance(value, Tensor) else value
    if isinstance(value, Tensor) and value.device != logits.device:
        raise ValueError(f"labels and logits must be on one device; got {value.device} and {logits.device}")
    token_ids(name, ids, logits.shape[-1], "sentence", "token")
    if value.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have the sentences and tokens of logits, {list(logits.shape[:-1])}; got {list(value.shape)}"
        )
    if not (some := kept.any(1)).all():
        empty = (~some).nonzero().flatten().tolist()
        raise ValueError(f"labels are {ignore_index} everywhere in the sentences {empty}; leave those sentences out")


def rank(value, layers: dict) -> None:
    """Raise unless `value` can be the rank of a product of two matrices for each of the linear layers, by name."""
    integer("rank", value)
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"{name} must be an nn.Linear; got {type(layer).__name__}")
        rows, columns = layer.weight.shape
        integer("rank", value, most=min(rows, columns), why=f"as the weight of {name} is {rows} x {columns}")


def lora_targets(targets, layers: dict[str, nn.Linear]) -> dict[str, nn.Linear]:
    """Return those of the linear layers, by name, whose name ends in a target; each target must name one.

    Raises TypeError, ValueError.
    """
    if isinstance(targets, str) or not isinstance(targets, Sequence) or not all(isinstance(t, str) for t in targets):
        raise TypeError(f"targets must be several names of linear layers, such as ('query', 'value'); got {targets!r}")
    names = {name.rpartition(".")[2] for name in layers}
    missing = [target for target in targets if target not in names]
    if missing or not targets:
        raise ValueError(
            f"targets must name linear layers of the model, some of {sorted(names)}; got {tuple(targets)!r}"
        )
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets}


def no_adapters(adapters: dict) -> None:
    """Raise ValueError if a model has LoRA layers already."""
    if adapters:
        raise ValueError(
            f"the model has LoRA layers already ({', '.join(adapters)}): give all targets in one call, "
            "or merge_and_unload it first"
        )


def some_adapters(adapters: dict) -> dict:
    """Return a model's LoRA layers. Raises ValueError if there are none."""
    if not adapters:
        raise ValueError("the model has no LoRA layers; add_lora puts them in")
    return adapters


def one_rank(settings: dict[str, tuple[int, float]]) -> tuple[int, float]:
    """Return the (rank, alpha) of a model's LoRA layers. Raises ValueError if they differ."""
    if len(set(settings.values())) > 1:
        raise ValueError(f"all LoRA layers must have one rank and one alpha to be stored; got (rank, alpha) {settings}")
    return next(iter(settings.values()))


def adapter_config(config) -> dict:
    """Return what PEFT says of an adapter, if it is LoRA as LoRALinear computes it. Raises TypeError, ValueError."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        got = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"the adapter must have peft_type 'LORA'; got {got!r}")
    # These change what the same tensors compute; whatever adds tensors is found by their names.
    others = ("fan_in_fan_out", "rank_pattern", "alpha_pattern", "layer_replication", "alora_invocation_tokens")
    if asked := [name for name, value in config.items() if value and (name in others or name.startswith("use_"))]:
        raise ValueError(f"the adapter asks for {', '.join(asked)}, which LoRALinear does not have")
    integer("r of the adapter", config.get("r"))
    number("lora_alpha of the adapter", config.get("lora_alpha"), above=0)
    return config


def adapter_layers(tensors: dict, layers: dict[str, nn.Linear], rank: int) -> list[str]:
    """Return the names of the layers for which there are A and B, if these fit. Raises ValueError for anything else.

    tensors: {(name, "A" or "B"): tensor}; what belongs to no layer of the model has its own name as the key.
    """
    if unknown := [key for key in tensors if isinstance(key, str)]:
        raise ValueError(f"the adapter has tensors for which the model has no linear layer: {', '.join(unknown)}")
    names = list(dict.fromkeys(name for name, _ in tensors))
    if not names:
        raise ValueError("the adapter holds no tensors")
    for name in names:
        rows, columns = layers[name].weight.shape
        for part, shape in (("A", [rank, columns]), ("B", [rows, rank])):
            got = tensors.get((name, part))
            if got is None or list(got.shape) != shape:
                found = "none" if got is None else f"shape {list(got.shape)}"
                raise ValueError(f"the adapter must have a matrix {part} {shape} for the layer {name}; got {found}")
            all_finite(f"{part} of the adapter for {name}", got)
    return names


# --- penalties on gradients, and samplers -----------------------------------------------------------------------------


def gradients(value, error: type[ValueError], count: int | None = None) -> list[Tensor]:
    """Return a list of gradients, one floating-point tensor a parameter; `count` of them, if that is known.

    Raises TypeError, ValueError, and the given error for NaN or infinity in one of them.
    """
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"gradients must be several tensors, one a parameter; got {type(value).__name__}")
    value = list(value)
    if not value or count not in (None, len(value)):
        wanted = "at least one" if count is None else f"{count}, as many as at first"
        raise ValueError(f"gradients must be {wanted}, one a parameter; got {len(value)}")
    for number, gradient in enumerate(value):
        tensor(f"gradients[{number}]", gradient, ..., finite=False)
        all_finite(f"gradients[{number}]", gradient, error)
    return value


def thresholds(grads, value, error: type[ValueError]) -> tuple[list[Tensor], list[Tensor]]:
    """Return gradients, and one threshold of at least 0 for each as a scalar tensor. Raises as `gradients` does."""
    grads = gradients(grads, error)
    if not isinstance(value, Iterable) or (isinstance(value, Tensor) and value.ndim != 1):
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"thresholds must be several numbers, one a gradient; got {got}")
    value = list(value)
    if len(value) != len(grads):
        raise ValueError(f"thresholds must be one a gradient, {len(grads)}; got {len(value)}")
    for place, threshold in enumerate(value):
        if isinstance(threshold, Tensor) and threshold.ndim:
            raise ValueError(f"thresholds[{place}] must be one number; got shape {list(threshold.shape)}")
        number(f"thresholds[{place}]", threshold.item() if isinstance(threshold, Tensor) else threshold, least=0)
    return grads, [torch.as_tensor(t, dtype=g.dtype, device=g.device) for g, t in zip(grads, value, strict=True)]


def parameters(value) -> list[Tensor]:
    """Return a list of tensors that require a gradient. Raises TypeError, ValueError for none or others."""
    if isinstance(value, Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"parameters must be several tensors; got {type(value).__name__}")
    value = list(value)
    if not value:
        raise ValueError("parameters must be the tensors that are trained; got none")
    for place, parameter in enumerate(value):
        tensor(f"parameters[{place}]", parameter, ..., finite=False)
    if frozen := [place for place, parameter in enumerate(value) if not parameter.requires_grad]:
        raise ValueError(
            f"parameters must require a gradient; those at {frozen} do not: "
            "give [p for p in model.parameters() if p.requires_grad]"
        )
    return value


def each_used(grads: tuple) -> tuple[Tensor, ...]:
    """Return the gradients of parameters if none is None. Raises ValueError if the loss does not depend on one."""
    if unused := [place for place, gradient in enumerate(grads) if gradient is None]:
        raise ValueError(f"the loss does not depend on the parameters at {unused}; leave those out")
    return grads


def scalar_loss(name: str, value) -> None:
    """Raise unless `value` is a scalar tensor with a graph, as LossTerms.total is."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a scalar tensor, such as LossTerms.total; got {type(value).__name__}")
    tensor(name, value, ..., finite=False)
    if value.ndim:
        raise ValueError(f"{name} must be a scalar; got shape {list(value.shape)}")
    if not value.requires_grad:
        raise ValueError(f"{name} has no graph to differentiate: no parameter went into it, or it was detached")


def twice_differentiable(loss: Tensor) -> None:
    """Raise RuntimeError if something in a loss's graph has no second derivative.

    Fused attention would fail in a later backward pass only; a function with a gradient of its own could have it left
    out unseen, as its backward pass counts as a constant.
    """
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if node.name().startswith("ScaledDotProduct"):
            raise RuntimeError(
                f"the loss cannot be differentiated twice: fused attention ({node.name()}) has no second derivative; "
                "call the model under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            )
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            raise RuntimeError(
                f"the loss cannot be differentiated twice: {node.name()} has a gradient of its own (a chunked head, "
                "a compiled model, a kernel); compute the loss with plain operations"
            )


def floor(value, count: int) -> float:
    """Return `value` if it can be the least of `count` probabilities: from 0 to less than 1/count."""
    if number("floor", value, least=0) * count >= 1:
        raise ValueError(f"floor must be less than 1/{count}, as there are {count} types; got {value}")
    return float(value)


def kinds(value) -> tuple[str, ...]:
    """Return the names of types of problems, at least one, all different. Raises TypeError, ValueError."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"kinds must be several names; got {value!r}")
    value = tuple(value)
    if not value or len(set(value)) < len(value):
        raise ValueError(f"kinds must be names that differ, at least one; got {value!r}")
    return value


def scored_kinds(value, losses, known: tuple) -> list[int]:
    """Return the places of the types of a batch among those known, if there is one for each loss [sequence]."""
    tensor("losses", losses, "sequence")
    value = list(value)
    if len(value) != len(losses):
        raise ValueError(f"kinds must be one a loss, {len(losses)}; got {len(value)}")
    if unknown := sorted({repr(kind) for kind in value if kind not in known}):
        raise ValueError(f"kinds must be some of {', '.join(map(repr, known))}; got {', '.join(unknown)}")
    return [known.index(kind) for kind in value]


def sampler_state(state, known: tuple) -> None:
    """Raise ValueError unless a stored state has a score for each of the types, and a generator."""
    if not {"scores", "generator"} <= set(state) or list(state["scores"].shape) != [len(known)]:
        got = {name: list(value.shape) for name, value in state.items()}
        raise ValueError(f"the state of a sampler must hold scores [{len(known)}] and a generator; got {got}")


def drawn_groups(value) -> tuple[list, Tensor]:
    """Return what was sampled, if it is (groups, rewards [prompt, group]) with as many of one as of the other."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise TypeError(f"sample must return (groups, rewards); got {type(value).__name__}")
    drawn, rewards = value
    groups("rewards", rewards)
    if len(drawn) != len(rewards):
        raise ValueError(f"sample must return one group a row of rewards, {len(rewards)}; got {len(drawn)}")
    return list(drawn), rewards


def lengths(value) -> None:
    """Raise unless `value` is a tensor of lengths in tokens, at least 0."""
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"lengths must be a tensor of numbers of tokens; got {got}")
    if not value.numel():
        raise ValueError(f"lengths must not be empty; got shape {list(value.shape)}")
    all_finite("lengths", value)
    if value.min() < 0:
        raise ValueError(f"lengths must be at least 0; got {value.min()}")


def completion(value, mask, stop) -> None:
    """Raise unless `value` holds token ids [sequence, token], and a mask of the same shape counts some of each row."""
    integer("stop", stop, least=0)
    token_ids("completion", value, 2**62, "sequence", "token")
    token_mask(mask, completion=value.to(torch.float32))


def answered(prompts, answers) -> None:
    """Raise ValueError unless there are prompts, each with an answer, and none of them is empty."""
    if not len(prompts) or len(prompts) != len(answers):
        raise ValueError(f"there must be prompts, and one answer to each; got {len(prompts)} and {len(answers)}")
    for name, rows in (("prompts", prompts), ("answers", answers)):
        if empty := [row for row, ids in enumerate(rows) if not len(ids)]:
            raise ValueError(f"{name} must each have a token; those of the rows {empty} are empty")


def task(value) -> None:
    """Raise ValueError unless a task has kinds to train, and problems of each, to train on and held out."""
    if not value.trained_kinds:
        raise ValueError("task must have trained_kinds; got none")
    for name, parts in (("train", value.train), ("held_out", value.held_out)):
        wanted = dict.fromkeys((*value.trained_kinds, *parts) if name == "held_out" else value.trained_kinds)
        if missing := [kind for kind in wanted if not parts.get(kind)]:
            raise ValueError(f"task.{name} must have problems of every kind; got none of {missing}")
