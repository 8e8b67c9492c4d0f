"""Sums of two numbers: a task whose answers can be checked, and a tiny model that fails on some kinds of them.

The kinds differ in where a digit is carried. The base model saw hardly any sum in which the units carry, so on these it
is mostly wrong, but not always: the bad cases of the documented SFT, from which groups of samples still learn.
The package holds it; `python book/tools/make_base_model.py` trains it again.
"""

import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from mini_impl import checks
from mini_impl.finetuning.language_model import LanguageModel, load_language_model

BASE_MODEL = Path(__file__).parents[1] / "assets" / "base_model.safetensors"


class Tokenizer:
    """A token for each character of a sum, and one that ends it: ids 0 to 9 are the digits."""

    characters = "0123456789+="
    eos_token_id = len(characters)
    vocab_size = len(characters) + 1

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises TypeError for no text, ValueError for a character that there is no token for."""
        checks.instance("text", text, str, "a string")
        if unknown := sorted(set(text) - set(self.characters)):
            raise ValueError(f"text must be made of {self.characters!r}; got {''.join(unknown)!r} in {text!r}")
        return [self.characters.index(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, up to the first eos_token_id. Raises TypeError, ValueError for an id that is none."""
        ids = [checks.integer("a token id", token, least=0, most=self.eos_token_id) for token in ids]
        ids = ids[: ids.index(self.eos_token_id)] if self.eos_token_id in ids else ids
        return "".join(self.characters[token] for token in ids)


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
MAX_NEW_TOKENS = 6  # room for an answer, three digits and eos_token_id, and for one that is too long


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


def question(problem: Problem) -> list[int]:
    """The ids of the prompt."""
    return Tokenizer().encode(problem.prompt)


def answer(problem: Problem) -> list[int]:
    """The ids of the right answer, and eos_token_id."""
    return [*Tokenizer().encode(problem.answer), Tokenizer.eos_token_id]


def reward(problem: Problem, text: str) -> float:
    """1.0 if the text is the answer and nothing else, else 0.0.

    The documented methods ask a reward *model*; where the answer can be checked, a rule says the same without error.
    Raises TypeError for no text.
    """
    checks.instance("text", text, str, "a string")
    return float(text == problem.answer)


# --- the base model ---------------------------------------------------------------------------------------------------


def base_model() -> LanguageModel:
    """The stored base model, in eval mode."""
    return load_language_model(BASE_MODEL)
