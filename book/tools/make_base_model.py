"""Make base_model.safetensors, the tiny model that fails on some sums: python book/tools/make_base_model.py

To the same bits on the same machine, torch and number of threads.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from mini_impl import checks
from mini_impl.finetuning.arithmetic import BASE_MODEL, KINDS, Problem, Tokenizer, answer, problems, question
from mini_impl.finetuning.language_model import LanguageModel, save_language_model
from mini_impl.finetuning.sft import supervised
from mini_impl.losses import NonFiniteLoss

# How much of its training each kind is: so little of the bad ones that it learns them badly.
SHARES = {"one digit": 0.36, "no carry": 0.308, "tens carry": 0.308, "units carry": 0.012, "both carry": 0.012}


def train_base_model(
    steps: int = 900,
    batch: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    shares: dict[str, float] = SHARES,
    answer: Callable[[Problem], list[int]] = answer,
) -> LanguageModel:
    """Train a base model on the training part of all kinds.

    steps: of AdamW; its learning rate falls to 0 in a straight line. batch: sums a step. shares: how much of the
    training each kind is. answer: a problem -> the token ids of its right answer. Returns the model in eval mode.
    Raises TypeError, ValueError.
    """
    checks.integers(steps=steps, batch=batch)
    checks.integers(least=0, seed=seed)
    checks.positive(learning_rate=learning_rate)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LanguageModel(Tokenizer.vocab_size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6.25 if parameter.ndim == 2 else 1)  # so narrow a model learns faster from a wider start
        some = [problem for kind in KINDS for problem in problems(kind)]
        tokens, labels, _ = supervised(list(map(question, some)), list(map(answer, some)), Tokenizer.eos_token_id)
        chances = torch.tensor([shares[problem.kind] / len(problems(problem.kind)) for problem in some])
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
        for step in range(steps):
            drawn = torch.multinomial(chances, batch, replacement=True)
            # Padding comes last here, so nothing that counts sees it, and the model need not be told of it.
            loss = F.cross_entropy(model(tokens[drawn]).flatten(0, 1), labels[drawn].flatten())
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: LanguageModel, some: Sequence[Problem]) -> tuple[float, float]:
    """How often a model is right on problems: (with its most likely answers, with answers sampled at temperature 1).

    Exact, from the probability of the right answer: the model reads it instead of sampling one. Raises NonFiniteLoss.
    """
    batch = supervised(list(map(question, some)), list(map(answer, some)), Tokenizer.eos_token_id)
    tokens, labels, _ = (part.to(model.embedding.weight.device) for part in batch)  # each [problem, time]
    logprobs = model(tokens).log_softmax(-1)  # [problem, time, vocab_size]
    checks.look(checks.finite("log-probabilities of the answers", logprobs, NonFiniteLoss))
    counts = labels >= 0
    best = (logprobs.argmax(-1) == labels) | ~counts
    right = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(counts, 0).sum(1).exp()
    return best.all(1).double().mean().item(), right.double().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=BASE_MODEL, help="file to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="of training (default: %(default)s)")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    model = train_base_model(options.steps)
    save_language_model(model, options.out)
    print(f"{options.out}: trained in {time.perf_counter() - start:.0f} s; right on held-out problems")
    for kind in KINDS:
        best, sampled = accuracy(model, problems(kind, "held out"))
        print(f"  {kind:12} {best:.2f} greedily, {sampled:.2f} sampled")


if __name__ == "__main__":
    main()
