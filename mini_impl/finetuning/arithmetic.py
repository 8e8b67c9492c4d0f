"""Sums of two numbers: a task whose answers can be checked, and a tiny model that fails on some kinds of them.

The kinds differ in where a digit is carried. The base model saw hardly any sum in which the units carry, so on these it
is mostly wrong, but not always: the bad cases of the documented SFT, from which groups of samples still learn.

    python -m mini_impl.finetuning.arithmetic

trains the base model that the package holds again, to the same bits on the same machine, torch and number of threads.
"""

import argparse
import random
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_impl import checks
from mini_impl.finetuning.language_model import LanguageModel, load_language_model, save_language_model
from mini_impl.finetuning.sft import supervised

BASE_MODEL = Path(__file__).parents[1] / "assets" / "base_model.safetensors"


class Tokenizer:
    """A token for each character of a sum, and one to stop: ids 0 to 9 are the digits."""

    characters = "0123456789+="
    stop = len(characters)
    vocabulary = len(characters) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises TypeError for no text, ValueError for a character that there is no token for."""
        if unknown := set(checks.text("text", text)) - set(self.characters):
            raise ValueError(f"text must be made of {self.characters!r}; got {''.join(sorted(unknown))!r} in {text!r}")
        return [self.characters.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, up to the first stop token. Raises ValueError for an id that is none."""
        ids = [checks.integer("a token id", token, least=0, most=self.stop) for token in ids]
        return "".join(self.characters[token] for token in (ids[: ids.index(self.stop)] if self.stop in ids else ids))


class Problem(NamedTuple):
    """a + b, two numbers from 0 to 99; of one of the KINDS."""

    kind: str
    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


# By the columns whose sum is 10 or more; without any, by whether one of the numbers has one digit.
KINDS = ("one digit", "no carry", "tens carry", "units carry", "both carry")
BAD_KINDS = ("units carry", "both carry")  # the base model gets these wrong more often than not
MAX_TOKENS = 6  # room for an answer, three digits and the stop token, and for one that is too long


def kind_of(a: int, b: int) -> str:
    """The kind of a + b, two numbers from 0 to 99."""
    units = a % 10 + b % 10 >= 10
    tens = a // 10 + b // 10 + units >= 10
    if units:
        return "both carry" if tens else "units carry"
    if tens:
        return "tens carry"
    return "one digit" if min(a, b) < 10 else "no carry"


def problems(kind: str, part: str = "train") -> list[Problem]:
    """All problems of a kind in one of two parts that never overlap: "train", or "held out", a fifth of them.

    a + b and b + a are in the same part. Neither the base model nor fine-tuning sees what is held out.
    Raises ValueError for a kind or a part that there is not.
    """
    checks.choice("kind", kind, KINDS)
    checks.choice("part", part, ("train", "held out"))
    return list(_parts()[kind, part])


@lru_cache(maxsize=1)
def _parts() -> dict[tuple[str, str], list[Problem]]:
    """{(kind, part): problems}."""
    parts = {}
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    pairs.sort(key=lambda pair: random.Random(f"{pair}").random())  # the same order with every version of Python
    for kind in KINDS:
        some = [pair for pair in pairs if kind_of(*pair) == kind]
        fifth = len(some) // 5
        for part, chosen in (("held out", some[:fifth]), ("train", some[fifth:])):
            both = sorted({*chosen, *((b, a) for a, b in chosen)})
            parts[kind, part] = [Problem(kind, a, b) for a, b in both]
    return parts


def reward(problem: Problem, text: str) -> float:
    """1.0 if the text is the answer and nothing else, else 0.0."""
    return float(checks.text("text", text) == problem.answer)


def examples(some: Sequence[Problem]) -> tuple[Tensor, Tensor, Tensor]:
    """Problems with their answers, as sft.supervised returns them: (tokens, labels, present), each [problem, time]."""
    tokenizer = Tokenizer()
    prompts = [tokenizer.encode(problem.prompt) for problem in some]
    answers = [[*tokenizer.encode(problem.answer), tokenizer.stop] for problem in some]
    return supervised(prompts, answers, tokenizer.stop)


# --- the base model ---------------------------------------------------------------------------------------------------

# How much of its training each kind is: so little of the bad ones that it learns them badly.
SHARES = {"one digit": 0.36, "no carry": 0.308, "tens carry": 0.308, "units carry": 0.012, "both carry": 0.012}


def base_model() -> LanguageModel:
    """The stored base model, in eval mode."""
    return load_language_model(BASE_MODEL)


def train_base_model(steps: int = 900, batch: int = 128, learning_rate: float = 3e-3, seed: int = 0) -> LanguageModel:
    """Train a base model on the training part of all kinds, as much of each as SHARES says.

    steps: of AdamW; its learning rate falls to 0 in a straight line. batch: sums a step. Returns it in eval mode.
    """
    checks.integer("steps", steps)
    checks.integer("batch", batch)
    checks.number("learning_rate", learning_rate, above=0)
    tokenizer = Tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(checks.integer("seed", seed, least=0))
        model = LanguageModel(tokenizer.vocabulary)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(6.25 if parameter.ndim == 2 else 1)  # so narrow a model learns faster from a wider start
        some = [problem for kind in KINDS for problem in problems(kind)]
        tokens, labels, _ = examples(some)
        chances = torch.tensor([SHARES[problem.kind] / len(problems(problem.kind)) for problem in some])
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

    Exact, from the probability of the right answer: the model reads it instead of sampling one.
    """
    device = model.embedding.weight.device
    tokens, labels, _ = (part.to(device) for part in examples(some))
    logprobs = model(tokens).log_softmax(-1)
    counts = labels >= 0
    best = (logprobs.argmax(-1) == labels) | ~counts
    right = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(counts, 0).sum(1).exp()
    return best.all(1).double().mean().item(), right.double().mean().item()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mini_impl.finetuning.arithmetic", description="Make the base model."
    )
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
