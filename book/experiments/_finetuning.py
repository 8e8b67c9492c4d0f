"""One fine-tuning of the tiny model, as sft.py, grpo.py, dapo.py and finetuning.py run many of them, and how their
settings are chosen.

Every way has the same budget: 200 updates of 256 sequences. Where answers are sampled, each of 100 rollouts of 256
answers serves two updates. A tenth of the training problems is kept for validation: by them, and with seed 0, the
learning rate and at most one other setting are chosen. The five seeds that are reported are others, and the held-out
problems are looked at once, when a training is over. About 9 seconds each on one core.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

import torch
from _rows import RESULTS, compute

from mini_impl.checkpoint import write_bytes
from mini_impl.finetuning import METHODS, add_lora, fine_tune, sums
from mini_impl.finetuning.arithmetic import BAD_KINDS
from mini_impl.finetuning.dapo import overlong_penalty
from mini_impl.finetuning.methods import DocumentedSFT, PublishedDAPO, PublishedGRPO, sample
from mini_impl.finetuning.sft import supervised
from mini_impl.finetuning.tasks import Task
from mini_impl.finetuning.train import accuracy, measure
from mini_impl.losses import LossTerms

TUNED_ON, SEEDS = 0, (1, 2, 3, 4, 5)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
LORA_RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # the product of two small matrices moves less
UPDATES = 200

# --- ways that the package has no method for --------------------------------------------------------------------------


@dataclass(eq=False, kw_only=True)
class KeptSFT(DocumentedSFT):
    """SFT that is held back: kl_weight x KL(model || start) at the answers, and `replay` of the sequences are the
    start's own greedy answers to problems of the kinds that are not trained."""

    kl_weight: float = 0.0
    replay: int = 0

    def updates(self, model, ref_model, stream):
        kinds = stream.kinds(self.task, self.sequences - self.replay)
        problems = stream.problems(self.task, kinds)
        prompts, answers = ([of(problem) for problem in problems] for of in (self.task.question, self.task.answer))
        if self.replay:
            others = [kind for kind in self.task.train if kind not in self.task.trained_kinds]
            old = stream.problems(self.task, stream.source.choices(others, k=self.replay))
            rollout, _, _ = sample(ref_model, self.task, old, 1, 0.0, seed=0)
            prompts += [self.task.question(problem) for problem in old]
            answers += [row[kept].tolist() for row, kept in zip(rollout.completion, rollout.mask, strict=True)]
        tokens, labels, attention_mask = supervised(prompts, answers, self.task.tokenizer.eos_token_id)
        kept, labels = labels >= 0, labels.clamp(min=0)
        logprobs = model(tokens, attention_mask).log_softmax(-1)  # [sequence, time, vocab_size]
        chosen = logprobs.gather(-1, labels[..., None])[..., 0]
        terms = self.loss(-chosen.where(kept, 0), kept)
        if self.kl_weight:
            with torch.no_grad():
                start = ref_model(tokens, attention_mask).log_softmax(-1)
            kl = (logprobs.exp() * (logprobs - start)).sum(-1)  # [sequence, time]
            terms = LossTerms.of(**terms.terms, kl=self.kl_weight * kl[kept].mean())
        yield terms, {}


@dataclass(eq=False, kw_only=True)
class OverlongGRPO(PublishedGRPO):
    """Published GRPO with DAPO's penalty on answers that are too long, which its batches otherwise do not share."""

    buffer: int = 1

    def _sample(self, model, stream):
        rollout, rewards = super()._sample(model, stream)
        lengths = rollout.mask.sum(1).view_as(rewards)
        return rollout, 2 * rewards - 1 + overlong_penalty(lengths, self.task.max_new_tokens, self.buffer)


@dataclass(eq=False, kw_only=True)
class BudgetedDAPO(PublishedDAPO):
    """Published DAPO that stops when it has sampled so many answers."""

    answers: int = UPDATES // 2 * 256

    def begin(self, seed):
        self.spent = 0

    def _sample(self, model, stream):
        self.spent += self.prompts * self.group_size
        return super()._sample(model, stream)

    def updates(self, model, ref_model, stream):
        if self.spent < self.answers:
            yield from super().updates(model, ref_model, stream)


WAYS: dict[str, Callable] = {f"{name}, {form}": make for (name, form), make in METHODS.items()}
WAYS |= {"sft, kept": KeptSFT, "grpo, overlong": OverlongGRPO, "dapo, budgeted": BudgetedDAPO}

# --- one training -----------------------------------------------------------------------------------------------------


