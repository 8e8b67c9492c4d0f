"""Is the carry hard, or is it only rare? book/results/language_model.json, which the page on the language model reads.

The tiny model, trained as book/tools/make_base_model.py does, with two things varied: how much of the training each of
the two kinds with a carry from the units is (0.012 in the base model; the other kinds keep their proportions), and in
which order the digits of the answer are written. Measured on all held-out sums, with the whole answers that carry and
that do not. 24 trainings, 40 seconds each on one quiet core: 16 minutes.
"""

import sys
from pathlib import Path

import torch
from _rows import compute

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from make_base_model import SHARES, train_base_model

from mini_impl.finetuning.arithmetic import BAD_KINDS, KINDS, Problem, Tokenizer, problems, question
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.sft import supervised

BAD_SHARES = (0.012, 0.2, 0.048, 0.003, 0.006, 0.024)  # in this order: the base model's, the even mix, those between
SHIFTS = [shift / 4 for shift in range(-16, 33)]


def shares(bad: float) -> dict[str, float]:
    """The share of each kind when each of the bad ones has `bad`."""
    others = sum(share for kind, share in SHARES.items() if kind not in BAD_KINDS)
    return {kind: bad if kind in BAD_KINDS else share * (1 - 2 * bad) / others for kind, share in SHARES.items()}


def ids_of(number: int, reverse: bool) -> list[int]:
    text = str(number)
    return [*Tokenizer().encode(text[::-1] if reverse else text), Tokenizer.eos_token_id]


def rows_of(some: list[Problem], numbers: list[int], reverse: bool) -> tuple:
    return supervised(list(map(question, some)), [ids_of(x, reverse) for x in numbers], Tokenizer.eos_token_id)


@torch.no_grad()
def answers(model: LanguageModel, some: list[Problem], numbers: list[int], reverse: bool) -> tuple:
    """(log-probability of each number as the whole answer, whether it is the greedy answer), each [problem]."""
    tokens, labels, _ = rows_of(some, numbers, reverse)
    logprobs = model(tokens).log_softmax(-1)
    counts = labels >= 0
    chosen = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return chosen.where(counts, 0).sum(1), ((logprobs.argmax(-1) == labels) | ~counts).all(1)


def measure(model: LanguageModel, bad: float, reverse: bool) -> dict:
    some = [p for kind in KINDS for p in problems(kind, "held out")]
    units = torch.tensor([p.a % 10 + p.b % 10 for p in some])
    carries = units >= 10

    def candidate(p: Problem, carry: int) -> int:
        return 10 * (p.a // 10 + p.b // 10 + carry) + (p.a + p.b) % 10

    right, greedy = answers(model, some, [p.a + p.b for p in some], reverse)
    given, left_out = (answers(model, some, [candidate(p, c) for p in some], reverse)[0] for c in (1, 0))
    margin = given - left_out  # [problem]
    of = {kind: torch.tensor([p.kind == kind for p in some]) for kind in KINDS}
    share = shares(bad)
    weight = sum(of[kind] * share[kind] / of[kind].sum() for kind in KINDS)
    balanced = [
        ((margin[carries] + c > 0).double().mean() + (margin[~carries] + c <= 0).double().mean()).item() / 2
        for c in SHIFTS
    ]
    return {
        "greedy": {kind: round(greedy[of[kind]].double().mean().item(), 4) for kind in KINDS},
        "sampled": {kind: round(right[of[kind]].exp().mean().item(), 4) for kind in KINDS},
        "auc": round((margin[carries][:, None] > margin[~carries]).double().mean().item(), 4),
        "expected": round((weight * margin.sigmoid()).sum().item(), 4),
        "margins": [round(margin[units == u].median().item(), 3) for u in range(19)],
        "balanced": [round(value, 4) for value in balanced],
    }


def row(bad: float, reverse: bool, seed: int) -> dict:
    model = train_base_model(seed=seed, shares=shares(bad), answer=lambda p: ids_of(p.a + p.b, reverse))
    return measure(model, bad, reverse)


def main() -> None:
    jobs = {}
    for bad in BAD_SHARES:
        for reverse in (False, True):
            for seed in range(3):
                if not reverse or bad in (0.012, 0.2):
                    order = "units first" if reverse else "usual order"
                    given = {"bad": bad, "reverse": reverse, "seed": seed}
                    jobs[f"{order}, share {bad:g}, seed {seed}"] = given
    compute("language_model", row, jobs, jobs=1)


if __name__ == "__main__":
    main()
