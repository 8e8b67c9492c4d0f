"""A valid call of every public function that checks its arguments, for tests/fuzz.py."""

import copy
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import nn

from mini_impl import checkpoint, checks, faster, forecasting, language, losses, plots, results, settings, table
from mini_impl.finetuning import arithmetic, dapo, grpo, head, language_model, policy, sampling, sft, tasks, train
from mini_impl.finetuning.methods import METHODS
from mini_impl.forecasting import (
    FORECASTERS,
    MaskedPatchTST,
    Scaler,
    Series,
    Windows,
    baselines,
    data,
    dlinear,
    forecaster,
    layers,
    patchtst,
    timesnet,
)
from mini_impl.forecasting import train as training
from mini_impl.kernels import clipped_loss, decomposition, logprob

FOLDER = Path(tempfile.mkdtemp())
F32 = torch.float32


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def ids(high, *shape):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(0))


def yes(*shape):
    return torch.ones(*shape, dtype=torch.bool)


def logs(*shape):
    """Log-probabilities."""
    return -draw(*shape).abs()


SIZES = {  # of a model of each kind, for 3 variables
    "dlinear": {"kernel_size": 5},
    "patchtst": {"patch_length": 6, "stride": 3, "width": 8, "layers": 1, "return_attention": True},
    "itransformer": {"width": 8, "heads": 2, "layers": 1},
    "timesnet": {"variables": 3, "width": 4, "layers": 1, "top_k": 2, "return_frequency_features": True},
    "timexer": {"variables": 3, "patch_length": 6, "width": 8, "heads": 2, "return_attention": True},
}


def made(name):
    torch.manual_seed(0)
    return FORECASTERS[name](24, 4, **SIZES[name]).eval()


def masked():
    torch.manual_seed(0)
    return MaskedPatchTST(24, 6, width=8, heads=2, layers=1, feed_forward_width=8)


def windows():
    return Windows(draw(60, 3), 24, 4)


def series():
    return Series(draw(60, 3) + 5, ("a", "b", "c"))


@cache
def fitted():
    train, validation, *_ = data.prepare(series(), (30, 15, 15), 8, 2)
    model = dlinear.DLinear(8, 2, kernel_size=3)
    training.fit(model, train, validation, dlinear.published_loss, epochs=1, progress=False)
    return model


def file(name, text):
    (FOLDER / name).write_text(text)
    return FOLDER / name


def csv():
    return file("a.csv", "date,a,b\n" + "".join(f"2024-01-{day:02},{day**2},{day % 3}\n" for day in range(1, 12)))


def jsonl():
    return file("a.jsonl", "".join(f'{{"prompt": "{a}+1=", "answer": "{a + 1}"}}\n' for a in range(9)))


def kept():
    copy.deepcopy(fitted()).save(FOLDER / "model")
    return FOLDER / "model"


def words():
    language_model.save_language_model(small(), FOLDER / "words")
    return FOLDER / "words"


def adapter():
    sft.save_adapter(sft.add_lora(small(), rank=2), FOLDER / "adapter")
    return FOLDER / "adapter"


def small():
    torch.manual_seed(0)
    return language_model.LanguageModel(13, width=16, layers=1, feed_forward_width=16)


@cache
def rollout():
    return sampling.generate(small(), [[1, 2], [3]], 3, 12)


def task():
    return tasks.sums()[1]._replace(trained_kinds=("one digit",))


def gradients():
    return [draw(3), draw(2, 2)]


def penalised():
    weights = [draw(3).requires_grad_()]
    return {
        "loss": (weights[0] ** 2).sum(),
        "parameters": weights,
        "thresholds": [0.1],
        "weights": torch.tensor([0.3, 0.7]),
        "clip_penalty_weight": 0.1,
        "sampling_penalty_weight": 0.1,
    }


def published(module):
    arguments = {"logprobs": logs(2, 3), "old_logprobs": logs(2, 3), "advantages": draw(2), "mask": yes(2, 3)}
    more = {"ref_logprobs": logs(2, 3), "kl_weight": 0.1} if module is grpo else {}
    return module.published_loss, {**arguments, "clip_low": 0.2, "clip_high": 0.3, **more}


