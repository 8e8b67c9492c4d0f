"""What GRPO and DAPO share: the log-probabilities of what was answered, advantages, ratio, clip, KL, and reduction.

Pure functions of tensors. A loss per token comes first and its reduction to a number after, apart, as the published
methods differ in the second only by which weight they give to each token.
Sources: the paper "DeepSeekMath", Shao et al., 2024 (GRPO); Yu et al., "DAPO", 2025; Liu et al., "Understanding
R1-Zero-Like Training", 2025 (Dr. GRPO); Schulman, "Approximating KL Divergence", 2020 (k3).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks
from mini_impl.losses import NonFiniteLoss

# --- log-probabilities of the chosen tokens ---------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log p(token) = logit of the token - log sum exp of all logits, at every place.

    logits: [.., vocabulary], of the place that predicts the token. tokens: ids [..]. Returns [..], in nats, at most 0.
    Cross-entropy holds one table as large as the logits for its gradient; log_softmax and gather would hold two. A
    slice of the time axis is copied first: cut the hidden states, not the logits.
    A token whose logit is -inf (cut by top-k, say) has -inf. Raises TypeError, ValueError for ids that are none or do
    not fit, NonFiniteLoss if NaN comes out: NaN, +inf, or -inf alone among the logits.
    """
    checks.tensor("logits", logits, ..., "vocabulary", finite=False)
    checks.chosen(tokens, logits.shape[-1], "logits", logits)
    flat = logits.reshape(-1, logits.shape[-1])
    logprobs = -F.cross_entropy(flat, tokens.reshape(-1).long(), reduction="none").view(tokens.shape)
    if logprobs.isnan().any():
        raise NonFiniteLoss("log-probabilities are NaN: the logits hold NaN or +inf, or nothing but -inf, at a place")
    return logprobs


