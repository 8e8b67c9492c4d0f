"""DAPO, twice: as documented, cross-entropy with two penalties and a sampler; and as published, four changes to GRPO.

The two share the name and the words "clip" and "dynamic sampling", not the meaning. Documented: what is clipped is the
gradient, and what is sampled are types of problems, by how badly they go. Published: what is clipped is the ratio of
two policies, and what is sampled is more of the problems that are neither too easy nor too hard.
Sources: the documented system "DAPO"; Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
2025, sections 3.1 to 3.4.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mini_impl import checks
from mini_impl.finetuning.policy import _check_answers, _clipped_loss
from mini_impl.losses import LossTerms, NonFiniteLoss, _kl_from_uniform, _probabilities, kl_from_uniform

# === the documented method ============================================================================================
# 1. The cross-entropy L_basic of the model's answers, which another chapter makes: documented_loss is given it.

# --- 2. a penalty on what exceeds the threshold of its layer ----------------------------------------------------------


def clip_penalty(gradients: Sequence[Tensor], thresholds: Sequence[float | Tensor]) -> Tensor:
    """L_clip = sum_i max(0, |g_i| - tau)^2 over all entries g_i of all gradients, tau the threshold of its tensor.

    gradients: one tensor a parameter, of any shape. thresholds: one number or scalar tensor a gradient, at least 0.
    Differentiable through the gradients, if they have a graph (`torch.autograd.grad(.., create_graph=True)`): with the
    excess e = g - clamp(g, -tau, tau) and the Hessian H of L_basic it is 2 H e. Without one it is a number to look at,
    and trains nothing. It pulls towards smaller gradients and bounds none; clip_to_thresholds does that.
    Raises TypeError, ValueError, NonFiniteLoss for NaN or infinity among the gradients, or their squares.
    Source: documented step 2.
    """
    penalty = _clip_penalty(*_paired(_several("gradients", gradients), thresholds))
    checks.look(checks.finite("the clip penalty", penalty, NonFiniteLoss))  # squares overflow
    return penalty


def _clip_penalty(gradients: Sequence[Tensor], thresholds: Iterable[Tensor]) -> Tensor:
    excesses = ((g.abs() - tau).clamp(min=0) for g, tau in zip(gradients, thresholds, strict=True))
    return sum(excess.square().sum() for excess in excesses)


def _several(name: str, values: Iterable[Tensor], count: int | None = None) -> list[Tensor]:
    """`values` as a list of tensors, one a parameter. Raises TypeError, ValueError unless they are, `count` of them."""
    if isinstance(values, Tensor):
        raise TypeError(f"{name} must be several tensors, one a parameter; got one Tensor")
    values = [checks.tensor(f"{name}[{number}]", value, ...) for number, value in enumerate(values)]
    if not values or count not in (None, len(values)):
        raise ValueError(f"{name} must be {count or 'at least one'}, one a parameter; got {len(values)}")
    return values


def _paired(gradients: Sequence[Tensor], thresholds, *more: checks.Requirement) -> tuple[Sequence[Tensor], Sequence]:
    """(gradients, the threshold of each as a scalar tensor like it); adaptive ones take in the gradients first.

    more: what else is to be looked at. Raises TypeError, ValueError, NonFiniteLoss.
    """
    if isinstance(thresholds, AdaptiveThresholds):
        checks.look(*more, *_all_finite(gradients))
        return gradients, thresholds._update(gradients)
    if not isinstance(thresholds, Sequence) and getattr(thresholds, "ndim", 0) != 1:
        raise TypeError(f"thresholds must be several numbers, one a gradient; got {thresholds!r}")
    pairs = zip(thresholds, gradients, strict=False)
    scalars = [torch.as_tensor(tau, dtype=g.dtype, device=g.device) for tau, g in pairs]
    if len(thresholds) != len(gradients) or any(tau.ndim for tau in scalars):
        raise ValueError(f"thresholds must be one number a gradient, {len(gradients)} of them; got {thresholds}")
    checks.look(*more, *_all_finite(gradients), _not_negative("thresholds", torch.stack(scalars)))
    return gradients, scalars


def _all_finite(gradients: Sequence[Tensor]) -> list[checks.Requirement]:
    return [checks.finite(f"gradients[{number}]", g, NonFiniteLoss) for number, g in enumerate(gradients)]


def _not_negative(name: str, values: Tensor) -> checks.Requirement:
    def judge(least: float, most: float) -> None:
        if not 0 <= least <= most < math.inf:
            raise ValueError(f"{name} must be finite numbers of at least 0; got {least:g} to {most:g}")

    return checks.Requirement(values.detach().aminmax(), judge)


class AdaptiveThresholds:
    """tau <- rho tau + (1 - rho) quantile_q(|g|), one tau a parameter: each layer on the scale of its own gradients.

    quantile: q, between 0 and 1; the smallest entry of |g| that at least a share q of them does not exceed. decay: rho,
    from 0 to less than 1. A tau begins as the first quantile that is not 0 (that of LoRA's A is, at the first step).
    They are constants to the loss: no gradient flows through them.
    Raises TypeError, ValueError. Source: the documented "adaptive thresholds for layers"; the rule, which the text
    leaves out, is ours: with the quantile of the current step alone a penalty could never tell a large step.
    """

    def __init__(self, quantile: float = 0.9, decay: float = 0.9):
        self.quantile = checks.number("quantile", quantile, least=0, below=1)
        self.decay = checks.number("decay", decay, least=0, below=1)
        self.values: Tensor | None = None  # [parameter]

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """Take in the gradients of one step; return the thresholds [parameter]."""
        gradients = _several("gradients", gradients, None if self.values is None else len(self.values))
        checks.look(*_all_finite(gradients))
        return self._update(gradients)

    def _update(self, gradients: Sequence[Tensor]) -> Tensor:
        now = torch.stack([self._quantile(g.detach().abs().flatten()) for g in gradients])
        if self.values is None:
            self.values = now
        else:
            old = self.values.to(now)
            self.values = torch.where(old > 0, self.decay * old + (1 - self.decay) * now, now)
        return self.values

    def _quantile(self, magnitudes: Tensor) -> Tensor:
        return magnitudes.kthvalue(max(1, math.ceil(self.quantile * len(magnitudes)))).values

    def state_dict(self) -> dict[str, Tensor]:
        """What to store with a checkpoint: {"values": [parameter]}, empty before the first update."""
        return {} if self.values is None else {"values": self.values}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what state_dict returned."""
        values = state.get("values")
        self.values = None if values is None else values.clone()


def clip_to_thresholds(gradients: Sequence[Tensor], thresholds: Sequence[float | Tensor]) -> list[Tensor]:
    """g - e = clamp(g, -tau, tau) of each gradient: clipping itself, which does bound every entry by its tau.

    The arguments are those of clip_penalty. Raises TypeError, ValueError, NonFiniteLoss.
    Source: the "adaptive clipping" of the documented introduction, whose loss is the penalty above instead.
    """
    return _clip_to_thresholds(*_paired(_several("gradients", gradients), thresholds))


def _clip_to_thresholds(gradients: Sequence[Tensor], thresholds: Iterable[Tensor]) -> list[Tensor]:
    return [torch.minimum(torch.maximum(g, -tau), tau) for g, tau in zip(gradients, thresholds, strict=True)]


# --- 3. a sampler that prefers the types with a large loss, and a penalty that keeps it balanced ----------------------


def sampling_weights(scores: Tensor, temperature: float, floor: float = 0.0) -> Tensor:
    """w_i = exp(s_i / beta) / sum_k exp(s_k / beta), and none below a floor: f + (1 - N f) w_i.

    scores: s, [.., type], N of them; losses or gradient norms. temperature: beta > 0, in the unit of the scores; their
    standard deviation is a sane size. floor: f, from 0 to less than 1/N. Returns [.., type], each row with sum 1.
    Raises TypeError, ValueError. Source: documented step 3; the floor, which keeps every type in the training, is ours.
    """
    checks.tensor("scores", scores, ..., "type")
    checks.positive(temperature=temperature)
    checks.number("floor", floor, least=0, below=1 / scores.shape[-1])
    checks.look(checks.finite("scores", scores), checks.finite("scores / temperature", scores / temperature))
    return _sampling_weights(scores, temperature, floor)


def _sampling_weights(scores: Tensor, temperature: float, floor: float) -> Tensor:
    return floor + (1 - scores.shape[-1] * floor) * (scores / temperature).softmax(-1)


def sampling_penalty(weights: Tensor) -> Tensor:
    """L_sample = KL(p || uniform) = sum_i p_i log(N p_i) in nats.

    weights: p, [type], of sampling_weights. With live losses as scores its gradient is (1/beta) p_k (log p_k + H(p)) by
    s_k, a pull towards equal losses; with scores that were stored, as a sampler has them, it has none.
    Raises TypeError, ValueError, NonFiniteLoss. Source: documented step 3.
    """
    return kl_from_uniform(weights)


class TypeSampler:
    """Draws types of problems by how they go: w = sampling_weights of a running average of each type's score.

    kinds: names of the types. temperature, floor: as in sampling_weights. decay: rho of s <- rho s + (1 - rho) new.
    score: "loss", the mean loss of a type's sequences, or "gradient norm", ||d of it / d parameters||.
    seed: of the draws. A type that was never seen counts as the worst that was.
    Raises TypeError, ValueError. Source: documented step 3, whose text speaks of gradient statistics and whose formula
    of the loss; the running average, which the text leaves out, is ours.
    """

    def __init__(
        self,
        kinds: Sequence[str],
        temperature: float,
        floor: float = 0.0,
        decay: float = 0.9,
        score: str = "loss",
        seed: int = 0,
    ):
        self.kinds = tuple(kinds)
        if isinstance(kinds, str) or not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be several names that differ, at least one; got {kinds!r}")
        sampling_weights(torch.zeros(len(self.kinds)), temperature, floor)  # raises for what they cannot be
        checks.choice("score", score, ("loss", "gradient norm"))
        self.temperature, self.floor, self.score = temperature, floor, score
        self.decay = checks.number("decay", decay, least=0, below=1)
        self.scores = torch.full([len(self.kinds)], math.nan, dtype=torch.float64)  # NaN: never seen
        self.generator = torch.Generator().manual_seed(checks.integer("seed", seed, least=0))

    def weights(self) -> Tensor:
        """w, [type], as numbers without a gradient."""
        seen = ~self.scores.isnan()
        worst = self.scores[seen].max() if seen.any() else torch.zeros(())
        return _sampling_weights(self.scores.where(seen, worst.double()), self.temperature, self.floor)

    def draw(self, count: int) -> list[str]:
        """The types of the next `count` problems, each drawn by itself."""
        drawn = torch.multinomial(self.weights(), checks.integer("count", count), True, generator=self.generator)
        return [self.kinds[index] for index in drawn.tolist()]

    def update(self, kinds: Sequence[str], losses: Tensor, parameters: Iterable[Tensor] = ()) -> None:
        """Take in one batch. kinds: the type of each sequence. losses: [sequence], with their graph for gradient norms.

        parameters: those to differentiate by, for gradient norms only: one backward pass a type, before that of the
        training. Raises TypeError, ValueError, NonFiniteLoss.
        """
        checks.tensor("losses", losses, "sequence")
        if len(kinds) != len(losses) or not set(kinds) <= set(self.kinds):
            got = f"{len(kinds)}, of {sorted(set(kinds))}"
            raise ValueError(f"kinds must be one a loss, {len(losses)}, each one of {list(self.kinds)}; got {got}")
        scores = by_kind(kinds, losses)  # {type: scalar}
        if self.score == "gradient norm":
            parameters = _trained(parameters)
            for kind, loss in scores.items():
                gradients = _gradients(loss, parameters, retain_graph=True)
                scores[kind] = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for kind, new in zip(scores, torch.stack([*scores.values()]).tolist(), strict=True):
            if not math.isfinite(new):
                raise NonFiniteLoss(f"the {self.score} of {kind!r} is {new}; it must be a finite number")
            place = self.kinds.index(kind)
            old = self.scores[place]
            self.scores[place] = new if old.isnan() else self.decay * old + (1 - self.decay) * new

    def state_dict(self) -> dict[str, Tensor]:
        """What to store with a checkpoint: scores and the state of the generator."""
        return {"scores": self.scores.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what state_dict returned, with the same draws as without the break."""
        self.scores.copy_(state["scores"])
        self.generator.set_state(state["generator"])


def by_kind(kinds: Sequence[str], losses: Tensor) -> dict[str, Tensor]:
    """The mean loss of each type that is there, in the order of its first: losses [sequence] -> {type: scalar}."""
    rows: dict[str, list[int]] = {}
    for row, kind in enumerate(kinds):
        rows.setdefault(kind, []).append(row)
    return {kind: losses[torch.tensor(places, device=losses.device)].mean() for kind, places in rows.items()}


# --- 4. the total loss ------------------------------------------------------------------------------------------------


def documented_loss(
    loss: Tensor,
    parameters: Iterable[Tensor],
    thresholds: Sequence[float | Tensor] | AdaptiveThresholds,
    weights: Tensor,
    clip_penalty_weight: float,
    sampling_penalty_weight: float,
) -> LossTerms:
    """L = L_basic + lambda_1 L_clip + lambda_2 L_sample: cross-entropy, clip_penalty of its gradient, sampling_penalty.

    loss: L_basic, a scalar with its graph. parameters: those that are trained (of LoRA: A and B). thresholds: one a
    parameter, or AdaptiveThresholds, which take in the gradients of this step first. weights: p, [type].
    clip_penalty_weight: lambda_1, sampling_penalty_weight: lambda_2, both at least 0.
    L_clip sums over all entries, so lambda_1 means less in a small model. total.backward() differentiates through the
    gradient (one Hessian-vector product): a step takes about three times as long as a plain one; with lambda_1 = 0
    nothing of it is computed. Terms: "basic", "clip", "sampling".
    Raises TypeError, ValueError, NonFiniteLoss; RuntimeError if the loss was computed by what has no second derivative,
    such as fused attention: compute it under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.
    Source: documented steps 1 to 4.
    """
    checks.instance("loss", loss, Tensor, "a scalar tensor, such as LossTerms.total")
    if loss.ndim or not loss.requires_grad:
        raise ValueError(f"loss must be a scalar with a graph to differentiate; got {loss!r}")
    parameters = _trained(parameters)
    checks.tensor("weights", weights, "type")
    checks.not_negative(clip_penalty_weight=clip_penalty_weight, sampling_penalty_weight=sampling_penalty_weight)
    balanced = _probabilities(weights.detach().to(loss))
    if clip_penalty_weight > 0:
        if name := _without_second_derivative(loss):
            raise RuntimeError(f"the loss cannot be differentiated twice: {name}")
        gradients = _gradients(loss, parameters, create_graph=True)
        clip = clip_penalty_weight * _clip_penalty(*_paired(gradients, thresholds, balanced))
    else:
        checks.look(balanced)
        clip = loss.new_zeros(())
    sampling = (sampling_penalty_weight * _kl_from_uniform(weights)).to(loss)
    return LossTerms.of(basic=loss, clip=clip, sampling=sampling)


def _trained(parameters: Iterable[Tensor]) -> list[Tensor]:
    """`parameters` as a list. Raises TypeError, ValueError unless they are tensors that require a gradient."""
    parameters = _several("parameters", parameters)
    if frozen := [number for number, parameter in enumerate(parameters) if not parameter.requires_grad]:
        wanted = "those of [p for p in model.parameters() if p.requires_grad]"
        raise ValueError(f"parameters must require a gradient, as {wanted} do; those at {frozen} do not")
    return parameters


def _gradients(loss: Tensor, parameters: list[Tensor], **how: bool) -> tuple[Tensor, ...]:
    """d loss / d parameters. Raises ValueError if the loss does not depend on one."""
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, **how)
    if unused := [number for number, gradient in enumerate(gradients) if gradient is None]:
        raise ValueError(f"the loss does not depend on the parameters at {unused}; leave those out")
    return gradients


def _without_second_derivative(loss: Tensor) -> str:
    """What in a loss's graph has no second derivative, and what to do about it; "" if all of it has one.

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
            math = "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            return f"fused attention ({node.name()}) has no second derivative; call the model under {math}"
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            own = "has a gradient of its own (a chunked head, a compiled model, a kernel)"
            return f"{node.name()} {own}; compute the loss with plain operations"
    return ""


# 5. Gradient descent, which is the trainer's.

# === the published method =============================================================================================

# --- 3.1 and 3.3: clip higher, and every token weighs the same --------------------------------------------------------

CLIP_LOW, CLIP_HIGH = 0.2, 0.28  # how far the ratio of a token may leave 1, down and up


def published_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = CLIP_LOW,
    clip_high: float = CLIP_HIGH,
) -> LossTerms:
    """L = -1/(sum_i |o_i|) sum_i sum_t min(rho A, clip(rho, 1 - e_low, 1 + e_high) A), rho = pi / pi_old of a token.

    logprobs, old_logprobs: of the tokens, [sequence, token]. advantages: A, [sequence], standardised over each group.
    mask: [sequence, token], bool or 0 and 1, what counts of an answer o_i. clip_low, clip_high: e_low, e_high; with
    more room above, an unlikely token can become likelier faster. The mean is over all tokens of the batch, as in
    public code; the paper writes it for the answers to one prompt. There is no KL term.
    What stands where the mask is 0 is not read. Term: "policy".
    Raises TypeError, ValueError, NonFiniteLoss. Source: the paper, equations 8 and 12.
    """
    kept, log_ratio = _check_answers(mask, advantages, clip_low, clip_high, logprobs, old_logprobs)
    return LossTerms.of(policy=_clipped_loss(log_ratio, advantages, kept, clip_low, clip_high, "token", None))


# --- 3.2: dynamic sampling --------------------------------------------------------------------------------------------


def informative_groups(rewards: Tensor) -> Tensor:
    """Which groups have a signal, bool [prompt]: those whose rewards are not all equal, so 0 < #correct < G.

    rewards: [prompt, group], at least two answers a group. If each answer is right with probability p, a group is
    informative with probability 1 - p^G - (1 - p)^G.
    Raises TypeError, ValueError. Source: the paper, the condition of equation 11.
    """
    checks.groups("rewards", rewards)
    checks.look(checks.finite("rewards", rewards))
    return (rewards != rewards[:, :1]).any(1)


class Batch(NamedTuple):
    """What fill_batch returns."""

    groups: list  # one item a prompt, of those that `sample` returned
    rewards: Tensor  # [prompt, group]
    drawn: int  # how many groups were drawn for it


class BatchNotFilled(RuntimeError):
    """Too few informative groups came; `batch` holds those that did."""

    def __init__(self, message: str, batch: Batch):
        super().__init__(message)
        self.batch = batch


def fill_batch(sample: Callable[[int], tuple[Sequence, Tensor]], wanted: int, max_rounds: int = 10) -> Batch:
    """Draw groups, and leave out those without a signal, until there are `wanted`.

    sample(round), round = 0, 1, .. -> (groups, rewards [prompt, group]): one item and one row for each prompt that it
    drew; what the items are is the caller's business. Groups beyond `wanted` are dropped, in the order of drawing.
    Raises TypeError, ValueError; BatchNotFilled if max_rounds rounds do not suffice, as happens once a model answers
    everything right, or nothing. Source: the paper, section 3.2 and algorithm 1.
    """
    wanted, max_rounds = checks.integers(wanted=wanted, max_rounds=max_rounds)
    groups, kept, drawn = [], [], 0
    for number in range(max_rounds):
        new_groups, rewards = sample(number)  # [prompt, group]
        if len(new_groups) != len(rewards):
            raise ValueError(f"sample must return one group a row of rewards, {len(rewards)}; got {len(new_groups)}")
        informative = [row for row, keep in enumerate(informative_groups(rewards).tolist()) if keep]
        groups += [new_groups[row] for row in informative]
        kept.append(rewards[torch.tensor(informative, dtype=torch.long, device=rewards.device)])
        drawn += len(rewards)
        if len(groups) >= wanted:
            return Batch(groups[:wanted], torch.cat(kept)[:wanted], drawn)
    message = (
        f"{max_rounds} rounds of sampling gave {len(groups)} informative groups among {drawn}, of {wanted} wanted: in "
        "all others the rewards are equal; draw problems that the model solves sometimes, or allow more rounds"
    )
    raise BatchNotFilled(message, Batch(groups, torch.cat(kept), drawn))


# --- 3.4: answers that are too long -----------------------------------------------------------------------------------


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """What is added to the reward: 0 up to max_length - buffer tokens, then falling evenly, to -1 from max_length on.

    R = 0 if |y| <= L_max - L_c;  ((L_max - L_c) - |y|) / L_c up to L_max;  -1 above.
    lengths: |y| in tokens, any shape. max_length: L_max. buffer: L_c, from 1 to L_max. Returns the shape of lengths.
    Raises TypeError, ValueError. Source: the paper, equation 13.
    """
    if not isinstance(lengths, Tensor) or not lengths.numel():
        raise TypeError(f"lengths must be a tensor of numbers of tokens, not empty; got {lengths!r}")
    max_length = checks.integer("max_length", max_length)
    buffer = checks.integer("buffer", buffer, most=max_length, why="as there are no more tokens")
    checks.look(_not_negative("lengths", lengths))
    return _overlong_penalty(lengths, max_length, buffer)


def _overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    lengths = lengths if lengths.is_floating_point() else lengths.long()  # an uint8 has nothing below 0
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


def finished(completion: Tensor, mask: Tensor, eos_token_id: int) -> Tensor:
    """Which answers ended by themselves, bool [sequence]: overlong filtering keeps these rows and no others.

    The alternative to overlong_penalty, not to be used with it. completion: ids [sequence, token]. mask: bool or 0 and
    1, the same shape, what counts of each answer, its end-of-sequence token too. eos_token_id: the id of that.
    Raises TypeError, ValueError. Source: the paper, section 3.4, "overlong filtering".
    """
    checks.integer("eos_token_id", eos_token_id, least=0)
    checks.token_ids("completion", completion, "sequence", "token")
    kept = checks.token_mask(mask, completion=completion.to(torch.get_default_dtype()))
    checks.look(*checks.counted(mask))
    return _finished(completion, kept, eos_token_id)


def _finished(completion: Tensor, kept: Tensor, eos_token_id: int) -> Tensor:
    return ((completion.long() == eos_token_id) & kept).any(1)
