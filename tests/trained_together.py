"""Short trainings of everything, as one process or as one of several: python -m tests.trained_together OUT.json.

Started by itself it trains alone; by torchrun or accelerate launch with the others. Worker 0 writes the curves.
"""

import json
import sys
from pathlib import Path

import torch

from mini_impl import workers
from mini_impl.finetuning import METHODS, add_lora, fine_tune, sums
from mini_impl.forecasting import FORECASTERS, fit, loss_of
from tests.test_devices import VARIANTS, small, windows, without_dropout

FEW = {"prompts": 3, "group_size": 4, "replay": 3}


def forecaster(name: str, variant: str, **how) -> dict:
    """The loss of every step: of 17 windows, and the last of each epoch of a single one, which two cannot share."""
    model = without_dropout(small(name, variant))  # which each worker draws for its own rows
    torch.manual_seed(workers.number())  # the others take over the weights of the first
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    training = fit(
        model, windows(66, 0), windows(40, 1), loss_of(FORECASTERS[name], variant), epochs=2, batch_size=17, **how
    )
    return training.terms


def language_model(method: str, variant: str, **more) -> dict:
    """The loss of every update, and what was measured before and after."""
    model, task = sums()
    if method == "sft":
        add_lora(model, rank=2)
    few = {"sequences": 9} if method == "sft" or (method, variant) == ("dapo", "documented") else FEW
    training = fine_tune(
        model, METHODS[method, variant](task, **{**few, **more}), steps=2, learning_rate=3e-3, questions=4
    )
    return {**training.terms, **training.metrics, "right": [*training.measures[2].accuracy.values()]}


def main() -> None:
    torch.set_num_threads(1)
    forecasters = {f"{name} {variant}": forecaster(name, variant) for name in FORECASTERS for variant in VARIANTS}
    methods = {f"{method} {variant}": language_model(method, variant) for method, variant in METHODS}
    methods["one sentence for two"] = language_model("sft", "published", sequences=1)
    if workers.number() == 0:
        Path(sys.argv[1]).write_text(json.dumps({**forecasters, **methods}))


if __name__ == "__main__":
    main()