def head_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int = 128) -> Tensor:
    """token_logprobs(hidden @ weight' / temperature, tokens), without ever holding the logits of more than a chunk.

    hidden: [.., place, width], of the place that predicts the token. weight: the head [vocabulary, width], without a
    bias. tokens: ids [.., place]. chunk: places at a time. Returns [.., place], differentiable by hidden and weight.

    d log p_t / d h_t = (W_{token t} - sum_v p_v W_v) / temperature needs nothing that comes later, so it is built in
    the forward pass, next to the logits of its chunk, and the backward pass only scales it: with a frozen head (LoRA)
    nothing is computed twice. The gradient of the head, sum_t g_t (onehot_t - p_t) h_t' / temperature, needs each
    token's g_t = d loss / d log p_t, which the loss alone knows: for it the backward pass computes the logits again, a
    chunk at a time. `head_loss` spares that too.
    Raises TypeError, ValueError, NonFiniteLoss; RuntimeError for a second derivative, which it does not have.
    """
    checks.head(hidden, weight, tokens, temperature, chunk)
    scaled = hidden.reshape(-1, hidden.shape[-1]) / temperature
    logprobs = _HeadLogprobs.apply(scaled, weight, tokens.reshape(-1).long(), chunk).view(tokens.shape)
    checks.all_finite("log-probabilities of hidden states, head, or both,", logprobs, NonFiniteLoss)
    return logprobs


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    per_token: Callable[[Tensor, slice], Tensor],
    temperature: float = 1.0,
    chunk: int = 128,
) -> Tensor:
    """The sum of per_token over head_logprobs(hidden, weight, tokens), its whole gradient built in the forward pass.

    per_token(logprobs, part) -> as logprobs: what each token adds to the loss, from its own log-probability alone and
    with its weight in the reduction already in it. `part` is a slice of the first axis, to cut with it what else the
    loss needs:

        weights = token_weights(mask, by="sequence")
        head_loss(hidden, weight, tokens, lambda logprobs, part: weights[part] * token_loss(
            logprobs, old_logprobs[part], advantages[part], clip_low, clip_high))

    hidden: [.., place, width]. weight: [vocabulary, width]. tokens: [.., place]. chunk: places at a time, rounded to
    whole entries of the first axis, at least one. Returns a scalar.

    Why a function goes in: with it each d loss / d log p_t is known as soon as its chunk's log-probabilities are, while
    its logits are still there, and gradients by hidden and weight are added up then; no logits are computed twice. The
    price: log-probabilities do not come out, and there is one backward pass. Gradients flow to hidden and weight only.
    Raises TypeError, ValueError, NonFiniteLoss; RuntimeError for a second backward pass or derivative.
    Source: the chunked losses of Liger Kernel.
    """
    checks.head(hidden, weight, tokens, temperature, chunk)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # then no gradient is built for it
    rows = max(1, chunk * len(tokens) // tokens.numel())
    return _HeadLoss.apply(hidden / temperature, weight, tokens.long(), per_token, rows)


class _HeadLogprobs(torch.autograd.Function):
    """head_logprobs of hidden [token, width], weight [vocabulary, width], tokens [token]."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, chunk):
        chosen = hidden.new_empty(len(hidden))  # [token]
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # d log p_t / d h_t, [token, width]
        for part, table in _parts(hidden, weight, chunk):
            chosen[part], normaliser = _score(hidden[part], weight, tokens[part], table)
            if slopes is not None:
                slopes[part] = _pull(table, normaliser, tokens[part], torch.ones_like(chosen[part])) @ weight
        kept = (hidden, weight, tokens) if ctx.needs_input_grad[1] else (None, None, None)
        ctx.save_for_backward(slopes, *kept)
        ctx.chunk = chunk
        return chosen

    @staticmethod
    def backward(ctx, upstream):  # d loss / d log p_t, [token]
        _no_second_derivative("head_logprobs")
        slopes, hidden, weight, tokens = ctx.saved_tensors
        hidden_gradient = None if slopes is None else slopes * upstream[:, None]
        if weight is None:
            return hidden_gradient, None, None, None
        weight_gradient = torch.zeros_like(weight)
        for part, table in _parts(hidden, weight, ctx.chunk):
            _, normaliser = _score(hidden[part], weight, tokens[part], table)
            weight_gradient.addmm_(_pull(table, normaliser, tokens[part], upstream[part]).T, hidden[part])
        return hidden_gradient, weight_gradient, None, None


class _HeadLoss(torch.autograd.Function):
    """head_loss of hidden [first, token, width], weight [vocabulary, width], tokens [first, token]."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, per_token, rows):
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros(())
        hidden_gradient = torch.empty_like(hidden) if to_hidden else None
        weight_gradient = torch.zeros_like(weight) if to_weight else None
        for part, table in _parts(hidden, weight, rows):
            states, ids = hidden[part].reshape(-1, hidden.shape[-1]), tokens[part].reshape(-1)
            chosen, normaliser = _score(states, weight, ids, table)
            loss, slope = _loss_and_slope(per_token, chosen.view(tokens[part].shape), part)
            total += loss
            pull = _pull(table, normaliser, ids, slope.reshape(-1))  # d loss / d logits, [token, vocabulary]
            if to_hidden:
                hidden_gradient[part] = (pull @ weight).view_as(hidden[part])
            if to_weight:
                weight_gradient.addmm_(pull.T, states)
        ctx.gradients = hidden_gradient, weight_gradient
        return total

    @staticmethod
    def backward(ctx, upstream):
        _no_second_derivative("head_loss")
        if ctx.gradients is None:
            raise RuntimeError("head_loss has one backward pass: its gradient was built once, and is used up")
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a copy would cost another head
        return *(gradient if gradient is None else gradient.mul_(upstream) for gradient in gradients), None, None, None


def _parts(hidden: Tensor, weight: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices that cover the first axis, `size` long, each with the one table [token, vocabulary] that all write to."""
    size = min(size, len(hidden))
    places = hidden[0].numel() // hidden.shape[-1]  # of one entry of the first axis
    table = hidden.new_empty(size * places, len(weight))
    for start in range(0, len(hidden), size):
        part = slice(start, min(start + size, len(hidden)))
        yield part, table[: (part.stop - part.start) * places]


def _score(hidden: Tensor, weight: Tensor, tokens: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """log p of the chosen tokens, [token]; and s_t = sum of the table's row, [token, 1].

    Leaves e^(logit - largest logit of the row) in the table [token, vocabulary]: p times s.
    """
    torch.mm(hidden, weight.T, out=table)
    table -= table.amax(-1, keepdim=True)
    chosen = table.gather(-1, tokens[:, None])
    normaliser = table.exp_().sum(-1, keepdim=True)
    return (chosen - normaliser.log())[:, 0], normaliser


def _pull(table: Tensor, normaliser: Tensor, tokens: Tensor, slope: Tensor) -> Tensor:
    """d sum_t slope_t log p_t / d logits = slope_t (onehot_t - p_t), [token, vocabulary], written over the table."""
    slope = slope[:, None]
    return table.mul_(-slope / normaliser).scatter_add_(-1, tokens[:, None], slope)


def _no_second_derivative(name: str) -> None:
    """Raise if autograd is to differentiate a gradient: it would take ours for a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative (create_graph=True): use token_logprobs of all logits")


def _loss_and_slope(per_token: Callable, logprobs: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """The sum of per_token(logprobs, part) and its derivative by logprobs."""
    with torch.enable_grad():
        logprobs = logprobs.requires_grad_()
        losses = per_token(logprobs, part)
        checks.per_token(losses, logprobs)
        checks.all_finite("the loss per token", losses, NonFiniteLoss)
        (slope,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach().sum(), slope


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
    checks.number("epsilon", epsilon, least=0)
    checks.flag("scale", scale)
    shifted = rewards.detach() - rewards.detach()[:, :1]  # equal rewards become 0 exactly; their mean may be rounded
    centred = shifted - shifted.mean(1, keepdim=True)
    deviation = shifted.std(1, correction=ddof, keepdim=True)
    checks.all_finite("the standard deviation of the rewards", deviation, NonFiniteLoss)
    return centred / (deviation + epsilon).where(deviation > 0, 1) if scale else centred


# --- the loss per token -----------------------------------------------------------------------------------------------


def token_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float = 0.2, clip_high: float = 0.2
) -> Tensor:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) of each token, rho = pi(token) / pi_old(token).

    logprobs, old_logprobs: log pi and log pi_old of the tokens, [sequence, token]. advantages: A, [sequence].
    Returns [sequence, token]. Only logprobs carry a gradient: -rho A d log pi, and 0 where the clip holds, that is
    where rho > 1 + clip_high and A > 0, or rho < 1 - clip_low and A < 0. Where rho = 1 the value is -A.
    Raises TypeError, ValueError, NonFiniteLoss if rho overflows.
    Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; two bounds: DAPO.
    """
    checks.sampled(advantages, logprobs=logprobs, old_logprobs=old_logprobs)
    checks.number("clip_low", clip_low, least=0)
    checks.number("clip_high", clip_high, least=0)
    ratio = (logprobs - old_logprobs.detach()).exp()  # [sequence, token]
    checks.all_finite("the ratio pi / pi_old", ratio, NonFiniteLoss)
    advantages = advantages.detach()[:, None]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


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
    given = {"ref_logprobs": ref_logprobs} | ({} if old_logprobs is None else {"old_logprobs": old_logprobs})
    checks.logprobs("logprobs", logprobs, ...)
    for name, value in given.items():
        checks.logprobs(name, value, ...)
        checks.alike(name, value, "logprobs", logprobs)
    difference = ref_logprobs.detach() - logprobs
    estimate = difference.expm1() - difference
    if old_logprobs is not None:
        estimate = (logprobs - old_logprobs.detach()).exp() * estimate
    checks.all_finite("the KL estimate", estimate, NonFiniteLoss)
    return estimate


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
    checks.choice("by", by, REDUCTIONS)
    checks.length_limit(max_length, by == "length", kept)
    if by == "sequence":
        count = len(kept) * kept.sum(1, keepdim=True)
    else:
        count = kept.sum() if by == "token" else len(kept) * max_length
    return kept.to(dtype) / count


def reduce(per_token: Tensor, mask: Tensor, by: str = "sequence", max_length: int | None = None) -> Tensor:
    """The sum of per_token x token_weights(mask, by, max_length), a scalar.

    per_token: [sequence, token]; what stands where the mask is 0 is not read. mask, by, max_length: as token_weights.
    Raises TypeError, ValueError, NonFiniteLoss.
    """
    kept = checks.token_mask(mask, per_token=per_token)
    counted = per_token.where(kept, 0)
    checks.all_finite("per_token, where the mask counts,", counted, NonFiniteLoss)
    return (counted * token_weights(kept, by, max_length, per_token.dtype)).sum()