def loss(name, form, **weights):
    output = made(name)(draw(2, 24, 3))
    return forecasting.loss_of(FORECASTERS[name], form), {"output": output, "target": draw(2, 4, 3), **weights}


# {name: () -> (callable, its arguments by name)}
CALLS = {
    "checkpoint.save_checkpoint": lambda: (
        checkpoint.save_checkpoint,
        {"path": FOLDER / "saved", "tensors": {"a": draw(2)}, "state": {"b": 1}},
    ),
    "checkpoint.load_checkpoint": lambda: (checkpoint.load_checkpoint, {"path": kept()}),
    "checkpoint.trained_parameters": lambda: (checkpoint.trained_parameters, {"model": small(), "device": "cpu"}),
    "checkpoint.check_writable": lambda: (checkpoint.check_writable, {"name": "path", "path": FOLDER / "new"}),
    "checks.device": lambda: (checks.device, {"name": "device", "value": "cpu"}),
    "finetuning.arithmetic.Tokenizer.encode": lambda: (arithmetic.Tokenizer().encode, {"text": "1+2="}),
    "finetuning.arithmetic.Tokenizer.decode": lambda: (arithmetic.Tokenizer().decode, {"ids": [1, 10, 2]}),
    "finetuning.arithmetic.problems": lambda: (arithmetic.problems, {"kind": "one digit", "part": "train"}),
    "finetuning.arithmetic.reward": lambda: (
        lambda text: arithmetic.reward(arithmetic.Problem("one digit", 1, 2), text),
        {"text": "3"},
    ),
    "finetuning.dapo.clip_penalty": lambda: (
        dapo.clip_penalty,
        {"gradients": gradients(), "thresholds": [0.1, 0.2]},
    ),
    "finetuning.dapo.AdaptiveThresholds": lambda: (dapo.AdaptiveThresholds, {"quantile": 0.9, "decay": 0.9}),
    "finetuning.dapo.clip_to_thresholds": lambda: (
        dapo.clip_to_thresholds,
        {"gradients": gradients(), "thresholds": [0.1, 0.2]},
    ),
    "finetuning.dapo.sampling_weights": lambda: (
        dapo.sampling_weights,
        {"scores": draw(3), "temperature": 0.5, "floor": 0.1},
    ),
    "finetuning.dapo.sampling_penalty": lambda: (dapo.sampling_penalty, {"weights": torch.tensor([0.3, 0.7])}),
    "finetuning.dapo.TypeSampler": lambda: (
        dapo.TypeSampler,
        {"kinds": ["a", "b"], "temperature": 0.5, "floor": 0.1, "decay": 0.9, "score": "loss", "seed": 0},
    ),
    "finetuning.dapo.TypeSampler.update": lambda: (
        dapo.TypeSampler(["a", "b"], 0.5).update,
        {"kinds": ["a", "b"], "losses": draw(2)},
    ),
    "finetuning.dapo.documented_loss": lambda: (dapo.documented_loss, penalised()),
    "finetuning.dapo.published_loss": lambda: published(dapo),
    "finetuning.dapo.informative_groups": lambda: (dapo.informative_groups, {"rewards": draw(2, 3)}),
    "finetuning.dapo.overlong_penalty": lambda: (
        dapo.overlong_penalty,
        {"lengths": ids(9, 4), "max_length": 8, "buffer": 2},
    ),
    "finetuning.dapo.finished": lambda: (
        dapo.finished,
        {"completion": ids(9, 2, 3), "mask": yes(2, 3), "eos_token_id": 4},
    ),
    "finetuning.grpo.sequence_logprobs": lambda: (
        grpo.sequence_logprobs,
        {"logprobs": logs(4, 3), "mask": yes(4, 3), "group_size": 2},
    ),
    "finetuning.grpo.first_of_each": lambda: (
        grpo.first_of_each,
        {"completion": ids(9, 4, 3), "mask": yes(4, 3), "group_size": 2},
    ),
    "finetuning.grpo.target_distribution": lambda: (
        grpo.target_distribution,
        {"old_logprobs": logs(2, 3), "rewards": draw(2, 3), "temperature": 0.5, "weights": "documented"},
    ),
    "finetuning.grpo.documented_loss": lambda: (
        grpo.documented_loss,
        {"logprobs": logs(2, 3), "old_logprobs": logs(2, 3), "rewards": draw(2, 3), "temperature": 0.5},
    ),
    "finetuning.grpo.contrastive_loss": lambda: (
        grpo.contrastive_loss,
        {"logprobs": logs(2, 3), "old_logprobs": logs(2, 3), "rewards": draw(2, 3), "temperature": 0.5},
    ),
    "finetuning.grpo.published_loss": lambda: published(grpo),
    "finetuning.head.head_logprobs": lambda: (
        head.head_logprobs,
        {"hidden": draw(2, 3, 4), "weight": draw(9, 4), "tokens": ids(9, 2, 3), "temperature": 0.7},
    ),
    "finetuning.head.head_loss": lambda: (
        lambda hidden, weight, tokens: head.head_loss(hidden, weight, tokens, lambda logprobs, part: -logprobs),
        {"hidden": draw(2, 3, 4), "weight": draw(9, 4), "tokens": ids(9, 2, 3)},
    ),
    "finetuning.language_model.LanguageModel": lambda: (
        language_model.LanguageModel,
        {"vocab_size": 9, "width": 16, "heads": 4, "key_value_heads": 2, "feed_forward_width": 8, "rope_base": 100.0},
    ),
    "finetuning.language_model.LanguageModel.forward": lambda: (
        small(),
        {"tokens": ids(13, 2, 5), "attention_mask": yes(2, 5)},
    ),
    "finetuning.language_model.LanguageModel.hidden": lambda: (small().hidden, {"tokens": ids(13, 2, 5)}),
    "finetuning.language_model.load_language_model": lambda: (language_model.load_language_model, {"path": words()}),
    "finetuning.policy.token_logprobs": lambda: (
        policy.token_logprobs,
        {"logits": draw(2, 3, 9), "tokens": ids(9, 2, 3)},
    ),
    "finetuning.policy.advantages": lambda: (policy.advantages, {"rewards": draw(2, 4), "scale": True}),
    "finetuning.policy.token_loss": lambda: (
        policy.token_loss,
        {"logprobs": logs(2, 3), "old_logprobs": logs(2, 3), "advantages": draw(2), "clip_low": 0.2, "clip_high": 0.2},
    ),
    "finetuning.policy.kl_k3": lambda: (policy.kl_k3, {"logprobs": logs(2, 3), "ref_logprobs": logs(2, 3)}),
    "finetuning.policy.token_weights": lambda: (policy.token_weights, {"mask": yes(2, 3)}),
    "finetuning.policy.reduce": lambda: (policy.reduce, {"per_token": draw(2, 3), "mask": yes(2, 3), "by": "token"}),
    "finetuning.sampling.truncate": lambda: (
        sampling.truncate,
        {"logits": draw(2, 9), "temperature": 0.7, "top_k": 4, "top_p": 0.9},
    ),
    "finetuning.sampling.uniforms": lambda: (sampling.uniforms, {"seed": 1, "rows": [0, 3], "count": 4}),
    "finetuning.sampling.generate": lambda: (
        sampling.generate,
        {
            "model": small(),
            "prompts": [[1, 2], [3]],
            "max_new_tokens": 3,
            "eos_token_id": 12,
            "temperature": 0.7,
            "top_k": 4,
            "top_p": 0.9,
            "seed": 0,
        },
    ),
    "finetuning.sampling.completion_logits": lambda: (
        sampling.completion_logits,
        {"model": small(), "rollout": rollout()},
    ),
    "finetuning.sampling.score": lambda: (
        sampling.score,
        {"model": small(), "rollout": rollout(), "temperature": 1.0},
    ),
    "finetuning.sft.supervised": lambda: (
        sft.supervised,
        {"prompts": [[1, 2], [3]], "answers": [[4], [5, 6]], "padding": 0},
    ),
    "finetuning.sft.token_cross_entropy": lambda: (
        sft.token_cross_entropy,
        {"probabilities": draw(2, 9).softmax(-1), "tokens": ids(9, 2)},
    ),
    "finetuning.sft.sentence_mean": lambda: (sft.sentence_mean, {"token_losses": draw(2, 3), "mask": yes(2, 3)}),
    "finetuning.sft.softmax": lambda: (sft.softmax, {"logits": draw(2, 9)}),
    "finetuning.sft.log_sum_exp_loss": lambda: (sft.log_sum_exp_loss, {"logits": draw(2, 9), "tokens": ids(9, 2)}),
    "finetuning.sft.documented_loss": lambda: (
        sft.documented_loss,
        {"logits": draw(2, 3, 9), "labels": ids(9, 2, 3), "ignore_index": -100},
    ),
    "finetuning.sft.published_loss": lambda: (
        sft.published_loss,
        {"logits": draw(2, 3, 9), "labels": ids(9, 2, 3), "ignore_index": -100},
    ),
    "finetuning.sft.LoRALinear": lambda: (sft.LoRALinear, {"base": nn.Linear(4, 3), "rank": 2, "alpha": 4.0}),
    "finetuning.sft.add_lora": lambda: (
        sft.add_lora,
        {"model": small(), "targets": ["query", "value"], "rank": 2, "alpha": 4.0},
    ),
    "finetuning.sft.lora_layers": lambda: (sft.lora_layers, {"model": small()}),
    "finetuning.sft.merge_and_unload": lambda: (sft.merge_and_unload, {"model": sft.add_lora(small(), rank=2)}),
    "finetuning.sft.save_adapter": lambda: (
        sft.save_adapter,
        {"model": sft.add_lora(small(), rank=2), "folder": FOLDER / "new adapter"},
    ),
    "finetuning.sft.load_adapter": lambda: (sft.load_adapter, {"model": small(), "folder": adapter()}),
    "finetuning.tasks.from_file": lambda: (tasks.from_file, {"path": jsonl(), "model": "tiny", "max_new_tokens": 4}),
    "finetuning.train.measure": lambda: (
        train.measure,
        {"model": arithmetic.base_model(), "ref_model": arithmetic.base_model(), "task": task(), "questions": 2},
    ),
    "finetuning.train.accuracy": lambda: (
        train.accuracy,
        {"model": arithmetic.base_model(), "task": task(), "questions": 2},
    ),
    "finetuning.train.fine_tune": lambda: (
        train.fine_tune,
        {
            "model": arithmetic.base_model(),
            "method": METHODS["sft", "published"](task(), sequences=2),
            "steps": 1,
            "learning_rate": 1e-3,
            "max_grad_norm": 1.0,
            "questions": 1,
            "seed": 0,
            "save_every": 1,
            "progress": False,
        },
    ),
    "forecasting.loss_of": lambda: (forecasting.loss_of, {"model": dlinear.DLinear, "form": "published"}),
    "forecasting.baselines.repeat_last": lambda: (
        baselines.repeat_last,
        {"history": draw(2, 8, 3), "horizon": 4},
    ),
    "forecasting.baselines.repeat_season": lambda: (
        baselines.repeat_season,
        {"history": draw(2, 8, 3), "horizon": 4, "period": 3},
    ),
    "forecasting.data.load_csv": lambda: (data.load_csv, {"path": csv()}),
    "forecasting.data.save_csv": lambda: (data.save_csv, {"series": series(), "path": FOLDER / "out.csv"}),
    "forecasting.data.split": lambda: (data.split, {"values": draw(30, 2), "lengths": (20, 5, 5), "history": 4}),
    "forecasting.data.Scaler.fit": lambda: (Scaler.fit, {"train": draw(9, 2)}),
    "forecasting.data.Scaler.apply": lambda: (Scaler.fit(draw(9, 2)).apply, {"values": draw(4, 2)}),
    "forecasting.data.Scaler.invert": lambda: (
        Scaler.fit(draw(9, 2)).invert,
        {"scores": draw(4, 2), "variables": [1, 0]},
    ),
    "forecasting.data.Windows": lambda: (
        Windows,
        {"values": draw(20, 2), "history": 4, "horizon": 2, "endogenous": [0]},
    ),
    "forecasting.data.prepare": lambda: (
        data.prepare,
        {"series": series(), "lengths": (30, 15, 15), "history": 8, "horizon": 2, "endogenous": 0},
    ),
    "forecasting.dlinear.decompose": lambda: (dlinear.decompose, {"series": draw(2, 9, 3), "kernel_size": 3}),
    "forecasting.dlinear.closed_form": lambda: (
        dlinear.closed_form,
        {"history": draw(5, 9, 2), "target": draw(5, 3, 2), "kernel_size": 3, "trend_weight": 0.5},
    ),
    "forecasting.forecaster.Forecaster.save": lambda: (copy.deepcopy(fitted()).save, {"path": FOLDER / "kept"}),
    "forecasting.forecaster.load": lambda: (forecaster.load, {"path": kept()}),
    "forecasting.forecaster.forecast": lambda: (
        forecaster.forecast,
        {"model": copy.deepcopy(fitted()), "series": series()},
    ),
    "forecasting.forecaster.unit_errors": lambda: (
        forecaster.unit_errors,
        {"forecast": copy.deepcopy(fitted()), "windows": data.prepare(series(), (30, 15, 15), 8, 2)[2]},
    ),
    "forecasting.layers.moving_average": lambda: (
        layers.moving_average,
        {"series": draw(2, 9, 3), "kernel_size": 3},
    ),
    "forecasting.layers.weighted_average": lambda: (
        layers.weighted_average,
        {"series": draw(2, 9, 3), "weights": torch.tensor([0.2, 0.6, 0.2])},
    ),
    "forecasting.layers.half_weighted": lambda: (layers.half_weighted, {"period": 4}),
    "forecasting.layers.patches": lambda: (layers.patches, {"series": draw(2, 9), "patch_length": 3, "stride": 2}),
    "forecasting.patchtst.MaskedPatchTST": lambda: (
        MaskedPatchTST,
        {"history": 24, "patch_length": 6, "mask_ratio": 0.4, "width": 8, "heads": 2, "layers": 1, "dropout": 0.1},
    ),
    "forecasting.patchtst.MaskedPatchTST.forward": lambda: (masked(), {"history": draw(2, 24, 3)}),
    "forecasting.patchtst.masked_loss": lambda: (
        patchtst.masked_loss,
        {"output": masked()(draw(2, 24, 3))},
    ),
    "forecasting.patchtst.masked_score": lambda: (
        patchtst.masked_score,
        {"model": masked(), "windows": windows(), "seed": 0, "batch_size": 16},
    ),
    "forecasting.timesnet.dominant_periods": lambda: (
        timesnet.dominant_periods,
        {"series": draw(2, 12, 3), "k": 2, "per_window": True},
    ),
    "forecasting.train.evaluate": lambda: (
        training.evaluate,
        {"forecast": made("dlinear"), "windows": windows(), "batch_size": 16},
    ),
    "forecasting.train.forecast_mse": lambda: (
        training.forecast_mse,
        {"model": made("dlinear"), "windows": windows()},
    ),
    "forecasting.train.fit": lambda: (
        training.fit,
        {
            "model": made("dlinear"),
            "train": windows(),
            "validation": windows(),
            "loss": dlinear.published_loss,
            "epochs": 1,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "patience": 3,
            "seed": 0,
            "save_every": 2,
            "progress": False,
        },
    ),
    "language.use_language": lambda: (language.use_language, {"name": "en"}),
    "losses.orthogonality": lambda: (losses.orthogonality, {"matrix": draw(2, 3, 4), "norm": "fro"}),
    "losses.kl_from_uniform": lambda: (losses.kl_from_uniform, {"probabilities": draw(2, 4).softmax(-1)}),
    "plots.diagram": lambda: (
        plots.diagram,
        {"boxes": {"a": (0, 0, "x"), "b": (0, 1, "y")}, "arrows": [("a", "b", "")]},
    ),
    "plots.table": lambda: (
        plots.table,
        {"rows": [["a", 1.0], ["b", None]], "columns": ["x", "y"], "best": {1: "least"}},
    ),
    "plots.figure": lambda: (plots.figure, {"width": 3.0, "height": 2.0}),
    "plots.curves": lambda: (plots.curves, {"axes": plots.figure()[1], "values": {"a": [1.0, 2.0]}, "steps": [0, 1]}),
    "faster.faster": lambda: (faster.faster, {"function": nn.Linear(3, 2), "compile": False, "precision": "bf16"}),
    "kernels.clipped_loss.clipped_loss": lambda: (
        clipped_loss.clipped_loss,
        {"logprobs": logs(4, 3), "old_logprobs": logs(4, 3), "advantages": draw(4), "mask": yes(4, 3)},
    ),
    "kernels.decomposition.decompose": lambda: (decomposition.decompose, {"series": draw(2, 9, 3), "kernel_size": 3}),
    "kernels.logprob.token_logprobs": lambda: (
        logprob.token_logprobs,
        {"logits": draw(2, 3, 5), "tokens": ids(5, 2, 3), "temperature": 0.7},
    ),
    "results.load": lambda: (results.load, {"name": "etth1"}),
    "settings.choose_settings": lambda: (
        settings.choose_settings,
        {"option": "--set", "given": [("kernel_size", 3)], "function": dlinear.DLinear},
    ),
    "table.read_table": lambda: (table.read_table, {"path": csv()}),
}
WEIGHTS = {"dlinear": "trend_weight", "patchtst": "uniformity_weight", "timesnet": "smoothness_weight"}
for _name in FORECASTERS:
    _weight = WEIGHTS.get(_name, "orthogonality_weight")
    _class = f"forecasting.{_name}.{FORECASTERS[_name].__name__}"
    CALLS |= {
        _class: lambda n=_name: (FORECASTERS[n], {"history": 24, "horizon": 4, **SIZES[n]}),
        f"{_class}.forward": lambda n=_name: (made(n), {"history": draw(2, 24, 3)}),
        f"forecasting.{_name}.documented_loss": lambda n=_name, w=_weight: loss(n, "documented", **{w: 0.1}),
        f"forecasting.{_name}.published_loss": lambda n=_name: loss(n, "published"),
    }

