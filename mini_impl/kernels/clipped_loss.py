"""The clipped loss of GRPO and DAPO in one kernel: ratio, clip, mask, mean, and its slope.

    L = sum of weight x -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = e^(logprobs - old_logprobs)

PyTorch writes a table [sequence, token] for each of these signs, and in the backward pass two for some. The kernel
reads logprobs, old_logprobs and mask, and writes one table: d L / d logprobs, known as soon as rho is. The backward
pass only scales it.
Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017; the weights: GRPO, DAPO, Dr. GRPO.
"""

from functools import cache

import torch
from torch import Tensor

from mini_impl import checks
from mini_impl.kernels import wanted
from mini_impl.kernels.roofline import Traffic

LEAST = 2**12  # tokens from which on the kernel is chosen
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("sequence", "token", "length")


# --- as torch computes it ---------------------------------------------------------------------------------------------


def clipped_loss_torch(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reduce_by: str = "sequence",
    max_length: int | None = None,
) -> Tensor:
    """clipped_loss in PyTorch's operations, one after the other."""
    logprobs, old_logprobs, advantages = (_wide(x) for x in (logprobs, old_logprobs.detach(), advantages.detach()))
    kept = mask.bool()  # [sequence, token]
    ratio = (logprobs - old_logprobs).where(kept, 0).exp()
    advantages = advantages[:, None]  # [sequence, 1]
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if reduce_by == "sequence":
        count = len(kept) * kept.sum(1, keepdim=True).clamp(min=1)
    else:
        count = kept.sum().clamp(min=1) if reduce_by == "token" else len(kept) * max_length
    return (losses.where(kept, 0) / count).sum()


def _wide(value: Tensor) -> Tensor:
    """Numbers of 16 bits as float32."""
    return value if value.dtype == torch.float64 else value.float()


# --- the kernel -------------------------------------------------------------------------------------------------------


@cache
def kernel():
    """One program a sequence. Triton is imported here, and so only where it is used."""
    global tl  # Triton looks for its language among the module's names
    import triton
    import triton.language as tl

    @triton.jit
    def clipped_loss_kernel(
        logprobs,  # [sequence, token], as old_logprobs and mask; their strides follow
        old_logprobs,
        advantages,  # [sequence]
        mask,
        all_tokens,  # how many the mask counts, [], for the mean by token
        slopes,  # out: d L / d logprobs, [sequence, token], contiguous
        losses,  # out: what a sequence adds to L, [sequence]
        logprobs_row,
        logprobs_column,
        old_row,
        old_column,
        advantages_step,
        mask_row,
        mask_column,
        tokens,
        max_length,
        REDUCE_BY: tl.constexpr,
        LOW: tl.constexpr,  # 1 - clip_low
        HIGH: tl.constexpr,  # 1 + clip_high
        WITH_SLOPES: tl.constexpr,
        WIDE: tl.constexpr,  # the dtype to compute in
        BLOCK: tl.constexpr,
    ):
        sequence = tl.program_id(0).to(tl.int64)
        places = tl.arange(0, BLOCK).to(tl.int64)
        logprobs += sequence * logprobs_row
        old_logprobs += sequence * old_row
        mask += sequence * mask_row
        slopes += sequence * tokens

        if REDUCE_BY == "sequence":
            counts = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, tokens, BLOCK):
                place = start + places
                counts += (tl.load(mask + place * mask_column, mask=place < tokens, other=0) != 0).to(tl.int32)
            count = tl.num_programs(0).to(tl.int64) * tl.maximum(tl.sum(counts, 0), 1)
        elif REDUCE_BY == "token":
            count = tl.maximum(tl.load(all_tokens), 1)
        else:
            count = tl.num_programs(0).to(tl.int64) * max_length
        weight = 1.0 / count.to(WIDE)

        advantage = tl.load(advantages + sequence * advantages_step).to(WIDE)
        low, high = tl.full((), LOW, WIDE), tl.full((), HIGH, WIDE)
        sums = tl.zeros((BLOCK,), WIDE)
        for start in range(0, tokens, BLOCK):
            place = start + places
            kept = tl.load(mask + place * mask_column, mask=place < tokens, other=0) != 0
            new = tl.load(logprobs + place * logprobs_column, mask=kept, other=0).to(WIDE)
            old = tl.load(old_logprobs + place * old_column, mask=kept, other=0).to(WIDE)
            ratio = tl.exp(new - old)
            plain = ratio * advantage
            clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
            sums += tl.where(kept, tl.where(clipped < plain, -clipped, -plain), 0.0)  # NaN stays NaN
            if WITH_SLOPES:  # as torch has it: of two products that rounding makes equal each gets half of it
                outside = (ratio < low) | (ratio > high)
                share = tl.where(clipped < plain, 0.0, tl.where(outside & (clipped == plain), 0.5, 1.0))
                slope = -share * plain * weight
                tl.store(slopes + place, tl.where(kept, slope, 0.0), mask=place < tokens)
        tl.store(losses + sequence, tl.sum(sums, 0) * weight)

    return clipped_loss_kernel


