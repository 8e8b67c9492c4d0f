"""DAPO's parts, one after another: book/results/dapo.json, which the chapter on DAPO reads.

Published: GRPO without KL, and what DAPO adds to it, added up; every row has 25 600 answers sampled. Documented: a
gradient that is penalised, or clipped, or neither, without the sampler. The learning rate of each row is chosen by the
bad cases of the validation part with seed 0, then five other seeds report. 81 trainings, 9 to 15 seconds each on one
core: 15 minutes.
"""

from _finetuning import BY_BAD_CASES, LEARNING_RATES, TUNED_ON, job, run, seeds_of_best

NAME = "dapo"
NO_KL = {"kl_weight": 0.0}
HIGHER = {"clip_high": 0.28}
UNIFORM = {"sampler_temperature": 1e6, "sampling_penalty_weight": 0.0}
PARTS = {
    "GRPO": ("grpo, published", NO_KL),
    "clip-higher": ("grpo, published", {**NO_KL, **HIGHER}),
    "token mean": ("grpo, published", {**NO_KL, **HIGHER, "reduce_by": "token"}),
    "overlong penalty": ("grpo, overlong", {**NO_KL, **HIGHER, "reduce_by": "token"}),
    "dynamic sampling": ("dapo, budgeted", {}),
    "overlong filter": ("dapo, budgeted", {"overlong": "filter"}),
    "gradient: one norm": ("dapo, documented", {**UNIFORM, "clip_penalty_weight": 0.0}),
    "gradient: penalty": ("dapo, documented", {**UNIFORM, "clip_penalty_weight": 0.01}),
    "gradient: clipped": ("dapo, documented", {**UNIFORM, "clip_penalty_weight": 0.0, "adaptive_clip": True}),
}


def grid(name: str) -> list[dict]:
    way, settings = PARTS[name]
    return [job(way, TUNED_ON, rate, settings) for rate in LEARNING_RATES]


def main() -> None:
    run(NAME, [one for name in PARTS for one in grid(name)])
    run(NAME, [one for name in PARTS for one in seeds_of_best(run(NAME, grid(name)), BY_BAD_CASES)])


if __name__ == "__main__":
    main()
