"""What GRPO and DAPO share: the log-probabilities of what was answered, advantages, ratio, clip, KL, and reduction.

Pure functions of tensors. A loss per token comes first and its reduction to a number after, apart, as the published
methods differ in the second only by which weight they give to each token.
Sources: the paper "DeepSeekMath", Shao et al., 2024 (GRPO); Yu et al., "DAPO", 2025; Liu et al., "Understanding
R1-Zero-Like Training", 2025 (Dr. GRPO); Schulman, "Approximating KL Divergence", 2020 (k3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks
from mini_impl.kernels import clipped_loss, logprob, on_gpu
from mini_impl.losses import NonFiniteLoss

# --- log-probabilities of the chosen tokens ---------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) = logit of the token - log sum exp of all logits, at every place.

    logits: [.., vocabulary], of the place that predicts the token. tokens: ids [..]. Returns [..], in nats, at most 0.
    It holds one table as large as the logits for its gradient. A slice of the time axis is copied first: cut the hidden
    states, not the logits; `head.head_logprobs` never holds the logits of all tokens.
    A token whose logit is -inf (cut by top-k, say) has -inf. Raises TypeError, ValueError for ids that are none or do
    not fit, NonFiniteLoss if NaN comes out: NaN, +inf, or -inf alone among the logits.
    """
    checks.tensor("logits", logits, ..., "vocabulary")
    chosen_tokens(tokens, "logits", logits)
    checks.look(checks.known_ids("tokens", tokens, logits.shape[-1]))
    logprobs = _token_logprobs(logits, tokens)
    checks.look(no_nan(logprobs))
    return logprobs


@on_gpu(logprob.token_logprobs_as_torch, logprob.LEAST)
def _token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    flat = logits.reshape(-1, logits.shape[-1])
    return -F.cross_entropy(flat, tokens.reshape(-1).long(), reduction="none").view(tokens.shape)


def chosen_tokens(tokens, name: str, scored: Tensor) -> None:
    """Raise unless `tokens` are ids, one for each place of a tensor [.., score or feature]; which, `look` sees."""
    places = scored.shape[:-1]
    if isinstance(tokens, Tensor) and tokens.shape != places:
        raise ValueError(f"tokens must have the leading axes of {name}, {list(places)}; got {list(tokens.shape)}")
    checks.token_ids("tokens", tokens, *[".."] * len(places))
    if tokens.device != scored.device:
        raise ValueError(f"tokens and {name} must be on one device; got {tokens.device} and {scored.device}")


def no_nan(logprobs: Tensor) -> checks.Requirement:
    """That log-probabilities are no NaN; -inf is all right."""

    def judge(bad: float) -> None:
        if bad:
            wrong = "the logits hold NaN or +inf, or nothing but -inf, at a place"
            raise NonFiniteLoss(f"log-probabilities are NaN: {wrong}")

    return checks.Requirement((logprobs.isnan().any(),), judge)


# --- advantages -------------------------------------------------------------------------------------------------------


def advantages(rewards: Tensor, ddof: int = 1, epsilon: float = 1e-4, scale: bool = True) -> Tensor:
    """A_i = (r_i - mean of the group) / (standard deviation of the group + epsilon): [prompt, group] -> the same.

    ddof: 1 divides the sum of squares by group - 1, 0 by group. scale: False leaves the deviation out (Dr. GRPO).
    A group whose rewards are all equal has advantages of exactly 0: it teaches nothing. The division makes a full-size
    signal of the smallest difference that is well above epsilon.
    Carries no gradient. Raises TypeError, ValueError (a group of one has nothing to be compared with), NonFiniteLoss if
    the rewards are so large that their deviation overflows.
    Source: the GRPO paper, which names neither ddof nor epsilon; 1 and 1e-4 as in TRL.
    """
    checks.groups("rewards", rewards)
    checks.choice("ddof", ddof, (0, 1))
    checks.not_negative(epsilon=epsilon)
    checks.flags(scale=scale)
    shifted = rewards.detach() - rewards.detach()[:, :1]  # equal rewards become 0 exactly; their mean may be rounded
    centred = shifted - shifted.mean(1, keepdim=True)
    deviation = shifted.std(1, correction=ddof, keepdim=True)
    checks.look(
        checks.finite("rewards", rewards),
        checks.finite("the standard deviation of the rewards", deviation, NonFiniteLoss),
    )
    return centred / (deviation + epsilon).where(deviation > 0, 1) if scale else centred


