"""How published GRPO counts its tokens: book/results/grpo.json, which the chapter on GRPO reads.

The mean by sequence, by token, and Dr. GRPO's constant; the learning rate of each is chosen on the validation part with
seed 0, then five other seeds report. 27 trainings, 9 seconds each on one core: 4 minutes. The documented method and its
comparison with the published one stand in finetuning.json.
"""

from _finetuning import BY_BAD_CASES, LEARNING_RATES, TUNED_ON, job, run, seeds_of_best

NAME = "grpo"
REDUCTIONS = ("sequence", "token", "length")


def grid(reduce_by: str) -> list[dict]:
    settings = {"reduce_by": reduce_by, "kl_weight": 0.0}
    return [job("grpo, published", TUNED_ON, rate, settings) for rate in LEARNING_RATES]


def main() -> None:
    run(NAME, [one for by in REDUCTIONS for one in grid(by)])
    run(NAME, [one for by in REDUCTIONS for one in seeds_of_best(run(NAME, grid(by)), BY_BAD_CASES)])


if __name__ == "__main__":
    main()
