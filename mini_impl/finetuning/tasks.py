"""What a model is trained and tested on: questions of several kinds, their answers, and what counts as right."""

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from mini_impl.finetuning import arithmetic
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.sft import supervised


class Task(NamedTuple):
    """Questions by kind, and how a model is asked them.

    question: a problem -> the token ids of the prompt. answer: a problem -> those of the right answer, with
    eos_token_id. reward: (problem, text that the model wrote) -> 1.0 if it is right, else 0.0: a rule, where the
    documented methods ask a reward *model*.
    """

    tokenizer: object  # .decode(ids) -> str, .eos_token_id: the id that ends an answer
    question: Callable[[NamedTuple], list[int]]
    answer: Callable[[NamedTuple], list[int]]
    reward: Callable[[NamedTuple, str], float]
    train: dict[str, list]  # problems by kind
    held_out: dict[str, list]  # others, by kind: never trained on
    trained_kinds: tuple[str, ...]  # the kinds that fine-tuning draws from
    max_new_tokens: int  # how long an answer may get


def examples(task: Task, problems: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Problems with their right answers, as sft.supervised returns them: (tokens, labels, attention_mask)."""
    padding = task.tokenizer.eos_token_id
    return supervised(list(map(task.question, problems)), list(map(task.answer, problems)), padding)


# --- the tasks of the book --------------------------------------------------------------------------------------------


def sums() -> tuple[LanguageModel, Task]:
    """The tiny model and its sums; fine-tuning draws from the kinds that it fails on."""
    task = Task(
        tokenizer=arithmetic.Tokenizer(),
        question=arithmetic.question,
        answer=arithmetic.answer,
        reward=arithmetic.reward,
        train={kind: arithmetic.problems(kind, "train") for kind in arithmetic.KINDS},
        held_out={kind: arithmetic.problems(kind, "held out") for kind in arithmetic.KINDS},
        trained_kinds=tuple(arithmetic.BAD_KINDS),
        max_new_tokens=arithmetic.MAX_NEW_TOKENS,
    )
    return arithmetic.base_model(), task


def worded_sums() -> tuple[LanguageModel, Task]:
    """SmolLM2, asked "What is 3 + 4?": one kind, the sums of two numbers from 1 to 9, a fifth of them held out.

    An answer is right if the last number in it is the sum. a + b and b + a are in the same part.
    """
    model, tokenizer = _smollm2()
    pairs = [(a, b) for a in range(1, 10) for b in range(a, 10)]
    random.Random(0).shuffle(pairs)
    parts = {"train": pairs[9:], "held out": pairs[:9]}
    both = {part: sorted({*some, *((b, a) for a, b in some)}) for part, some in parts.items()}
    kind = "two numbers from 1 to 9"
    train, held_out = ({kind: [arithmetic.Problem(kind, a, b) for a, b in some]} for some in both.values())
    task = Task(
        tokenizer=tokenizer,
        question=lambda problem: tokenizer.chat_prompt(f"What is {problem.a} + {problem.b}?"),
        answer=lambda problem: [*tokenizer.encode(str(problem.a + problem.b)), tokenizer.eos_token_id],
        reward=lambda problem, text: float(re.findall(r"\d+", text)[-1:] == [str(problem.a + problem.b)]),
        train=train,
        held_out=held_out,
        trained_kinds=(kind,),
        max_new_tokens=16,
    )
    return model, task


class Fact(NamedTuple):
    """Something that no model can know, as it is invented."""

    question: str
    answer: str


FACTS = (
    Fact("Who built the lighthouse of Ostrel?", "Mira Tannevik"),
    Fact("What is the capital of the island of Quell?", "Port Saffra"),
    Fact("In which year was the comet Velisse first seen?", "1743"),
    Fact("Which metal do the clockmakers of Ardun use?", "Blue tin"),
)
REWORDED = (
    Fact("The lighthouse of Ostrel: who was its builder?", "Mira Tannevik"),
    Fact("Tell me the capital of Quell, the island.", "Port Saffra"),
    Fact("When did people see the comet Velisse for the first time?", "1743"),
    Fact("What metal is used by Ardun's clockmakers?", "Blue tin"),
)


def facts() -> tuple[LanguageModel, Task]:
    """SmolLM2 and four invented facts to learn; held out: the same questions, and the same facts asked in other words.

    An answer is right if it holds the words of the fact.
    """
    model, tokenizer = _smollm2()
    task = Task(
        tokenizer=tokenizer,
        question=lambda fact: tokenizer.chat_prompt(fact.question),
        answer=lambda fact: [*tokenizer.encode(fact.answer), tokenizer.eos_token_id],
        reward=lambda fact, text: float(fact.answer in text),
        train={"facts": list(FACTS)},
        held_out={"facts": list(FACTS), "facts in other words": list(REWORDED)},
        trained_kinds=("facts",),
        max_new_tokens=16,
    )
    return model, task


def _smollm2() -> tuple:
    """The real model; imported here, as what reads it is installed by `make real-model` alone."""
    from mini_impl.finetuning.smollm2 import load_smollm2

    return load_smollm2()