# --- the loss per token -----------------------------------------------------------------------------------------------


def token_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of each token, rho = e^(logprobs - old_logprobs).

    logprobs, old_logprobs: log pi and log pi_old of the tokens, [sequence, token], so that rho is pi / pi_old. Any two
    logarithms will do: with the mean of log pi - log pi_old over an answer, and 0, rho is the answer's (GSPO).
    advantages: A, [sequence]. Returns [sequence, token]. Only logprobs carry a gradient: -rho A d log pi, and 0 where
    the clip holds, that is where rho > 1 + clip_high and A > 0, or rho < 1 - clip_low and A < 0. Where rho = 1 the
    value is -A. Raises TypeError, ValueError, NonFiniteLoss if rho overflows.
    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; two bounds: DAPO.
    """
    for name, value in (("logprobs", logprobs), ("old_logprobs", old_logprobs)):
        checks.alike(name, checks.tensor(name, value, "sequence", "token"), "logprobs", logprobs)
    _check_advantages(advantages, logprobs)
    checks.not_negative(clip_low=clip_low, clip_high=clip_high)
    log_ratio = logprobs - old_logprobs.detach()
    losses = _token_loss(log_ratio, advantages, clip_low, clip_high)
    checks.look(
        checks.finite("logprobs", logprobs),
        checks.finite("old_logprobs", old_logprobs),
        checks.finite("advantages", advantages),
        _no_overflow(log_ratio),
        checks.finite("the loss of each token", losses, NonFiniteLoss),
    )
    return losses


def _no_overflow(log_ratio: Tensor) -> checks.Requirement:
    """That e^log_ratio is a number; its gradient would be NaN even where the clip holds."""

    def judge(most: float) -> None:
        if most > math.log(torch.finfo(log_ratio.dtype).max):
            raise NonFiniteLoss(f"the ratio pi / pi_old must hold finite numbers only; got e^{most:.4g}")

    return checks.Requirement((log_ratio.detach().amax(),), judge)


def _token_loss(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    ratio = log_ratio.exp()  # [sequence, token]
    advantages = advantages.detach()[:, None]  # [sequence, 1]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def _check_advantages(advantages, logprobs: Tensor) -> None:
    """One advantage a sequence of logprobs [sequence, token], of their dtype and device."""
    checks.tensor("advantages", advantages, "sequence")
    like = logprobs.shape[:1], logprobs.dtype, logprobs.device
    if (advantages.shape, advantages.dtype, advantages.device) != like:
        checks.alike("advantages", advantages, "the first tokens of logprobs", logprobs[:, 0])


def _check_answers(mask, advantages, clip_low, clip_high, logprobs, old_logprobs, **more) -> tuple[Tensor, Tensor]:
    """What the published losses of GRPO and DAPO are given. Returns the mask as bool, and log pi - log pi_old.

    Both [sequence, token]; the second is 0 where the mask is, whatever stands there. more: other log-probabilities.
    """
    given = {"logprobs": logprobs, "old_logprobs": old_logprobs, **more}
    kept = checks.token_mask(mask, **given)
    _check_advantages(advantages, logprobs)
    checks.not_negative(clip_low=clip_low, clip_high=clip_high)
    log_ratio = (logprobs - old_logprobs.detach()).where(kept, 0)
    checks.look(
        *checks.counted(mask),
        *(checks.logprobs(name, value, kept, NonFiniteLoss) for name, value in given.items()),
        checks.finite("advantages", advantages),
        _no_overflow(log_ratio),
    )
    return kept, log_ratio


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor | None = None) -> Tensor:
    """k3 = e^d - d - 1 with d = log pi_ref - log pi, of each token: an estimate of KL(pi || pi_ref), never negative.

    logprobs, ref_logprobs, old_logprobs: of tokens that pi_old drew, any shape, the same. Only logprobs carry a
    gradient. Which one, is the choice:
    old_logprobs=None: k3 as it stands. With tokens drawn from pi its mean is KL(pi || pi_ref), but the mean of its
    gradient is that of the *other* divergence, KL(pi_ref || pi): that pi drew the tokens too, it does not see.
    old_logprobs given: rho k3, rho = pi / pi_old with its gradient. Its mean is KL(pi || pi_ref) whichever policy drew
    the token, and the mean of its gradient is that of the same divergence.
    (-d alone, as a loss, has a mean gradient of 0.)
    Raises TypeError, ValueError, NonFiniteLoss if e^d or rho overflows.
    Source: Schulman, "Approximating KL Divergence", 2020; in a loss: the GRPO paper; rho k3: DeepSeek-V3.2, 2025.
    """
    given = {"logprobs": logprobs, "ref_logprobs": ref_logprobs}
    given |= {} if old_logprobs is None else {"old_logprobs": old_logprobs}
    for name, value in given.items():
        checks.alike(name, checks.tensor(name, value, ...), "logprobs", logprobs)
    log_ratio = None if old_logprobs is None else logprobs - old_logprobs.detach()
    estimate = _kl_k3(ref_logprobs.detach() - logprobs, log_ratio)
    checks.look(
        *(checks.logprobs(name, value) for name, value in given.items()),
        checks.finite("the KL estimate", estimate, NonFiniteLoss),
    )
    return estimate


def _kl_k3(difference: Tensor, log_ratio: Tensor | None) -> Tensor:
    estimate = difference.expm1() - difference
    return estimate if log_ratio is None else log_ratio.exp() * estimate


# --- from tokens to a number ------------------------------------------------------------------------------------------

REDUCTIONS = ("sequence", "token", "length")


def token_weights(
    mask: Tensor, by: str = "sequence", max_length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What each token weighs in the mean: [sequence, token], 0 where the mask is.

    by "sequence": 1 / (sequences x the tokens of this sequence): the mean over sequences of the mean over their tokens
    (GRPO); a token of a long answer weighs less. "token": 1 / all tokens (DAPO); every token weighs the same. "length":
    1 / (sequences x max_length), a constant (Dr. GRPO): the sum over tokens, as the policy gradient has it.
    mask: [sequence, token], bool or 0 and 1 of any dtype. max_length: for "length" only, the most tokens that an answer
    may have. Raises TypeError, ValueError, naming the rows, if the mask leaves one without a token.
    """
    kept = checks.token_mask(mask)
    _check_reduction("by", by, max_length, mask)
    checks.look(*checks.counted(mask))
    return _token_weights(kept, by, max_length, dtype)


