"""Memory and time of head and loss, plain and chunked, forward and backward: python -m bench.head.

Each variant runs in a process of its own, as the peak of one would hide that of the next (Linux).
"""

import torch

from bench.measuring import THREADS, apart, milliseconds, peak
from mini_impl.finetuning.head import head_logprobs, head_loss
from mini_impl.finetuning.policy import token_logprobs

BATCH, TIME, VOCABULARY, WIDTH, CHUNK = 8, 128, 32000, 576, 128
VARIANTS = {
    "plain": lambda hidden, weight, tokens: -token_logprobs(hidden @ weight.T, tokens).mean(),
    "head_logprobs": lambda hidden, weight, tokens: -head_logprobs(hidden, weight, tokens, chunk=CHUNK).mean(),
    "head_loss": lambda hidden, weight, tokens: head_loss(
        hidden, weight, tokens, lambda logprobs, part: -logprobs / tokens.numel(), chunk=CHUNK
    ),
}
HEADS = ("trained", "frozen")


def measure(turns: int = 5) -> dict:
    """{head: {variant: {"peak, MiB", "seconds", "peak, to plain"}}}; the weight is trained, or frozen (LoRA).

    turns: how many the best time is the best of.
    """
    result = {}
    for head in HEADS:
        measured = {variant: apart(_measure, variant, head, turns) for variant in VARIANTS}
        result[head] = {
            variant: {"peak, MiB": size, "seconds": seconds, "peak, to plain": size / measured["plain"][0]}
            for variant, (size, seconds) in measured.items()
        }
    return result


def _measure(variant: str, head: str, turns: int) -> tuple[float, float]:
    """(MiB that head and loss need at most beside their inputs, gradients included; seconds, the best of some)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, TIME, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).div_(WIDTH**0.5).requires_grad_(head == "trained")
    tokens = torch.randint(VOCABULARY, (BATCH, TIME), generator=generator)
    small = [value.detach()[:9].clone().requires_grad_() for value in (hidden[0], weight)]
    VARIANTS[variant](*small, tokens[0, :9] % 9).backward()  # code and threads are there before it counts

    def step() -> None:
        hidden.grad = weight.grad = None
        VARIANTS[variant](hidden, weight, tokens).backward()

    return peak(step), min(milliseconds(step, 1) for _ in range(turns)) / 1e3


def main() -> None:
    """Print the table."""
    print(f"({BATCH}, {TIME}, {VOCABULARY}), hidden {WIDTH}, float32, {THREADS} threads, forward and backward")
    for head, variants in measure().items():
        for variant, values in variants.items():
            print(
                f"{head:<9}{variant:<15}{values['peak, MiB']:7.0f} MiB  {values['peak, to plain']:5.2f} of plain"
                f"{values['seconds']:8.2f} s"
            )


if __name__ == "__main__":
    main()
