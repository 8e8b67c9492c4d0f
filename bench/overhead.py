"""What checking costs: a call of GRPO's published loss beside its bare formula: python -m bench.overhead.

On one thread, as threads would only add noise to so little work; both take turns, and the least of many turns counts.
"""

import json

import torch
from torch import Tensor

from bench.measuring import milliseconds
from mini_impl.finetuning.grpo import published_loss

SEQUENCES, TOKENS, CALLS, TURNS = 64, 64, 300, 30


def bare(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, ref: Tensor | None, kl_weight: float
) -> Tensor:
    """The formula, as one would write it in a hurry."""
    ratio, scores = (logprobs - old).exp(), advantages[:, None]
    loss = -torch.minimum(ratio * scores, ratio.clamp(0.8, 1.2) * scores)
    if ref is not None:
        difference = ref - logprobs
        loss = loss + kl_weight * (difference.exp() - difference - 1)
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def measure() -> dict:
    """Microseconds a call, forward only, with the KL term and without; ours as a multiple of the formula."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(SEQUENCES, TOKENS, generator=generator) - 0.1
    logprobs = (old + 0.05 * torch.randn(old.shape, generator=generator)).clamp(max=-1e-3).requires_grad_()
    advantages, mask = torch.randn(SEQUENCES, generator=generator), torch.ones(SEQUENCES, TOKENS, dtype=torch.bool)
    result = {}
    for name, ref, weight in (("without KL", None, 0.0), ("with KL", old - 0.01, 0.04)):
        calls = {
            "ours": lambda ref=ref, w=weight: published_loss(logprobs, old, advantages, mask, ref, kl_weight=w).total,
            "formula": lambda ref=ref, w=weight: bare(logprobs, old, advantages, mask, ref, w),
        }
        ours, formula = (call().item() for call in calls.values())
        assert abs(ours - formula) < 1e-6, (ours, formula)
        times = {key: [] for key in calls}
        for _ in range(TURNS):
            for key, call in calls.items():
                times[key].append(milliseconds(call, CALLS) * 1e3)
        least = {key: min(values) for key, values in times.items()}
        result[name] = {"microseconds": least, "ratio": least["ours"] / least["formula"]}
    torch.set_num_threads(threads)
    return {"what": f"grpo.published_loss, {SEQUENCES} x {TOKENS}, float32, one thread", **result}


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
