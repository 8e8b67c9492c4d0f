"""Does a baseline make the policy gradient learn faster? book/results/policy_gradient.json, which its chapter reads.

The tiny model and its sums, one update for each rollout of 32 problems x 8 answers, 100 updates with Adam. "none": the
reward, 0 or 1, as it is; "signs": -1 or 1; "mean": less the mean of the group; "scaled": also divided by its deviation.
Each at three learning rates with five seeds, and all of them are reported. 60 trainings, 8 seconds each on one core:
eight minutes, or far more on a machine that is busy.
"""

from statistics import mean

import torch
from _rows import compute

from mini_impl.finetuning import score, sums
from mini_impl.finetuning.methods import Stream, sample
from mini_impl.finetuning.policy import advantages
from mini_impl.finetuning.train import accuracy

NAME = "policy_gradient"
UPDATES = 100
SIGNALS = {
    "none": lambda rewards: rewards,
    "signs": lambda rewards: 2 * rewards - 1,
    "mean": lambda rewards: rewards - rewards.mean(1, keepdim=True),
    "scaled": advantages,
}
RATES = (3e-4, 1e-3, 2e-3)
SEEDS = (1, 2, 3, 4, 5)


def train(signal: str, learning_rate: float, seed: int, updates: int) -> dict:
    model, task = sums()
    optimizer, curve = torch.optim.Adam(model.parameters(), lr=learning_rate), []
    for step in range(updates):
        stream = Stream(seed, step)
        problems = stream.problems(task, stream.kinds(task, 32))
        rollout, rewards, _ = sample(model, task, problems, 8, 1.0, stream.seed())
        loss = -(score(model, rollout).sum(1) * SIGNALS[signal](rewards).flatten()).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        curve.append(rewards.mean().item())
    right = accuracy(model, task, 200)
    others = [value for kind, value in right.items() if kind not in task.trained_kinds]
    return {
        "mean reward of ten updates": [round(mean(curve[at : at + 10]), 4) for at in range(0, updates, 10)],
        "bad cases": round(mean(right[kind] for kind in task.trained_kinds), 4),
        "others": round(mean(others), 4),
    }


def main() -> None:
    jobs = {
        f"{signal}, {rate}, seed {seed}": {"signal": signal, "learning_rate": rate, "seed": seed, "updates": UPDATES}
        for signal in SIGNALS
        for rate in RATES
        for seed in SEEDS
    }
    compute(NAME, train, jobs, jobs=1)


if __name__ == "__main__":
    main()
