"""What the documented DAPO's steps do: book/results/dapo_steps.json, which the chapter on DAPO reads.

Steps: plain gradient descent on all five kinds of sums, at six rates: as it is, with the penalty on the gradient at
three weights, with each layer's gradient clipped to its thresholds, with all of it shortened to norm 1. 180 trainings
of 60 updates of 64 sequences, five seeds, about 3 seconds each. Help: of five trainings, what a step on each kind would
gain; 8 seconds each. Balance: the KL penalty of the sampler at four weights; 20 trainings of 200 updates of 64
sequences, 4 seconds each. Scores: the sampler led by losses, by gradient norms, or by nothing, at three temperatures
chosen with seed 0, then five other seeds; 22 trainings, 4 to 15 seconds each. On one core 16 minutes in all.
"""

import math
import random

import torch
from _finetuning import BY_BOTH, SEEDS, TUNED_ON, job, key, seeds_of_best, train
from _rows import compute
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_impl.finetuning import sums
from mini_impl.finetuning.dapo import AdaptiveThresholds, clip_penalty, clip_to_thresholds
from mini_impl.finetuning.methods import Stream
from mini_impl.finetuning.sft import documented_loss
from mini_impl.finetuning.tasks import examples

NAME = "dapo_steps"
RATES = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
WAYS = {  # weight of the penalty, and what is done to the gradient
    "as it is": (0.0, None),
    "penalty 0.001": (0.001, None),
    "penalty 0.01": (0.01, None),
    "penalty 0.1": (0.1, None),
    "clipped": (0.0, "layers"),
    "one norm": (0.0, "norm"),
}
UNIFORM = {"sampler_temperature": 1e6}
NO_PENALTIES = {"clip_penalty_weight": 0.0, "sampling_penalty_weight": 0.0}
TEMPERATURES = {"uniform": (0.5,), "loss": (0.1, 0.5, 2.0), "gradient norm": (0.5, 2.0, 5.0)}
BALANCES = (0.0, 0.01, 0.1, 1.0)


def descend(way: str, rate: float, seed: int, updates: int = 60, sequences: int = 64) -> dict:
    """One training by gradient descent: the loss of each update, and what the penalty did to the gradient."""
    weight, clip = WAYS[way]
    model, task = sums()
    task = task._replace(trained_kinds=tuple(task.train))
    parameters = list(model.parameters())
    thresholds, losses, longer, upwards = AdaptiveThresholds(0.99), [], 0, 0
    for step in range(updates):
        stream = Stream(seed, step)
        tokens, labels, attention_mask = examples(task, stream.problems(task, stream.kinds(task, sequences)))
        with sdpa_kernel(SDPBackend.MATH):
            logits = model(tokens, attention_mask)
        loss = documented_loss(logits, labels).total
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        gradients = torch.autograd.grad(loss, parameters, create_graph=weight > 0)
        if not all(g.isfinite().all() for g in gradients):
            break
        tau = thresholds.update(gradients)
        plain = [g.detach() for g in gradients]
        used = plain
        if weight:
            pull = torch.autograd.grad(clip_penalty(gradients, tau), parameters)  # 2He
            excesses = [g - c for g, c in zip(plain, clip_to_thresholds(plain, tau), strict=True)]
            used = [g + weight * p for g, p in zip(plain, pull, strict=True)]
            longer += norm(used) > norm(plain)
            upwards += sum((e * p).sum().item() for e, p in zip(excesses, pull, strict=True)) > 0
        elif clip == "layers":
            used = clip_to_thresholds(plain, tau)
        elif clip == "norm":
            used = [g * min(1, 1 / norm(plain)) for g in plain]
        with torch.no_grad():
            for parameter, g in zip(parameters, used, strict=True):
                parameter -= rate * g
    return {
        "losses": [round(loss, 4) if loss < 1e6 else None for loss in losses],  # None: more than a million, or NaN
        "longer": longer,  # updates in which the penalty made the gradient longer
        "upwards": upwards,  # updates in which e'He > 0
    }


def norm(gradients: list[torch.Tensor]) -> float:
    return torch.stack([g.norm() for g in gradients]).norm().item()


def helpfulness(seed: int, every: int = 10, updates: int = 100, sequences: int = 64, asked: int = 100) -> dict:
    """SFT on all kinds; now and then of each kind its loss, the norm of its gradient, and how much a step on it helps.

    help: <gradient of the kind's training problems, gradient of all kinds' held-out problems>, what a small step on
    the kind takes off the held-out loss, by its size.
    """
    model, task = sums()
    task = task._replace(trained_kinds=tuple(task.train))
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3)

    def loss_of(problems: list) -> torch.Tensor:
        tokens, labels, attention_mask = examples(task, problems)
        return documented_loss(model(tokens, attention_mask), labels).total

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    looks = {}
    for step in range(updates + 1):
        stream = Stream(seed, step)
        if step % every == 0:
            source = random.Random(f"{seed} {step}")
            held_out = [p for some in task.held_out.values() for p in source.sample(some, min(len(some), asked))]
            wanted, looks[step] = gradient(loss_of(held_out)), {}
            for kind, some in task.train.items():
                loss = loss_of(source.sample(some, asked))
                g = gradient(loss)
                looks[step][kind] = [round(x, 4) for x in (loss.item(), g.norm().item(), (g @ wanted).item())]
        loss = loss_of(stream.problems(task, stream.kinds(task, sequences)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return {"looks": looks}


def scored(name: str, temperature: float, seed: int) -> dict:
    """A job of the sampler that goes by a score, or by nothing."""
    how = UNIFORM if name == "uniform" else {"score": name, "sampler_temperature": temperature}
    return job("dapo, documented", seed, 1e-3, {**NO_PENALTIES, **how, "sequences": 64}, all_kinds=True)


def balanced(weight: float, seed: int) -> dict:
    """A job with the documented sampler and this weight of its KL penalty, and no other."""
    how = {"clip_penalty_weight": 0.0, "sampling_penalty_weight": weight, "sequences": 64}
    return job("dapo, documented", seed, 1e-3, how, all_kinds=True)


def run(function, jobs: dict[str, dict]) -> list[dict]:
    rows = compute(NAME, function, jobs)
    return [rows[name] for name in jobs]


def main() -> None:
    tries = [{"way": way, "rate": rate, "seed": seed} for way in WAYS for rate in RATES for seed in SEEDS]
    run(descend, {f"{given['way']}, rate {given['rate']}, seed {given['seed']}": given for given in tries})
    run(helpfulness, {f"help, seed {seed}": {"seed": seed} for seed in SEEDS})
    run(train, {key(one): one for weight in BALANCES for seed in SEEDS for one in [balanced(weight, seed)]})
    for name, temperatures in TEMPERATURES.items():
        best = seeds_of_best(
            run(train, {key(one): one for t in temperatures for one in [scored(name, t, TUNED_ON)]}), BY_BOTH
        )
        run(train, {key(one): one for one in best})


if __name__ == "__main__":
    main()
