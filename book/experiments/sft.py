"""How few weights repair a model, and where: book/results/sft.json, which the chapter on SFT reads.

LoRA of rank 1 to 32 on Q and V, their whole weights, and all weights; then as many weights of LoRA in other places. For
each the learning rate is chosen by the bad cases of the validation part with seed 0, then five other seeds report.
90 trainings, 9 seconds each on one core: 14 minutes.
"""

from _finetuning import BY_BAD_CASES, LEARNING_RATES, LORA_RATES, TUNED_ON, job, run, seeds_of_best

NAME = "sft"
Q_AND_V = ("query", "value")
FEED_FORWARD = ("gate", "up", "down")
ATTENTION = ("query", "key", "value", "output")
WHERE = {
    **{f"rank {rank}": {"rank": rank, "targets": Q_AND_V} for rank in (1, 2, 4, 8, 32)},
    "Q and V, whole": {"layers": Q_AND_V},
    "all weights": {},
    "attention": {"rank": 4, "targets": ATTENTION},  # 3584 weights, as rank 8 on Q and V
    "feed-forward": {"rank": 3, "targets": FEED_FORWARD},  # 3456
    "everywhere": {"rank": 2, "targets": (*ATTENTION, *FEED_FORWARD)},  # 4096
}


def grid(name: str) -> list[dict]:
    rates = LORA_RATES if "rank" in WHERE[name] else LEARNING_RATES
    return [job("sft, documented", TUNED_ON, rate, **WHERE[name]) for rate in rates]


def main() -> None:
    run(NAME, [one for name in WHERE for one in grid(name)])
    run(NAME, [one for name in WHERE for one in seeds_of_best(run(NAME, grid(name)), BY_BAD_CASES)])


if __name__ == "__main__":
    main()