SETTINGS = {"sft": {"sequences": 4}}
SETTINGS["grpo"] = {"prompts": 2, "group_size": 4, "temperature": 0.7, "num_iterations": 1, "replay": 2}
SETTINGS["dapo"] = SETTINGS["grpo"]
for _form in METHODS:
    _settings = {"sequences": 4} if _form == ("dapo", "documented") else SETTINGS[_form[0]]
    CALLS[f"finetuning.methods.{METHODS[_form].__name__}"] = lambda form=_form, settings=_settings: (
        METHODS[form],
        {"task": task(), **settings},
    )

# What else has "Raises" in its docstring, and why it is not attacked.
SKIPPED = {
    "checkpoint.Run.restore": "of a training: `make kill` breaks those off",
    "checks.tensor": "is what raises; so are the following",
    "checks.integer": "",
    "checks.integers": "",
    "checks.odd": "",
    "checks.divides": "",
    "checks.indices": "",
    "checks.number": "",
    "download.fetch": "the network; tests/test_download.py has a server",
    "finetuning.dapo.fill_batch": "takes a function that samples; what that raises is its own",
    "finetuning.methods.Method": "abstract",
    "finetuning.sft.LoRALinear.forward": "a part of a model, whose door checks",
    "finetuning.smollm2.Tokenizer.encode": "the real model, which need not be installed; so are the following",
    "finetuning.smollm2.Tokenizer.decode": "",
    "finetuning.smollm2.Tokenizer.chat_prompt": "",
    "finetuning.smollm2.load_smollm2": "",
    "finetuning.smollm2.download_smollm2": "",
    "finetuning.smollm2.load_tokenizer": "",
    "forecasting.data.download_ett": "the network",
    "kernels.wanted": "asks the environment and the card, not its arguments",
    "losses.LossTerms.values": "takes nothing; every loss is asked for its values here",
    "plots.show": "needs a notebook",
    "plots.slider": "needs a notebook",
    "workers.begin": "the other processes; tests/test_workers.py starts them",
}
# Infinity is what these say of what cannot be.
INFINITE = {"finetuning.sampling.truncate", "finetuning.sampling.score", "finetuning.policy.token_logprobs"}
# `patches` only rearranges what it is given; the kernels, whose callers check, say that of NaN comes NaN.
UNREAD = {"forecasting.layers.patches", "kernels.clipped_loss.clipped_loss", "kernels.decomposition.decompose"}
UNREAD |= {"kernels.logprob.token_logprobs"}