BLOCK = 1024  # tokens that a program handles at a time, at most


class _ClippedLoss(torch.autograd.Function):
    """clipped_loss by the kernel."""

    @staticmethod
    def forward(ctx, logprobs, old_logprobs, advantages, mask, clip_low, clip_high, reduce_by, max_length):
        sequences, tokens = logprobs.shape
        wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
        losses = logprobs.new_empty(sequences, dtype=wide)
        slopes = torch.empty(logprobs.shape, dtype=wide, device=logprobs.device) if ctx.needs_input_grad[0] else None
        all_tokens = mask.sum(dtype=torch.int64) if reduce_by == "token" else None
        with torch.cuda.device_of(logprobs):
            kernel()[sequences,](
                logprobs,
                old_logprobs,
                advantages,
                mask,
                losses if all_tokens is None else all_tokens,
                losses if slopes is None else slopes,
                losses,
                *logprobs.stride(),
                *old_logprobs.stride(),
                *advantages.stride(),
                *mask.stride(),
                tokens,
                max_length or 0,
                REDUCE_BY=reduce_by,
                LOW=1 - clip_low,
                HIGH=1 + clip_high,
                WITH_SLOPES=slopes is not None,
                WIDE=tl.float64 if wide == torch.float64 else tl.float32,
                BLOCK=min(BLOCK, 2 ** (tokens - 1).bit_length()),
            )
        ctx.save_for_backward(slopes)
        ctx.dtype = logprobs.dtype
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):  # d loss / d L, []
        if torch.is_grad_enabled():
            raise RuntimeError("clipped_loss has no second derivative (create_graph=True): use clipped_loss_torch")
        (slopes,) = ctx.saved_tensors
        return ((slopes * upstream).to(ctx.dtype), *[None] * 7)


# --- the choice -------------------------------------------------------------------------------------------------------


def clipped_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    reduce_by: str = "sequence",
    max_length: int | None = None,
) -> Tensor:
    """L = sum of weight x -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), by the kernel or by torch.

    logprobs, old_logprobs: log pi, log pi_old of the tokens, [sequence, token], float16, bfloat16, float32 or float64;
    any two logarithms will do, of any strides. advantages: A, [sequence], of their dtype. mask: [sequence, token], bool
    or 0 and 1 of any dtype; what stands where it is 0 is not used. reduce_by: the weight of a token, "sequence": 1 /
    (sequences x tokens of its sequence), "token": 1 / all tokens, "length": 1 / (sequences x max_length).
    Returns a scalar, float64 for float64, else float32, computed in that. A sequence without a token adds 0.
    Only logprobs carry a gradient: -rho A weight, and 0 where the clip holds; at its very edge, as in torch, it does
    not hold yet. There is no second derivative. Numbers are not checked, as the host would wait for them: of NaN
    comes NaN. Raises TypeError, ValueError for what does not fit; RuntimeError for a second derivative.
    """
    _check(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, reduce_by, max_length)
    given = (logprobs, old_logprobs, advantages, mask, float(clip_low), float(clip_high), reduce_by, max_length)
    if not wanted(logprobs, LEAST):
        return clipped_loss_torch(*given)
    if not torch.is_grad_enabled():
        given = (logprobs.detach(), *given[1:])  # then no slope is written
    return _ClippedLoss.apply(*given)


