"""Every way of fine-tuning the tiny model compared: book/results/finetuning.json, which the page of that name reads.

For each way the learning rate, and for most one other setting, are chosen on validation problems with seed 0: by the
bad cases alone, and by the mean of bad cases and others. Each choice is then run with five other seeds. 184 trainings
to choose and 190 to report, 9 seconds each on one core, 20 with the clip penalty: 70 minutes.
"""

from _finetuning import BY_BAD_CASES, BY_BOTH, LEARNING_RATES, LORA_RATES, TUNED_ON, job, name_ways, run, seeds_of_best

NAME = "finetuning"
LORA = {"rank": 8, "targets": ("query", "value")}
TWICE = {"num_iterations": 2}  # updates of a rollout, as the published methods have it
BETAS = {"reward_temperature": (0.1, 0.5, 2.0)}
PENALTIES = {"clip_penalty_weight": (0.001, 0.01, 0.1)}
NO_SAMPLER = {"sampler_temperature": 1e6}  # every type is as likely as the others
NO_PENALTIES = {"clip_penalty_weight": 0.0, "sampling_penalty_weight": 0.0}

# What a row of the table is called: the way, settings that are fixed, the other setting that is chosen, and how else.
BAD_ONLY = {
    "SFT": ("sft, documented", {}, {}, {}),
    "SFT, LoRA": ("sft, documented", {}, {}, LORA),
    "DAPO documented": ("dapo, documented", {}, PENALTIES, {}),
    "DAPO documented, no sampler": ("dapo, documented", NO_SAMPLER, {}, {}),
    "DAPO documented, no penalties": ("dapo, documented", NO_PENALTIES, {}, {}),
    "GRPO documented": ("grpo, documented", {**TWICE, "weights": "documented"}, BETAS, {}),
    "GRPO documented, distinct": ("grpo, documented", {**TWICE, "weights": "documented", "distinct": True}, BETAS, {}),
    "GRPO corrected": ("grpo, documented", {**TWICE, "weights": "corrected"}, BETAS, {}),
    "GRPO contrastive": ("grpo, documented", {**TWICE, "weights": "contrastive"}, BETAS, {}),
    "GRPO published": ("grpo, published", {}, {"kl_weight": (0.0, 0.02, 0.1)}, {}),
    "DAPO published": ("dapo, budgeted", {}, {"clip_high": (0.2, 0.28, 0.4)}, {}),
}
MAIN = [name for name in BAD_ONLY if "no " not in name and "distinct" not in name]  # chosen by bad cases and others too
PATHS = ["SFT", "SFT, LoRA", "GRPO documented", "GRPO published", "DAPO published"]  # measured every 10 updates
ALL = {"all_kinds": True}
CURES = {
    "SFT, all kinds": ("sft, documented", {}, {}, ALL),
    "SFT, LoRA, all kinds": ("sft, documented", {}, {}, {**LORA, **ALL}),
    "DAPO documented, all kinds": ("dapo, documented", {}, {}, ALL),
    "DAPO documented, no sampler, all kinds": ("dapo, documented", NO_SAMPLER, {}, ALL),
    "DAPO documented, no penalties, all kinds": ("dapo, documented", NO_PENALTIES, {}, ALL),
    "GRPO published, all kinds": ("grpo, published", {}, {"kl_weight": (0.0, 0.02, 0.1)}, ALL),
    "DAPO published, all kinds": ("dapo, budgeted", {}, {}, ALL),
    "SFT, KL": ("sft, kept", {}, {"kl_weight": (0.1, 0.5, 2.0)}, {}),
    "SFT, replay": ("sft, kept", {}, {"replay": (32, 64, 128)}, {}),
    "GRPO published, KL": ("grpo, published", {}, {"kl_weight": (0.1, 0.5, 2.0)}, {}),
    "GRPO published, replay": ("grpo, published", {"kl_weight": 0.0}, {"replay": (32, 64, 128)}, {}),
}


def grid(name: str) -> list[dict]:
    """The trainings among which a row's settings are chosen, with seed 0."""
    way, fixed, other, how = {**BAD_ONLY, **CURES}[name]
    rates = LORA_RATES if "rank" in how else LEARNING_RATES
    choices = [{setting: value} for setting, values in other.items() for value in values] or [{}]
    return [job(way, TUNED_ON, rate, {**fixed, **choice}, **how) for choice in choices for rate in rates]


def unlimited() -> list[dict]:
    """Published DAPO with the settings that were chosen, and all the answers that it asks for."""
    best = seeds_of_best(run(NAME, grid("DAPO published")), BY_BAD_CASES)
    return [{**one, "way": "dapo, published"} for one in best]


def main() -> None:
    ways = {name: {"grid": grid(name)} for name in {**BAD_ONLY, **CURES}}
    for names, choices in ((BAD_ONLY, (BY_BAD_CASES, BY_BOTH)), (CURES, (BY_BOTH,))):
        run(NAME, [one for name in names for one in grid(name)])
        for by in choices:
            for name in names if by == BY_BAD_CASES or names is CURES else MAIN:
                ways[name][by] = seeds_of_best(run(NAME, ways[name]["grid"]), by)
    for name in PATHS:
        ways[name]["path"] = [{**one, "looks": 20} for one in ways[name][BY_BOTH]]
    ways["DAPO published, unlimited"] = {BY_BAD_CASES: unlimited()}
    run(NAME, [one for parts in ways.values() for jobs in parts.values() for one in jobs])
    name_ways(NAME, ways)


if __name__ == "__main__":
    main()
