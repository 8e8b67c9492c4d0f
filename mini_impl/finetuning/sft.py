"""SFT with LoRA: learn given answers, by training two small matrices beside each weight that stays as it is.

The documented method ends in two outputs, and here they are two functions: `save_adapter` writes the matrices alone,
`merge_and_unload` makes a plain model of the weights and them.
Sources: the documented system "SFT"; Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.checkpoint import write_bytes
from mini_impl.finetuning.language_model import LanguageModel, hugging_face_name
from mini_impl.finetuning.policy import chosen_tokens
from mini_impl.losses import LossTerms, NonFiniteLoss

# --- what is learnt: prompts with the right answers -------------------------------------------------------------------


def supervised(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], padding: int, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with their answers behind them, for a loss on the answers alone.

    prompts, answers: token ids, of any lengths but 0; an answer has its end-of-sequence token. padding: the id that
    fills up.
    Returns (tokens, labels, attention_mask), each [sequence, time]: labels[:, t] is the token after tokens[:, t], or
    ignore_index where that belongs to the prompt or is padding; attention_mask is False for padding, which is at the
    end. Raises TypeError, ValueError if there is no prompt, or not one answer to each. Source: the documented input;
    masks as in public code.
    """
    if not len(prompts) or len(prompts) != len(answers):
        raise ValueError(f"there must be prompts, and one answer to each; got {len(prompts)} and {len(answers)}")
    if empty := [row for row, pair in enumerate(zip(prompts, answers, strict=True)) if not all(map(len, pair))]:
        raise ValueError(f"prompts and answers must each have a token; those of the rows {empty} are empty")
    kinds = {type(token) for ids in (*prompts, *answers) for token in ids}
    if wrong := [kind.__name__ for kind in kinds if not issubclass(kind, Integral) or kind is bool]:
        raise TypeError(f"prompts and answers must be lists of token ids, whole numbers; got {', '.join(wrong)}")
    padding = checks.integer("padding", padding, least=0)
    time = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)) - 1
    tokens = torch.full((len(prompts), time), padding)
    labels = torch.full((len(prompts), time), ignore_index)
    attention_mask = torch.zeros(len(prompts), time, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole, end = torch.tensor([*prompt, *answer]), len(prompt) + len(answer) - 1
        tokens[row, :end], attention_mask[row, :end] = whole[:-1], True
        labels[row, len(prompt) - 1 : end] = whole[len(prompt) :]
    return tokens, labels, attention_mask


# --- the loss: four documented formulas, each a function --------------------------------------------------------------


def token_cross_entropy(probabilities: Tensor, tokens: Tensor) -> Tensor:
    """-sum_i y_i log yhat_i = -log yhat_x in nats, as y is 1 for the token x that came and 0 for all others.

    probabilities: yhat, [.., vocabulary], as softmax returns them. tokens: x, ids [..]. Returns [..].
    Raises TypeError, ValueError; NonFiniteLoss where yhat_x is 0 (log_sum_exp_loss has a value there).
    Source: the documented loss of one token.
    """
    _check_scores("probabilities", probabilities, tokens)
    chosen = _pick(probabilities, tokens)  # [..]
    if (least := chosen.min().item()) <= 0:
        raise NonFiniteLoss(f"the probability of a token is {least}, without a logarithm; log_sum_exp_loss has one")
    return -chosen.log()


def sentence_mean(token_losses: Tensor, mask: Tensor) -> Tensor:
    """1/T sum_t L_t, T the tokens that count: [sentence, token] -> [sentence].

    mask: bool (or 0 and 1) [sentence, token], False for tokens that do not count: prompt and padding.
    Raises TypeError, ValueError, naming the sentences, where none counts; NonFiniteLoss.
    Source: the documented loss of a sentence; the mask, which the text leaves out, as in public code.
    """
    kept = checks.token_mask(mask, token_losses=token_losses)
    means = _sentence_mean(token_losses, kept)
    checks.look(*checks.counted(mask), checks.finite("the sums of token_losses", means, NonFiniteLoss))
    return means


def _sentence_mean(token_losses: Tensor, kept: Tensor) -> Tensor:
    return token_losses.where(kept, 0).sum(1) / kept.sum(1)


def softmax(logits: Tensor) -> Tensor:
    """yhat_i = exp(z_i) / sum_j exp(z_j): [.., vocabulary] -> the same, each row with sum 1.

    Computed from z - max z, which changes nothing in the formula and keeps exp from overflowing.
    Raises TypeError, ValueError. Source: the documented softmax.
    """
    checks.look(checks.finite("logits", checks.tensor("logits", logits, ..., "vocabulary")))
    powers = (logits - logits.amax(-1, keepdim=True).detach()).exp()  # [.., vocabulary]
    return powers / powers.sum(-1, keepdim=True)


def log_sum_exp_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """-z_c + log sum_j exp(z_j): token_cross_entropy of softmax(z), without a probability that could become 0.

    logits: z, [.., vocabulary]. tokens: c, ids [..]. Returns [..], in nats. Raises TypeError, ValueError.
    Source: the documented loss with the softmax put in.
    """
    _check_scores("logits", logits, tokens)
    return _log_sum_exp_loss(logits, tokens)


def _log_sum_exp_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return -_pick(logits, tokens) + logits.logsumexp(-1)


def _check_scores(name: str, scores: Tensor, tokens: Tensor) -> None:
    checks.tensor(name, scores, ..., "vocabulary")
    chosen_tokens(tokens, name, scores)
    checks.look(checks.finite(name, scores), checks.known_ids("tokens", tokens, scores.shape[-1]))


def _pick(values: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each row [.., vocabulary] that its token [..] names."""
    return values.gather(-1, tokens.long()[..., None])[..., 0]


def documented_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> LossTerms:
    """L = mean over sentences of 1/T sum_t -log yhat_{x_t}, T the kept tokens of each sentence.

    logits: [sentence, token, vocabulary]. labels: ids [sentence, token]; labels[:, t] is what logits[:, t] should say,
    so they are shifted by one already; ignore_index marks what does not count, prompt and padding.
    A short answer weighs as much as a long one. Term: "cross_entropy", in nats.
    Raises TypeError, ValueError, naming the sentences, where every label is ignored. Source: the documented loss.
    """
    return _documented_loss(*_token_losses(logits, labels, ignore_index))


def _documented_loss(token_losses: Tensor, kept: Tensor) -> LossTerms:
    return LossTerms.of(cross_entropy=_sentence_mean(token_losses, kept).mean())


def published_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> LossTerms:
    """L = 1/(kept tokens of the batch) sum over them of -log yhat_{x_t}: every token weighs the same.

    As documented_loss otherwise. Source: public code (transformers, trl).
    """
    return _published_loss(*_token_losses(logits, labels, ignore_index))


def _published_loss(token_losses: Tensor, kept: Tensor) -> LossTerms:
    return LossTerms.of(cross_entropy=token_losses.sum() / kept.sum())


def _token_losses(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(losses, kept), both [sentence, token]: log_sum_exp_loss in one fused operation, 0 where not kept."""
    checks.tensor("logits", logits, "sentence", "token", "vocabulary")
    checks.token_ids("labels", labels, "sentence", "token")
    labels = labels.long()  # in an uint8, -100 would be 156
    checks.integer("ignore_index", ignore_index, least=-(2**63))
    if labels.shape != logits.shape[:-1] or labels.device != logits.device:
        got = f"{list(labels.shape)} on {labels.device}"
        raise ValueError(f"labels must be {list(logits.shape[:-1])} on {logits.device}, as logits; got {got}")
    kept = labels != ignore_index
    name = f"labels (but for {ignore_index}, which is ignored)"
    known = checks.known_ids(name, labels.masked_fill(~kept, 0), logits.shape[-1])
    checks.look(known, *checks.counted(kept, f"labels != {ignore_index}"))
    flat = logits.flatten(0, 1), labels.flatten()
    losses = F.cross_entropy(*flat, ignore_index=ignore_index, reduction="none")
    return losses.view(labels.shape), kept


# --- LoRA: what is trained --------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = x (W + BA)' (+ bias) for a linear layer whose W [out, in] is frozen: only A and B are trained.

    base: the layer that has W: nn.Linear, or the Conv1D of GPT-2 in transformers, whose weight is W'.
    rank: r, how many rows A [r, in] and columns B [out, r] have; at most in and out.
    alpha: None, as documented, or a number: then BA is scaled by alpha / r, as in the paper.
    A begins random, B at 0, so that the layer begins as W alone; the first gradient step moves only B.
    In half precision A and B are kept in float32, as small steps would be rounded away.
    Raises TypeError, ValueError. Source: the documented W + BA; start and scale, which the text leaves out, as in the
    paper, A uniform between -1/sqrt(in) and 1/sqrt(in) as in public code.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float | None = None):
        super().__init__()
        if not _is_linear(base):
            raise TypeError(f"base must be an nn.Linear, or a Conv1D of transformers; got {type(base).__name__}")
        rank = _check_rank(rank, {"base": base})
        checks.positive(alpha=1 if alpha is None else alpha)
        self.rank, self.alpha = rank, alpha
        self.base = base.requires_grad_(False)
        like = {"dtype": torch.promote_types(base.weight.dtype, torch.float32), "device": base.weight.device}
        rows, columns = _shape(base)
        self.A = nn.Parameter(torch.empty(rank, columns, **like))
        self.B = nn.Parameter(torch.zeros(rows, rank, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        """s: 1, or alpha / r."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        frozen = self.base(x)  # [.., out]
        low_rank = F.linear(
            F.linear(x.to(self.A.dtype), self.A), self.B
        )  # x A' B', so that BA [out, in] is never built
        if self.scale != 1:
            low_rank = low_rank * self.scale
        return (frozen + low_rank).to(frozen.dtype)

    def merged_weight(self) -> Tensor:
        """W + s BA [out, in] (transposed, if the layer has it so), in the dtype of A and B: float32 or float64."""
        change = (self.B @ self.A) * self.scale
        return self.base.weight + (change if isinstance(self.base, nn.Linear) else change.T)


def _is_linear(layer: nn.Module) -> bool:
    """Whether it is an nn.Linear, or a Conv1D of transformers, which need not be installed."""
    kind = type(layer)
    return isinstance(layer, nn.Linear) or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    return tuple(layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape)


def _check_rank(rank: int, layers: dict[str, nn.Module]) -> int:
    name, (rows, columns) = min(((name, _shape(layer)) for name, layer in layers.items()), key=lambda x: min(x[1]))
    return checks.integer("rank", rank, most=min(rows, columns), why=f"as the weight of {name} is {rows} x {columns}")


def add_lora(
    model: nn.Module, targets: Sequence[str] = ("query", "value"), rank: int = 8, alpha: float | None = None
) -> nn.Module:
    """Put a LoRALinear in the place of each linear layer that has one of these names; freeze every other parameter.

    targets: last parts of the names, "query" for blocks.0.attention.query. rank, alpha: as in LoRALinear.
    Changes the model and returns it. What an optimiser is to train is what requires a gradient: A and B alone.
    Raises TypeError, ValueError if a target names no linear layer, the rank is too large for one, or the model has
    adapters already; the model is then as it was. Source: the documented system, Q and V.
    """
    layers = _linear_layers(model)
    names = {name.rpartition(".")[2] for name in layers}
    if isinstance(targets, str | Tensor) or not targets or not set(targets) <= names:
        raise ValueError(f"targets must be several names of linear layers, some of {sorted(names)}; got {targets!r}")
    layers = {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets}
    _check_rank(rank, layers)
    return _put_in(model, {name: LoRALinear(layer, rank, alpha) for name, layer in layers.items()})


def _linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """A model's linear layers by name. Raises ValueError if it has adapters already."""
    if adapters := lora_layers(model):
        raise ValueError(f"the model has LoRA layers already: merge_and_unload them first; got {', '.join(adapters)}")
    return {name: module for name, module in model.named_modules() if _is_linear(module) and name}


def _put_in(model: nn.Module, adapters: dict[str, LoRALinear]) -> nn.Module:
    """Freeze the model, and put each adapter in its place."""
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        _replace(model, name, adapter)
    return model


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapters of a model by the names of the layers that they stand for. Raises TypeError."""
    checks.instance("model", model, nn.Module, "an nn.Module")
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _some_lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """lora_layers of a model. Raises ValueError if it has none."""
    if not (layers := lora_layers(model)):
        raise ValueError("the model has no LoRA layers; add_lora puts them in")
    return layers


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Write W + s BA into each adapted layer, and the plain layer back into its place.

    The sum is computed in float32 (float64 for a model in float64) and then rounded to the dtype of W once: each entry
    is off by at most half a unit in its last place (relatively 2^-8 in bfloat16, 2^-11 in float16), and by what float32
    rounds in the sum. In half precision an update that is smaller than that is lost. The old W is not kept.
    Changes the model and returns it, still frozen. Raises ValueError if the model has no adapters, a merged weight
    would not be finite, or W is used elsewhere too, as a tied head's is; the model is then as it was. Source: the
    second documented output of SFT.
    """
    layers = _some_lora_layers(model)
    uses = Counter(map(id, (weight for _, weight in model.named_parameters(remove_duplicate=False))))
    if shared := [name for name, layer in layers.items() if uses[id(layer.base.weight)] > 1]:
        raise ValueError(
            f"{', '.join(shared)} shares its weight with another layer, which merging would change as well"
        )
    with torch.no_grad():
        merged = {name: layer.merged_weight().to(layer.base.weight.dtype) for name, layer in layers.items()}
        checks.look(*(checks.finite(f"the merged weight of {name}", weight) for name, weight in merged.items()))
        for name, layer in layers.items():
            layer.base.weight.copy_(merged[name])
            _replace(model, name, layer.base)
    return model


# --- adapters on disk, in the format of PEFT --------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: nn.Module, folder: Path | str) -> None:
    """Write a model's adapters to a folder, as PEFT does.

    PEFT loads those of a LanguageModel on a Llama with the same weights, and those of any other model on that model.
    The files are adapter_config.json and adapter_model.safetensors; each is replaced in one step. An adapter without
    alpha is written with alpha = rank, which is the same scale, 1. What torch.compile, DataParallel and
    DistributedDataParallel put around a model is not part of its names.
    Raises ValueError if the model has no adapters, or several with another rank or alpha, or is a module around a
    LanguageModel or a model of transformers, of which PEFT knows no names; OSError. (The part llama.model of a Llama is
    a model of transformers, too: give the whole.) Source: the first documented output of SFT.
    """
    while type(model).__name__ in ("OptimizedModule", "DataParallel", "DistributedDataParallel"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    layers = _some_lora_layers(model)
    if not _has_names(model) and any(map(_has_names, model.modules())):
        inside = next(type(part).__name__ for part in model.modules() if _has_names(part))
        raise ValueError(
            f"model must be the {inside} itself: for one inside a {type(model).__name__} PEFT has no names"
        )
    settings = {name: (layer.rank, layer.scale * layer.rank) for name, layer in layers.items()}
    if len(set(settings.values())) > 1:
        raise ValueError(f"all LoRA layers must have one rank and one alpha to be stored; got (rank, alpha) {settings}")
    rank, alpha = next(iter(settings.values()))
    tensors = {
        f"{_peft_name(model, name)}.lora_{part}.weight": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in ("A", "B")
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(not isinstance(layer.base, nn.Linear) for layer in layers.values()),
        "target_modules": sorted({_peft_name(model, name).split(".")[-1] for name in layers}),
        "inference_mode": True,
    }
    (Path(folder) / CONFIG).unlink(missing_ok=True)  # a stop between the two must not leave new weights with old scales
    write_bytes(Path(folder) / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_bytes(Path(folder) / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def _has_names(model: nn.Module) -> bool:
    """Whether PEFT has names for the layers of a model: a LanguageModel, or one of transformers."""
    return isinstance(model, LanguageModel) or any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def load_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Put the adapters that save_adapter or PEFT wrote into a model that has none; freeze all else.

    model: a LanguageModel, or one with the names of the model that PEFT adapted. Changes it and returns it.
    Raises OSError; ValueError for another kind of adapter, or for one of another model: unknown layers, other
    shapes.
    """
    layers = _linear_layers(model)
    config, tensors = _read_adapter(Path(folder))
    rank, alpha = config.get("r"), config.get("lora_alpha", math.nan)
    found, wanted, adapted = {key: list(tensor.shape) for key, tensor in tensors.items()}, {}, {}
    for name, layer in layers.items():
        a, b = (f"{_peft_name(model, name)}.lora_{part}.weight" for part in ("A", "B"))
        if a in found or b in found:
            adapted[name] = a, b
            rows, columns = _shape(layer)
            wanted |= {a: [rank, columns], b: [rows, rank]}
    wrong = [key for key in found | wanted if found.get(key) != wanted.get(key)]
    wrong = [f"{key} {found.get(key, 'missing')}, wants {wanted.get(key, 'no such layer')}" for key in wrong]
    if wrong or not found:
        must = "the adapter must hold matrices A and B of its rank for layers of the model, and no more"
        raise ValueError(f"{must}; got {'; '.join(wrong[:4]) or 'none'}")
    checks.look(*(checks.finite(f"{key} of the adapter", tensor) for key, tensor in tensors.items()))
    adapters = {name: LoRALinear(layers[name], rank, None if alpha == rank else alpha) for name in adapted}
    with torch.no_grad():
        for name, (a, b) in adapted.items():
            adapters[name].A.copy_(tensors[a])
            adapters[name].B.copy_(tensors[b])
    return _put_in(model, adapters)


def _read_adapter(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(settings, tensors) of an adapter on disk, if LoRALinear computes what it means."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load((folder / WEIGHTS).read_bytes())
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} cannot be read ({error})") from None
    # These change what the same tensors compute; whatever adds tensors is found by their names.
    others = ("rank_pattern", "alpha_pattern", "layer_replication", "alora_invocation_tokens")
    asked = [name for name, value in config.items() if value and (name in others or name.startswith("use_"))]
    start = config.get("init_lora_weights", True)
    if start not in (True, False, None, "gaussian", "orthogonal", "eva"):  # PiSSA and others begin by changing W itself
        asked.append(f"init_lora_weights={start!r}")
    if config.get("peft_type") != "LORA":
        asked.append(f"peft_type={config.get('peft_type')!r}")
    if asked:
        raise ValueError(f"the adapter asks for {', '.join(asked)}: it must be W + BA, as LoRALinear has it")
    return config, tensors


def _peft_name(model: nn.Module, name: str) -> str:
    """PEFT's name of a layer: a LanguageModel stands for a Llama, and any other model for itself."""
    return f"base_model.model.{hugging_face_name(name) if isinstance(model, LanguageModel) else name}"