def clipped_loss_as_torch(
    log_ratio: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    reduce_by: str,
    max_length: int | None,
) -> Tensor:
    """clipped_loss of logprobs - old_logprobs [sequence, token], in that dtype, or float32 in autocast, as torch."""
    nothing = log_ratio.new_zeros(()).expand_as(log_ratio)  # one number, at every place
    loss = clipped_loss(log_ratio, nothing, advantages, mask, clip_low, clip_high, reduce_by, max_length)
    return loss if torch.is_autocast_enabled(log_ratio.device.type) else loss.to(log_ratio.dtype)


def _check(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, reduce_by, max_length) -> None:
    """Raise unless the arguments are those that clipped_loss takes."""
    floats = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages}
    for name, value in {**floats, "mask": mask}.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(value).__name__}")
    if logprobs.dtype not in DTYPES:
        raise TypeError(f"logprobs must be of {', '.join(map(str, DTYPES))}; got {logprobs.dtype}")
    if logprobs.ndim != 2 or not logprobs.numel():
        raise ValueError(f"logprobs must be [sequence, token], no axis empty; got shape {list(logprobs.shape)}")
    for name, value in {**floats, "mask": mask}.items():
        shape = logprobs.shape[:1] if name == "advantages" else logprobs.shape
        if value.shape != shape:
            raise ValueError(f"{name} must have the shape {list(shape)}, to fit logprobs; got {list(value.shape)}")
        if name != "mask" and value.dtype != logprobs.dtype:
            raise TypeError(f"{name} must have the dtype of logprobs, {logprobs.dtype}; got {value.dtype}")
        if value.device != logprobs.device:
            raise ValueError(f"{name} must be on the device of logprobs, {logprobs.device}; got {value.device}")
    checks.not_negative(clip_low=clip_low, clip_high=clip_high)
    checks.choice("reduce_by", reduce_by, REDUCTIONS)
    if (reduce_by == "length") != (max_length is not None):
        wanted = "max_length, the most tokens of an answer, is for reduce_by='length', and for that alone"
        raise ValueError(f"{wanted}; got reduce_by={reduce_by!r} and max_length={max_length!r}")
    if max_length is not None and logprobs.shape[1] > checks.integer("max_length", max_length):
        raise ValueError(f"max_length must be at least {logprobs.shape[1]}, the tokens of a row; got {max_length}")


def traffic(
    sequences: int, tokens: int, dtype: torch.dtype = torch.float32, reduce_by: str = "sequence"
) -> tuple[Traffic, Traffic]:
    """What the kernel moves with a mask of bool, forward and backward, by formula.

    Forward: logprobs, old_logprobs and mask of a token are read and its slope is written. Where the mask is 0, the
    first two are not read: so it is the most. The mask is read twice, the second time from the cache, but by token.
    Backward: slopes are read, gradients are written.
    """
    size, wide = dtype.itemsize, max(dtype.itemsize, 4)
    table = sequences * tokens
    kernel = Traffic(
        read=table * (2 * size + 1) + sequences * size,
        written=(table + sequences) * wide,
        operations=table * 14,  # of the ratio 2, the loss 6, its sum 1, the slope 5
        launches=1,
    )
    total = Traffic(read=sequences * wide, written=wide, operations=sequences, launches=1)  # losses.sum()
    count = Traffic(read=table, written=8, operations=0, launches=1)
    kernel = kernel + Traffic(8, 0, 0, 0) + count if reduce_by == "token" else kernel
    scale = Traffic(read=(table + 1) * wide, written=table * wide, operations=table, launches=1)
    cast = Traffic(read=table * wide, written=table * size, operations=0, launches=1)
    return kernel + total, scale + cast if size < wide else scale