def with_validation(task: Task) -> tuple[Task, Task]:
    """The task with a tenth of its training problems held out in the place of its held-out ones, and the task itself.

    a + b and b + a stay in the same part.
    """
    train, validation = {}, {}
    for kind, problems in task.train.items():
        pairs = sorted({(min(p.a, p.b), max(p.a, p.b)) for p in problems})
        kept_out = set(random.Random(kind).sample(pairs, len(pairs) // 10))
        validation[kind] = [p for p in problems if (min(p.a, p.b), max(p.a, p.b)) in kept_out]
        train[kind] = [p for p in problems if (min(p.a, p.b), max(p.a, p.b)) not in kept_out]
    return task._replace(train=train, held_out=validation), task


def bad_and_others(right: dict[str, float]) -> list[float]:
    """[mean accuracy of the bad kinds, of the others], to four digits."""
    return [round(mean(right[kind] for kind in right if (kind in BAD_KINDS) == bad), 4) for bad in (True, False)]


def train(
    way: str,
    learning_rate: float,
    seed: int,
    settings: dict,
    all_kinds: bool = False,
    rank: int = 0,
    targets: tuple[str, ...] | None = None,
    layers: tuple[str, ...] | None = None,
    looks: int = 5,
) -> dict:
    """One training of a way of WAYS.

    rank: of LoRA on `targets`, or 0. layers: names of the only weights to train. looks: how often it is measured.
    """
    torch.manual_seed(seed)
    model, task = sums()
    start = sums()[0]
    if all_kinds:
        task = task._replace(trained_kinds=tuple(task.train))
    if rank:
        add_lora(model, targets, rank=rank)
    if layers:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in layers)
    tuned, task = with_validation(task)
    method = WAYS[way](tuned, **settings)
    samples = not way.startswith("sft") and way != "dapo, documented"
    steps = UPDATES // method.num_iterations if samples else UPDATES
    drawn = count_answers(method) if samples else [0]
    how = {"steps": steps, "learning_rate": learning_rate, "measure_every": steps // looks, "seed": seed}
    training = fine_tune(model, method, **how, progress=False)
    test = measure(model, start, task)
    right = accuracy(model, task)
    return {
        "validation": bad_and_others(training.measures[steps].accuracy),
        "test": bad_and_others(right),
        "kinds": {kind: round(value, 4) for kind, value in right.items()},
        "kl": round(test.kl, 4),
        "entropy": round(test.entropy, 4),
        "curve": {  # on validation problems, by update
            str(step * UPDATES // steps): [
                *bad_and_others(now.accuracy),
                round(now.kl, 3),
                round(now.entropy, 3),
            ]
            for step, now in training.measures.items()
        },
        "metrics": {name: tenths(values) for name, values in training.metrics.items()},
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "answers": drawn[0],
        "training seconds": round(training.seconds, 1),
    }


def count_answers(method) -> list[int]:
    """A list whose one number is how many answers the method has sampled."""
    drawn, sample_some = [0], method._sample

    def counted(*arguments):
        drawn[0] += method.prompts * method.group_size
        return sample_some(*arguments)

    method._sample = counted
    return drawn


def tenths(values: list[float]) -> list[float]:
    """The means of ten parts of a curve."""
    parts = torch.tensor(values, dtype=torch.float64).tensor_split(min(10, len(values)))
    return [round(part.mean().item(), 4) for part in parts]


# --- choosing settings ------------------------------------------------------------------------------------------------


def job(way: str, seed: int, learning_rate: float, settings: dict | None = None, **how) -> dict:
    return {"way": way, "learning_rate": learning_rate, "seed": seed, "settings": settings or {}, **how}


def key(given: dict) -> str:
    how = {name: value for name, value in given.items() if name not in ("way", "learning_rate", "seed", "settings")}
    said = " ".join(f"{name}={value}" for name, value in {**given["settings"], **how}.items())
    return f"{given['way']}, lr {given['learning_rate']:g}, {said or 'defaults'}, seed {given['seed']}"


def run(name: str, jobs: list[dict]) -> list[dict]:
    """The rows of jobs, each computed once and kept in book/results/NAME.json."""
    rows = compute(name, train, {key(one): one for one in jobs})
    return [rows[key(one)] for one in jobs]


BY_BAD_CASES = "bad cases"  # the accuracy on the bad kinds alone
BY_BOTH = "bad cases and others"  # the mean of it and that on the other kinds


def score(row: dict, by: str) -> float:
    bad, others = row["validation"]
    return bad if by == BY_BAD_CASES else (bad + others) / 2


def name_ways(name: str, ways: dict[str, dict[str, list[dict]]]) -> None:
    """Add to book/results/NAME.json which rows belong together: {way: {"grid" or how it was chosen: [row's key]}}."""
    file = RESULTS / f"{name}.json"
    content = json.loads(file.read_text("utf-8"))
    content["ways"] = {way: {of: list(map(key, jobs)) for of, jobs in parts.items()} for way, parts in ways.items()}
    write_bytes(file, (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode())


def seeds_of_best(rows: list[dict], by: str) -> list[dict]:
    """The jobs of the five reported seeds, with the settings of the row that is best on the validation part."""
    best = max(rows, key=lambda row: score(row, by))["arguments"]
    return [{**best, "seed": seed} for seed in SEEDS]
