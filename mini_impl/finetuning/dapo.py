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
from mini_impl.finetuning.policy import reduce, token_loss
from mini_impl.losses import LossTerms, NonFiniteLoss, kl_from_uniform

# === the documented method ============================================================================================
# 1. The cross-entropy L_basic of the model's answers, which another chapter makes: documented_loss is given it.

# --- 2. a penalty on what exceeds the threshold of its layer ----------------------------------------------------------


def clip_penalty(gradients: Sequence[Tensor], thresholds: Sequence[float | Tensor]) -> Tensor:
    """L_clip = sum_i max(0, |g_i| - tau)^2 over all entries g_i of all gradients, tau the threshold of its tensor.

    gradients: one tensor a parameter, of any shape. thresholds: one number or scalar tensor a gradient, at least 0.
    Differentiable through the gradients, if they have a graph (`torch.autograd.grad(.., create_graph=True)`): with the
    excess e = g - clamp(g, -tau, tau) and the Hessian H of L_basic it is 2 H e. Without one it is a number to look at,
    and trains nothing. It pulls towards smaller gradients and bounds none; clip_to_thresholds does that.
    Raises TypeError, ValueError, NonFiniteLoss for NaN or infinity among the gradients.
    Source: documented step 2.
    """
    gradients, thresholds = checks.thresholds(gradients, thresholds, NonFiniteLoss)
    excesses = ((g.abs() - tau).clamp(min=0) for g, tau in zip(gradients, thresholds, strict=True))
    return sum(excess.square().sum() for excess in excesses)


class AdaptiveThresholds:
    """tau <- rho tau + (1 - rho) quantile_q(|g|), one tau a parameter: each layer on the scale of its own gradients.

    quantile: q, between 0 and 1; the smallest entry of |g| that at least a share q of them does not exceed. decay: rho,
    from 0 to less than 1. A tau begins as the first quantile that is not 0 (that of LoRA's A is, at the first step).
    They are constants to the loss: no gradient flows through them.
    Raises TypeError, ValueError. Source: the documented "adaptive thresholds for layers"; the rule, which the text
    leaves out, is ours: with the quantile of the current step alone a penalty could never tell a large step.
    """

    def __init__(self, quantile: float = 0.9, decay: float = 0.9):
        self.quantile = checks.fraction("quantile", quantile)
        self.decay = checks.fraction("decay", decay)
        self.values: Tensor | None = None  # [parameter]

    def update(self, gradients: Sequence[Tensor]) -> Tensor:
        """Take in the gradients of one step; return the thresholds [parameter]."""
        gradients = checks.gradients(gradients, NonFiniteLoss, None if self.values is None else len(self.values))
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
        self.values = None if values is None else checks.tensor("values", values, "parameter").clone()


def clip_to_thresholds(gradients: Sequence[Tensor], thresholds: Sequence[float | Tensor]) -> list[Tensor]:
    """g - e = clamp(g, -tau, tau) of each gradient: clipping itself, which does bound every entry by its tau.

    The arguments are those of clip_penalty. Raises TypeError, ValueError, NonFiniteLoss.
    Source: the "adaptive clipping" of the documented introduction, whose loss is the penalty above instead.
    """
    gradients, thresholds = checks.thresholds(gradients, thresholds, NonFiniteLoss)
    return [torch.minimum(torch.maximum(g, -tau), tau) for g, tau in zip(gradients, thresholds, strict=True)]


# --- 3. a sampler that prefers the types with a large loss, and a penalty that keeps it balanced ----------------------


