"""Tokens a second of `generate` beside transformers' own, on the tiny model with a batch of 64.

Both sample at temperature 1, with a cache, from the same weights; they take turns. Ours records the
log-probabilities besides, transformers' does not. python -m bench.generation prints it.
"""

import json
import random
import statistics
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from bench.measuring import PROCESSES, THREADS, apart, milliseconds, spread
from bench.weights import llama_of as peer
from mini_impl.finetuning.arithmetic import BAD_KINDS, Tokenizer, base_model, problems
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.sampling import generate

BATCH, ROUNDS = 64, 6  # rounds in a process
STOP = Tokenizer.eos_token_id


def ours(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> Callable[[int], int]:
    """A turn: sample once with a seed, return how many tokens came out, up to and with the stop token."""
    return lambda seed: int(generate(model, prompts, max_new_tokens, STOP, seed=seed).mask.sum())


def theirs(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> Callable[[int], int]:
    llama, time = peer(model, STOP), max(map(len, prompts))
    tokens = torch.tensor([[STOP] * (time - len(ids)) + ids for ids in prompts])
    attention_mask = torch.tensor([[0] * (time - len(ids)) + [1] * len(ids) for ids in prompts])

    @torch.inference_mode()
    def turn(seed: int) -> int:
        torch.manual_seed(seed)
        whole = llama.generate(
            tokens,
            attention_mask=attention_mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=max_new_tokens,
            use_cache=True,
        )
        new = whole[:, time:]
        return int(((new == STOP).cumsum(1) - (new == STOP).long() == 0).sum())

    return turn


def cases() -> dict[str, tuple[LanguageModel, list[list[int]], int]]:
    """What is sampled: {description: (model, prompts, max_new_tokens)}."""
    source, tokenizer = random.Random(0), Tokenizer()
    some = source.sample([problem for kind in BAD_KINDS for problem in problems(kind)], BATCH)
    prompts = [tokenizer.encode(problem.prompt) for problem in some]
    torch.manual_seed(0)
    untrained = LanguageModel(tokenizer.vocab_size).eval()  # it stops by chance, with 1 token in 13
    return {
        "8 sums, 8 answers each": (base_model(), [ids for ids in prompts[: BATCH // 8] for _ in range(8)], 6),
        "64 sums": (base_model(), prompts, 6),
        "64 prompts, untrained, up to 64 tokens": (untrained, prompts, 64),
    }


def measure_speeds() -> dict[str, dict[str, float]]:
    """Tokens a second of both in each case, the median of turns."""
    return {description: compare(*case) for description, case in cases().items()}


def compare(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> dict[str, float]:
    turns = {"ours": ours(model, prompts, max_new_tokens), "transformers": theirs(model, prompts, max_new_tokens)}
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for seed in range(-2, ROUNDS):
        for name, turn in turns.items():
            start = time.perf_counter()
            tokens = turn(abs(seed))
            if seed >= 0:  # the first ones warm up
                speeds[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def products(model: LanguageModel) -> float:
    """Milliseconds of the matrix products of one step of the batch: what no such code can go below.

    Those of the layers, with one input side by side, of attention over 16 tokens, and of the head.
    """
    sizes, weight = model.settings, model.embedding.weight.detach()
    width, hidden, head_dim = sizes["width"], sizes["feed_forward_width"], model.blocks[0].attention.head_dim
    shared, keys = sizes["key_value_heads"], 16
    inputs, wide = torch.randn(BATCH, width), torch.randn(BATCH, hidden)
    matrices = [torch.randn(width, columns) for columns in (width + 2 * shared * head_dim, width, 2 * hidden)]
    down, head = torch.randn(hidden, width), weight.T.contiguous()
    queries = torch.randn(BATCH * shared, sizes["heads"] // shared, head_dim)
    past, scores = torch.randn(BATCH * shared, keys, head_dim), torch.randn(*queries.shape[:2], keys)

    def step() -> None:
        for _ in model.blocks:
            for matrix in matrices:
                torch.mm(inputs, matrix)
            torch.mm(wide, down)
            torch.bmm(queries, past.mT)
            torch.bmm(scores, past)
        torch.mm(inputs, head)

    with torch.inference_mode():
        return min(milliseconds(step, 50) for _ in range(20))


def peer_step(model: LanguageModel, tokens: int = 64) -> float:
    """Milliseconds of one step of transformers' generate, all rows of the batch going on, the best of a few."""
    llama, prompt = peer(model, STOP), torch.zeros(BATCH, 6, dtype=torch.long)
    more = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "eos_token_id": 10**6}  # no token stops
    with torch.inference_mode():
        return min(milliseconds(lambda: llama.generate(prompt, **more), 1) for _ in range(5)) / tokens


def measure() -> dict:
    """Each of the cases with both, and ours as a multiple of transformers'."""
    runs = [apart(measure_speeds) for _ in tqdm(range(PROCESSES), desc="sampling", disable=None)]
    result = {}
    for description in runs[0]:
        speeds = [run[description] for run in runs]
        result[description] = {
            "tokens a second, median": {
                name: round(statistics.median(each[name] for each in speeds)) for name in speeds[0]
            },
            "ratio to transformers": spread([each["ours"] / each["transformers"] for each in speeds]),
        }
    return {
        "what": f"sampling, batch of {BATCH}, temperature 1, {THREADS} threads",
        "milliseconds a step": {
            "matrix products alone": products(base_model()),
            "transformers": peer_step(base_model()),
        },
        "cases": result,
    }


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    print(json.dumps(measure(), indent=1))
