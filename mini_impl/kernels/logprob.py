"""log p of the chosen tokens from logits, without a second table of them: one pass forward, one backward.

    log p(token) = x_token / T - log sum_v e^(x_v / T)

PyTorch writes log p of every token of the vocabulary to keep one of them, and a second table as large for the gradient.
The kernel reads a row of logits once, a block at a time, and keeps two numbers of it: the largest logit so far, and the
sum of e^(x_v / T) relative to it, which is scaled whenever a larger one comes (an online log-sum-exp). From these two
the backward pass makes every probability again, and writes the gradient alone.
Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks
from mini_impl.kernels import wanted
from mini_impl.kernels.roofline import Traffic

LEAST = 2**20  # logits from which on the kernel is chosen
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# --- as torch computes it ---------------------------------------------------------------------------------------------


def token_logprobs_torch(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """token_logprobs in PyTorch's operations."""
    scaled = logits.to(_wide(logits)) / temperature  # [.., vocabulary]
    flat = scaled.reshape(-1, logits.shape[-1])
    return -F.cross_entropy(flat, tokens.reshape(-1).long(), reduction="none").view(tokens.shape)


def _wide(logits: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# --- the kernels ------------------------------------------------------------------------------------------------------


@cache
def kernels():
    """The kernels (forward, backward), one program a row. Triton is imported here, and so only where it is used."""
    global tl  # Triton looks for its language among the module's names
    import triton
    import triton.language as tl

    @triton.jit
    def logprob_kernel(
        logits,  # [outer, inner, vocabulary], a row of which is of stride 1; the other strides follow
        tokens,  # [row], row = outer x inner
        logprobs,  # out: [row]
        peaks,  # out: the largest logit / temperature, [row]
        sums,  # out: log sum of e^(logit / temperature - peak), [row]
        outer_step,
        inner_step,
        tokens_step,
        inner,
        vocabulary,
        temperature: tl.float64,
        WIDE: tl.constexpr,  # the dtype to compute in
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row // inner * outer_step + row % inner * inner_step
        scale = tl.full((), temperature, WIDE)
        columns = tl.arange(0, BLOCK)
        peak = tl.full((), float("-inf"), WIDE)
        total = tl.full((), 0.0, WIDE)
        for start in range(0, vocabulary, BLOCK):
            column = start + columns
            x = tl.load(logits + column, mask=column < vocabulary, other=float("-inf")).to(WIDE) / scale
            higher = tl.maximum(peak, tl.max(x, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf would be NaN before the first number
            total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base), 0)
            peak = higher
        token = tl.load(tokens + row * tokens_step).to(tl.int64)
        known = (token >= 0) & (token < vocabulary)
        chosen = tl.load(logits + token, mask=known, other=float("nan")).to(WIDE) / scale
        log_sum = tl.log(total)
        tl.store(logprobs + row, chosen - peak - log_sum)
        tl.store(peaks + row, peak)
        tl.store(sums + row, log_sum)

    @triton.jit
    def logprob_backward_kernel(
        logits,
        tokens,
        peaks,
        sums,
        upstream,  # d loss / d logprobs, [row]
        gradient,  # out: d loss / d logits, [row, vocabulary], contiguous
        outer_step,
        inner_step,
        tokens_step,
        upstream_step,
        inner,
        vocabulary,
        temperature: tl.float64,
        WIDE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        logits += row // inner * outer_step + row % inner * inner_step
        gradient += row * vocabulary
        scale = tl.full((), temperature, WIDE)
        columns = tl.arange(0, BLOCK)
        token = tl.load(tokens + row * tokens_step).to(tl.int64)
        slope = tl.load(upstream + row * upstream_step) / scale
        peak, log_sum = tl.load(peaks + row), tl.load(sums + row)
        for start in range(0, vocabulary, BLOCK):
            column = start + columns
            inside = column < vocabulary
            x = tl.load(logits + column, mask=inside, other=0.0).to(WIDE) / scale
            probability = tl.exp(x - peak - log_sum)
            pull = slope * (tl.where(column == token, 1.0, 0.0) - probability)
            tl.store(gradient + column, pull, mask=inside)

    return logprob_kernel, logprob_backward_kernel


BLOCK = 4096  # logits that a program handles at a time, at most


class _TokenLogprobs(torch.autograd.Function):
    """token_logprobs of logits [outer, inner, vocabulary], rows of stride 1, and tokens [row], by the kernels."""

    @staticmethod
    def forward(ctx, logits, tokens, temperature):
        forward, _ = kernels()
        rows, wide = len(tokens), _wide(logits)
        logprobs, peaks, sums = (logits.new_empty(rows, dtype=wide) for _ in range(3))
        ctx.how = {
            "temperature": temperature,
            "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
            "BLOCK": min(BLOCK, 2 ** (logits.shape[-1] - 1).bit_length()),
            "num_warps": 8,
        }
        if rows:
            sizes = *logits.stride()[:2], tokens.stride(0), *logits.shape[1:]
            with torch.cuda.device_of(logits):
                forward[rows,](logits, tokens, logprobs, peaks, sums, *sizes, **ctx.how)
        ctx.save_for_backward(logits, tokens, peaks, sums)
        return logprobs

    @staticmethod
    def backward(ctx, upstream):  # d loss / d logprobs, [row]
        if torch.is_grad_enabled():
            raise RuntimeError("token_logprobs has no second derivative (create_graph=True): use token_logprobs_torch")
        _, backward = kernels()
        logits, tokens, peaks, sums = ctx.saved_tensors
        gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if len(tokens):
            sizes = *logits.stride()[:2], tokens.stride(0), upstream.stride(0), *logits.shape[1:]
            with torch.cuda.device_of(logits):
                backward[len(tokens),](logits, tokens, peaks, sums, upstream, gradient, *sizes, **ctx.how)
        return gradient, None, None


# --- the choice -------------------------------------------------------------------------------------------------------


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token) = logit of the token / T - log sum exp of all logits / T, at every place, by the kernel or by torch.

    logits: [.., vocabulary], float16, bfloat16, float32 or float64, of any strides; a copy is made only if the
    vocabulary is not the last in memory. tokens: ids [..] of any integer dtype. temperature: T, above 0.
    Returns [..], in nats, at most 0, float64 for float64, else float32, computed in that. No places give an empty
    result. A token whose logit is -inf has -inf; a row with NaN, +inf, or nothing but -inf has NaN.
    Only logits carry a gradient: (onehot - p) / T, of their dtype. There is no second derivative.
    Numbers are not checked, as the host would wait for them: of an id that is none comes NaN by the kernel, and by
    torch what its device does (IndexError on the CPU). Raises TypeError, ValueError for what does not fit;
    RuntimeError for a second derivative.
    """
    _check(logits, tokens, temperature)
    temperature = float(temperature)
    if not wanted(logits, LEAST):
        return token_logprobs_torch(logits, tokens, temperature)
    rows = logits[(None,) * max(0, 3 - logits.ndim)].flatten(0, -3)  # [outer, inner, vocabulary], a view if it can be
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return _TokenLogprobs.apply(rows, tokens.reshape(-1), temperature).view(tokens.shape)


def token_logprobs_as_torch(logits: Tensor, tokens: Tensor) -> Tensor:
    """token_logprobs in the dtype that torch's cross_entropy has: that of the logits, and float32 under autocast."""
    logprobs = token_logprobs(logits, tokens)
    return logprobs if torch.is_autocast_enabled(logits.device.type) else logprobs.to(logits.dtype)


def _check(logits, tokens, temperature) -> None:
    """Raise unless the arguments are those that token_logprobs takes."""
    for name, value in {"logits": logits, "tokens": tokens}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"logits must be of {', '.join(map(str, DTYPES))}; got {logits.dtype}")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits must be [.., vocabulary], with a vocabulary; got shape {list(logits.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be ids, whole numbers; got {tokens.dtype}")
    if tokens.shape != logits.shape[:-1]:
        places = list(logits.shape[:-1])
        raise ValueError(f"tokens must have the leading axes of logits, {places}; got {list(tokens.shape)}")
    if tokens.device != logits.device:
        raise ValueError(f"tokens must be on the device of logits, {logits.device}; got {tokens.device}")
    checks.positive(temperature=temperature)


def traffic(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Traffic, Traffic]:
    """What the kernel moves with tokens of int64, forward and backward, by formula.

    Forward: logits and token of a row are read, and the logit of the token once more; three numbers are written.
    Backward: logits, the token and three numbers are read, the gradient is written.
    """
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)
    table = rows * vocabulary
    forward = Traffic(
        read=table * size + rows * (8 + size),
        written=rows * 3 * wide,
        operations=table * 5 + rows * 4,  # by T, the largest, x - peak, exp, sum
        launches=1,
    )
    backward = Traffic(
        read=table * size + rows * (8 + 3 * wide),
        written=table * size,
        operations=table * 6 + rows,  # by T, twice -, exp, onehot - p, slope x
        launches=1,
    )
    return forward, backward
