"""The head of a language model a chunk of tokens at a time, so that the logits of all of them are never held.

The logits [token, vocabulary] are the largest tensor of a training step. But a loss needs one number of each row, the
log-probability of the token that came, and its gradient by the hidden state, which is as short as that: both are made
of a chunk's logits while they are there. Source: the chunked losses of Liger Kernel.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mini_impl import checks
from mini_impl.finetuning.policy import _token_logprobs, chosen_tokens
from mini_impl.losses import NonFiniteLoss

CHUNK = 2**22  # logits that are held at a time, 16 MiB in float32


def head_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """token_logprobs(hidden @ weight' / temperature, tokens), without ever holding the logits of more than a chunk.

    hidden: [.., place, width], of the place that predicts the token. weight: the head [vocabulary, width], without a
    bias. tokens: ids [.., place]. chunk: places at a time; None: as many as give CHUNK logits. Where all places fit
    into one chunk there is nothing to save, and the logits are made at once.
    Returns [.., place], differentiable by hidden and weight.

    d log p_t / d h_t = (W_{token t} - sum_v p_v W_v) / temperature needs nothing that comes later, so it is built in
    the forward pass, next to the logits of its chunk, and the backward pass only scales it: with a frozen head (LoRA)
    nothing is computed twice. The gradient of the head, sum_t g_t (onehot_t - p_t) h_t' / temperature, needs each
    token's g_t = d loss / d log p_t, which the loss alone knows: for it the backward pass computes the logits again, a
    chunk at a time. `head_loss` spares that too.
    Raises TypeError, ValueError, NonFiniteLoss; RuntimeError for a second derivative, which it does not have.
    """
    _check_head(hidden, weight, tokens, temperature, chunk)
    logprobs = _head_logprobs(hidden, weight, tokens, temperature, chunk)
    name = "log-probabilities of hidden states, head, or both,"
    checks.look(checks.finite(name, logprobs, NonFiniteLoss))
    return logprobs


def _head_logprobs(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    chunk = _places(weight, chunk)
    if tokens.numel() <= chunk:
        logits = hidden @ weight.T  # [.., place, vocabulary]
        return _token_logprobs(logits if temperature == 1 else logits / temperature, tokens)
    scaled = hidden.reshape(-1, hidden.shape[-1]) / temperature  # [token, width]
    return _HeadLogprobs.apply(scaled, weight, tokens.reshape(-1).long(), chunk).view(tokens.shape)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    per_token: Callable[[Tensor, slice], Tensor],
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """The sum of per_token over head_logprobs(hidden, weight, tokens), its whole gradient built in the forward pass.

    per_token(logprobs, part) -> as logprobs: what each token adds to the loss, from its own log-probability alone and
    with its weight in the reduction already in it. `part` is a slice of the first axis, to cut with it what else the
    loss needs:

        weights = token_weights(mask, by="sequence")
        head_loss(hidden, weight, tokens, lambda logprobs, part: weights[part] * token_loss(
            logprobs, old_logprobs[part], advantages[part], clip_low, clip_high))

    hidden: [.., place, width]. weight: [vocabulary, width]. tokens: [.., place]. chunk: places at a time, rounded to
    whole entries of the first axis, at least one; None: as many as give CHUNK logits. Returns a scalar.

    Why a function goes in: with it each d loss / d log p_t is known as soon as its chunk's log-probabilities are, while
    its logits are still there, and gradients by hidden and weight are added up then; no logits are computed twice. The
    price: log-probabilities do not come out, and there is one backward pass. Gradients flow to hidden and weight only.
    Raises TypeError, ValueError, NonFiniteLoss; RuntimeError for a second backward pass or derivative.
    """
    _check_head(hidden, weight, tokens, temperature, chunk)
    if not torch.is_grad_enabled():
        weight = weight.detach()  # then no gradient is built for it
    rows = max(1, _places(weight, chunk) * len(tokens) // tokens.numel())
    return _HeadLoss.apply(hidden / temperature, weight, tokens.long(), per_token, rows)


def _places(weight: Tensor, chunk: int | None) -> int:
    """How many places are in a chunk."""
    return max(1, CHUNK // len(weight)) if chunk is None else chunk


def _check_head(hidden, weight, tokens, temperature, chunk) -> None:
    checks.tensor("hidden", hidden, ..., "place", "width")
    checks.tensor("weight", weight, "vocabulary", "width")
    if weight.shape[1] != hidden.shape[-1]:
        axes = f"got {list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden and weight must have one width, their last axis; {axes}")
    checks.suits("hidden", hidden, weight)
    chosen_tokens(tokens, "hidden", hidden)
    checks.positive(temperature=temperature)
    checks.integers(chunk=1 if chunk is None else chunk)
    checks.look(checks.known_ids("tokens", tokens, len(weight)))


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
        checks.instance("what per_token returns", losses, Tensor, "a tensor")
        checks.alike("what per_token returned", losses, "its logprobs", logprobs)
        if not losses.requires_grad:
            raise ValueError("per_token must return a function of its logprobs; what it returned has no gradient")
        checks.look(checks.finite("the loss per token", losses, NonFiniteLoss))
        (slope,) = torch.autograd.grad(losses.sum(), logprobs)
    return losses.detach().sum(), slope