def sampling_weights(scores: Tensor, temperature: float, floor: float = 0.0) -> Tensor:
    """w_i = exp(s_i / beta) / sum_k exp(s_k / beta), and none below a floor: f + (1 - N f) w_i.

    scores: s, [.., type], N of them; losses or gradient norms. temperature: beta > 0, in the unit of the scores; their
    standard deviation is a sane size. floor: f, from 0 to less than 1/N. Returns [.., type], each row with sum 1.
    Raises TypeError, ValueError. Source: documented step 3; the floor, which keeps every type in the training, is ours.
    """
    checks.tensor("scores", scores, ..., "type")
    checks.number("temperature", temperature, above=0)
    count = scores.shape[-1]
    checks.floor(floor, count)
    return floor + (1 - count * floor) * (scores / temperature).softmax(-1)


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
        self.kinds = checks.kinds(kinds)
        self.temperature = checks.number("temperature", temperature, above=0)
        self.floor = checks.floor(floor, len(self.kinds))
        self.decay = checks.fraction("decay", decay)
        checks.choice("score", score, ("loss", "gradient norm"))
        self.score = score
        self.scores = torch.full([len(self.kinds)], math.nan, dtype=torch.float64)  # NaN: never seen
        self.generator = torch.Generator().manual_seed(checks.integer("seed", seed, least=0))

    def weights(self) -> Tensor:
        """w, [type], as numbers without a gradient."""
        seen = ~self.scores.isnan()
        worst = self.scores[seen].max() if seen.any() else torch.zeros(())
        return sampling_weights(self.scores.where(seen, worst.double()), self.temperature, self.floor)

    def draw(self, count: int) -> list[str]:
        """The types of the next `count` problems, each drawn by itself."""
        drawn = torch.multinomial(self.weights(), checks.integer("count", count), True, generator=self.generator)
        return [self.kinds[index] for index in drawn.tolist()]

    def update(self, kinds: Sequence[str], losses: Tensor, parameters: Iterable[Tensor] = ()) -> None:
        """Take in one batch. kinds: the type of each sequence. losses: [sequence], with their graph for gradient norms.

        parameters: those to differentiate by, for gradient norms only: one backward pass a type, before that of the
        training. Raises TypeError, ValueError.
        """
        indices = checks.scored_kinds(kinds, losses, self.kinds)
        parameters = checks.parameters(parameters) if self.score == "gradient norm" else []
        for kind in sorted(set(indices)):
            loss = losses[[index == kind for index in indices]].mean()
            if self.score == "gradient norm":
                gradients = checks.each_used(
                    torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                )
                loss = torch.stack([gradient.norm() for gradient in gradients]).norm()
            new = checks.number(f"the {self.score} of {self.kinds[kind]!r}", loss.item())
            old = self.scores[kind]
            self.scores[kind] = new if old.isnan() else self.decay * old + (1 - self.decay) * new

    def state_dict(self) -> dict[str, Tensor]:
        """What to store with a checkpoint: scores and the state of the generator."""
        return {"scores": self.scores.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what state_dict returned, with the same draws as without the break."""
        checks.sampler_state(state, self.kinds)
        self.scores = state["scores"].clone()
        self.generator.set_state(state["generator"])


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
    gradient (one Hessian-vector product, about twice the time of a plain step); with lambda_1 = 0 nothing of it is
    computed. Terms: "basic", "clip", "sampling".
    Raises TypeError, ValueError; RuntimeError if the loss was computed by what has no second derivative, such as fused
    attention: compute it under `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`. Source: documented steps 1 to 4.
    """
    checks.scalar_loss("loss", loss)
    parameters = checks.parameters(parameters)
    checks.tensor("weights", weights, "type", finite=False)
    checks.number("clip_penalty_weight", clip_penalty_weight, least=0)
    checks.number("sampling_penalty_weight", sampling_penalty_weight, least=0)
    clip = loss.new_zeros(())
    if clip_penalty_weight > 0:
        checks.twice_differentiable(loss)
        gradients = checks.each_used(torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True))
        if isinstance(thresholds, AdaptiveThresholds):
            thresholds = thresholds.update(gradients)
        clip = clip_penalty_weight * clip_penalty(gradients, thresholds)
    return LossTerms.of(
        basic=loss,
        clip=clip,
        sampling=(sampling_penalty_weight * sampling_penalty(weights)).to(loss),
    )


# 5. Gradient descent, which is the trainer's.