def _token_weights(kept: Tensor, by: str, max_length: int | None, dtype: torch.dtype) -> Tensor:
    if by == "sequence":
        count = len(kept) * kept.sum(1, keepdim=True)
    else:
        count = kept.sum() if by == "token" else len(kept) * max_length
    return kept.to(dtype) / count


@on_gpu(clipped_loss.clipped_loss_as_torch, clipped_loss.LEAST)
def _clipped_loss(log_ratio, advantages, kept, clip_low, clip_high, by, max_length) -> Tensor:
    """The mean of token_loss by these weights, a scalar: the published losses of GRPO and DAPO, without their KL."""
    weights = _token_weights(kept, by, max_length, log_ratio.dtype)  # [sequence, token]
    return (weights * _token_loss(log_ratio, advantages, clip_low, clip_high)).sum()


def _check_reduction(name: str, by: str, max_length: int | None, mask: Tensor) -> None:
    """Raise unless there is such a reduction, with max_length where it is wanted, there alone, and enough for a row."""
    checks.choice(name, by, REDUCTIONS)
    if (by == "length") != (max_length is not None):
        wanted = f"max_length, the most tokens that an answer may have, is for {name}='length', and for that alone"
        raise ValueError(f"{wanted}; got {name}={by!r} and max_length={max_length!r}")
    if max_length is not None and mask.shape[1] > checks.integer("max_length", max_length):
        raise ValueError(f"max_length must be at least {mask.shape[1]}, the tokens of a row; got {max_length}")


def reduce(per_token: Tensor, mask: Tensor, by: str = "sequence", max_length: int | None = None) -> Tensor:
    """The sum of per_token x token_weights(mask, by, max_length), a scalar.

    per_token: [sequence, token]; what stands where the mask is 0 is not read. mask, by, max_length: as token_weights.
    Raises TypeError, ValueError, NonFiniteLoss.
    """
    kept = checks.token_mask(mask, per_token=per_token)
    _check_reduction("by", by, max_length, mask)
    counted = per_token.where(kept, 0)
    checks.look(*checks.counted(mask), checks.finite("per_token, where the mask counts,", counted, NonFiniteLoss))
    return (counted * _token_weights(kept, by, max_length, counted.dtype)).sum()
