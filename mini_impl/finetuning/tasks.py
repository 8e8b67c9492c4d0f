"""What a model is trained and tested on: questions of several kinds, their answers, and what counts as right."""

import functools
import json
import random
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from mini_impl import checks
from mini_impl.finetuning import arithmetic
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.sft import supervised


class Task(NamedTuple):
    """Questions by kind, and how a model is asked them.

    question: a problem -> the token ids of the prompt. answer: a problem -> those of the right answer, with
    eos_token_id. reward: (problem, text that the model wrote) -> 1.0 if it is right, else 0.0: a rule, where the
    documented methods ask a reward *model*. (Of one's own it may be any number.)
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


# --- a task of one's own ----------------------------------------------------------------------------------------------


def from_file(
    path: Path | str,
    model: str = "tiny",
    reward: Callable[[dict, str], float] | None = None,
    max_new_tokens: int | None = None,
) -> tuple[LanguageModel, Task]:
    """A model, and the questions of a JSON Lines file: on each line {"prompt": text, "answer": text, "kind": text}.

    model: "tiny", which reads digits, + and = alone; "smollm2", which is asked as it was taught (make real-model).
    kind: may be left out. Of each kind a fifth of the prompts, at least one, is held out.
    reward: (the line, what the model wrote) -> number; None: 1 for the answer, white space around it aside, else 0.
    answer: may be left out where there is a reward, for methods that do not learn from right answers.
    max_new_tokens: None: room for the longest answer and its end, or 32 if none is given.
    Raises OSError; TypeError, ValueError, naming the line.
    """
    checks.choice("model", model, MODELS)
    needed = {"prompt", "answer"} if reward is None else {"prompt"}
    kinds: dict[str, dict[str, list[dict]]] = {}  # lines by kind and prompt
    language_model, tokenizer = MODELS[model]()
    answers = []
    # Not splitlines: JSON allows other signs that end a line in a text.
    for number, content in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        if not content.strip():
            continue
        try:
            text = content.decode("utf-8-sig" if number == 1 else "utf-8")
            line = json.loads(text)
        except (ValueError, RecursionError):  # no UTF-8, no JSON, a number of thousands of digits, a thousand brackets
            line, text = None, content.decode("utf-8", "replace")
        texts = [line.get(key, "there is none") for key in KEYS] if isinstance(line, dict) else [None]
        if not all(isinstance(said, str) and said for said in texts) or not needed <= line.keys():
            wanted = " and ".join(f'"{key}": text' for key in sorted(needed, reverse=True))
            wanted = f'wanted an object with {wanted}, and "kind", if there is one, as text'
            raise ValueError(f"{path}, line {number}: {wanted}; got {text[:80]!r}")
        try:
            question_of(tokenizer, line["prompt"])
            answers += [tokenizer.encode(line["answer"])] if "answer" in line else []
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        kinds.setdefault(line.get("kind", "of the file"), {}).setdefault(line["prompt"], []).append(line)
    if not kinds or min(map(len, kinds.values())) < 2:
        raise ValueError(f"{path} must have two prompts of each kind, one of which is held out")
    train, held_out = {}, {}
    for kind, by_prompt in kinds.items():
        prompts = list(by_prompt.values())  # lines of one prompt stay together
        random.Random(0).shuffle(prompts)
        fifth = max(1, len(prompts) // 5)
        parts = prompts[:fifth], prompts[fifth:]
        held_out[kind], train[kind] = ([line for lines in part for line in lines] for part in parts)
    longest = max(map(len, answers), default=31) + 1
    if max_new_tokens is not None:
        least = {} if reward else {"least": longest}  # a shorter answer could never be right
        longest = checks.integer(
            "max_new_tokens, with room for the longest answer and its end,", max_new_tokens, **least
        )
    task = Task(
        tokenizer=tokenizer,
        question=lambda line: question_of(tokenizer, line["prompt"]),
        answer=functools.partial(_answer, tokenizer),
        reward=_is_answer if reward is None else functools.partial(_checked, reward),
        train=train,
        held_out=held_out,
        trained_kinds=tuple(kinds),
        max_new_tokens=longest,
    )
    return language_model, task


KEYS = ("prompt", "answer", "kind")


def question_of(tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt, in the form in which a model that was taught to be asked is asked."""
    return getattr(tokenizer, "chat_prompt", tokenizer.encode)(prompt)


def _answer(tokenizer, line: dict) -> list[int]:
    if "answer" not in line:
        raise ValueError(f'the method learns from right answers, but the line of {line["prompt"]!r} has no "answer"')
    return [*tokenizer.encode(line["answer"]), tokenizer.eos_token_id]


def _is_answer(line: dict, text: str) -> float:
    return float(text.strip() == line["answer"].strip())


def _checked(reward: Callable[[dict, str], float], line: dict, text: str) -> float:
    name = f"the reward of {text!r} for {line['prompt']!r}"
    try:
        value = reward(line, text)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}, line {place.lineno}"
        raise RuntimeError(f"{name} raised {type(error).__name__}: {error} ({where})") from error
    return checks.number(name, float(value) if isinstance(value, bool | np.bool_) else value)


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


# The models that tasks are for: each with its tokenizer.
MODELS = {"tiny": lambda: (arithmetic.base_model(), arithmetic.Tokenizer()), "smollm2": _smollm2}