# === the published method =============================================================================================

# --- 3.1 and 3.3: clip higher, and every token weighs the same --------------------------------------------------------


def published_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> LossTerms:
    """L = -1/(sum_i |o_i|) sum_i sum_t min(rho A, clip(rho, 1 - e_low, 1 + e_high) A), rho = pi / pi_old of a token.

    logprobs, old_logprobs: of the tokens, [sequence, token]. advantages: A, [sequence], standardised over each group.
    mask: [sequence, token], bool or 0 and 1, what counts of an answer o_i. clip_low, clip_high: e_low, e_high; with
    more room above, an unlikely token can become likelier faster. The mean is over all tokens of the batch, as in
    public code; the paper writes it for the answers to one prompt. There is no KL term.
    What stands where the mask is 0 is not read. Term: "policy".
    Raises TypeError, ValueError, NonFiniteLoss. Source: the paper, equations 8 and 12.
    """
    mask = checks.token_mask(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    logprobs, old_logprobs = logprobs.where(mask, 0), old_logprobs.where(mask, 0)
    per_token = token_loss(logprobs, old_logprobs, advantages, clip_low, clip_high)
    return LossTerms.of(policy=reduce(per_token, mask, by="token"))


# --- 3.2: dynamic sampling --------------------------------------------------------------------------------------------


def informative_groups(rewards: Tensor) -> Tensor:
    """Which groups have a signal, bool [prompt]: those whose rewards are not all equal, so 0 < #correct < G.

    rewards: [prompt, group], at least two answers a group. If each answer is right with probability p, a group is
    informative with probability 1 - p^G - (1 - p)^G.
    Raises TypeError, ValueError. Source: the paper, the condition of equation 11.
    """
    checks.groups("rewards", rewards)
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
    checks.integer("wanted", wanted)
    checks.integer("max_rounds", max_rounds)
    groups, kept, drawn = [], [], 0
    for number in range(max_rounds):
        new_groups, rewards = checks.drawn_groups(sample(number))
        informative = informative_groups(rewards)
        groups += [group for group, keep in zip(new_groups, informative.tolist(), strict=True) if keep]
        kept.append(rewards[informative])
        drawn += len(rewards)
        if len(groups) >= wanted:
            return Batch(groups[:wanted], torch.cat(kept)[:wanted], drawn)
    raise BatchNotFilled(
        f"{max_rounds} rounds of sampling gave {len(groups)} informative groups among {drawn}, of {wanted} wanted: in "
        "all others the rewards are equal; draw problems that the model solves sometimes, or allow more rounds",
        Batch(groups, torch.cat(kept), drawn),
    )


# --- 3.4: answers that are too long -----------------------------------------------------------------------------------


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """What is added to the reward: 0 up to max_length - buffer tokens, then falling evenly, to -1 from max_length on.

    R = 0 if |y| <= L_max - L_c;  ((L_max - L_c) - |y|) / L_c up to L_max;  -1 above.
    lengths: |y| in tokens, any shape. max_length: L_max. buffer: L_c, from 1 to L_max. Returns the shape of lengths.
    Raises TypeError, ValueError. Source: the paper, equation 13.
    """
    checks.lengths(lengths)
    checks.integer("max_length", max_length)
    checks.integer("buffer", buffer, most=max_length, why="as there are no more tokens")
    return ((max_length - buffer - lengths) / buffer).clamp(-1, 0)


def finished(completion: Tensor, mask: Tensor, stop: int) -> Tensor:
    """Which answers ended by themselves, bool [sequence]: overlong filtering keeps these rows and no others.

    The alternative to overlong_penalty, not to be used with it. completion: ids [sequence, token]. mask: bool or 0 and
    1, the same shape, what counts of each answer, its stop token too. stop: the id of that.
    Raises TypeError, ValueError. Source: the paper, section 3.4, "overlong filtering".
    """
    checks.completion(completion, mask, stop)
    return ((completion == stop) & mask.bool()).any(1)
