"""How many bytes torch.compile would move for the functions of mini_impl/kernels: book/results/fusion.json.

Each torch function is compiled with its gradient, for the CPU, in float32 or bfloat16, and called once. While it plans,
Inductor, which writes the code, adds up what each of its kernels reads and writes: that sum is kept, by entry of the
input. Nothing is timed. For a GPU it plans by the same rules, but it may join what it keeps apart here, or the reverse.
About three minutes of one core.
"""

from collections.abc import Callable

import torch
from _rows import compute
from torch._inductor import config, metrics

from mini_impl.kernels import clipped_loss, decomposition, logprob

NAME = "fusion"
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def log_probabilities(dtype: torch.dtype) -> tuple[Callable, tuple]:
    logits = torch.randn(64, 32_000).to(dtype).requires_grad_()
    return lambda x, tokens: logprob.token_logprobs_torch(x, tokens, 0.7), (logits, torch.randint(32_000, (64,)))


def parts_of_series(dtype: torch.dtype) -> tuple[Callable, tuple]:
    series = torch.randn(32, 720, 7).to(dtype).requires_grad_()
    return lambda x: decomposition.decompose_torch(x, 25), (series,)


def clipped(reduce_by: str) -> Callable[[torch.dtype], tuple[Callable, tuple]]:
    def made(dtype: torch.dtype) -> tuple[Callable, tuple]:
        new, old = torch.randn(2, 256, 1024).to(dtype)
        most = 1024 if reduce_by == "length" else None

        def loss(new, old, advantages, mask):
            return clipped_loss.clipped_loss_torch(new, old, advantages, mask, 0.2, 0.2, reduce_by, most)

        return loss, (new.requires_grad_(), old, torch.randn(256).to(dtype), torch.rand(256, 1024) > 0.1)

    return made


CASES = {
    "decomposition": parts_of_series,
    "logprob": log_probabilities,
    **{f"clipped_loss by {reduce_by}": clipped(reduce_by) for reduce_by in clipped_loss.REDUCTIONS},
}


def planned(case: str, dtype: str) -> dict:
    """Bytes by entry that the plans move, forward and backward together, and how many kernels they have."""
    config.fx_graph_cache = False  # what was compiled before is not planned again
    torch._logging.set_logs(inductor_metrics=True)  # else nothing is added up
    torch.manual_seed(0)
    function, arguments = CASES[case](DTYPES[dtype])
    metrics.reset()
    results = torch.compile(function, fullgraph=True)(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    entries = arguments[0].numel()
    return {"bytes an entry": metrics.num_bytes_accessed / entries, "kernels": metrics.generated_kernel_count}


def main() -> None:
    compute(NAME, planned, {f"{c}, {d}": {"case": c, "dtype": d} for c in CASES for d in DTYPES}, jobs=1)


if __name__ == "__main__":
    main()
