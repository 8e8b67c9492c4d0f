"""The command `mini-impl finetune`: fine-tune a language model of the book, and say what it gained and what it lost."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable

import torch

from mini_impl import workers
from mini_impl.finetuning import tasks
from mini_impl.finetuning.language_model import LanguageModel, save_language_model
from mini_impl.finetuning.methods import METHODS
from mini_impl.finetuning.sft import add_lora, merge_and_unload, save_adapter
from mini_impl.finetuning.train import Measures, accuracy, fine_tune
from mini_impl.settings import add_arguments, choose_settings, parse_setting

TASKS = {("tiny", "sums"): tasks.sums, ("smollm2", "sums"): tasks.worded_sums, ("smollm2", "facts"): tasks.facts}
HOW = {  # arguments of `fine_tune` that are options here
    "steps": "how often it draws problems",
    "learning_rate": "of Adam",
    "max_grad_norm": "a longer gradient is shortened to this norm",
    "measure_every": "steps between measures on held-out problems; without it: before and after",
    "questions": "held-out problems of each kind",
    "seed": "of everything that is drawn",
    "compile": "have torch.compile write code for the model, which takes up to a minute",
    "precision": "float32, or bf16: the model's products in bfloat16",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `finetune`; those that end up in `fine_tune` have its defaults."""
    add = parser.add_argument
    add("method", choices=sorted({method for method, _ in METHODS}))
    add("--loss", choices=("documented", "published"), default="documented", help="as documented, or as in the paper")
    add("--model", choices=sorted(tasks.MODELS), default="tiny", help="smollm2: after make real-model")
    what = parser.add_mutually_exclusive_group().add_argument
    what("--task", choices=sorted({task for _, task in TASKS}), default="sums", help="what it learns to answer")
    what("--data", metavar="FILE", help='of your own: {"prompt": text, "answer": text} on each line')
    reward = "(line, text) -> number, of --data; without it 1 for the answer, else 0. GRPO and published DAPO learn it"
    add("--reward", metavar="MODULE:FUNCTION", help=f"{reward}; others are measured by it")
    add("--max-new-tokens", type=int, help="of an answer to --data; without it as many as the longest needs")
    add("--set", type=parse_setting, action="append", default=[], metavar="NAME=VALUE", help="a setting of the method")
    add("--all-kinds", action="store_true", help="draw from every kind of problem, not only from the bad cases")
    add("--lora-rank", type=int, default=0, help="train LoRA of this rank on Q and V alone; 0: all weights")
    add_arguments(parser, fine_tune, HOW)
    add("--save", metavar="FILE", help="keep the model there, LoRA merged into it, for mini-impl answer")
    add("--adapter", metavar="FOLDER", help="keep what LoRA trained there, as PEFT does")


def run(options: argparse.Namespace) -> dict:
    """Fine-tune and measure as the options say; return everything that the command reports.

    With LoRA that includes both of its outcomes: the accuracy of the model with its adapter beside it and, as "merged",
    that of the model which the adapter was added into. --adapter keeps the first, --save the second.
    """
    if options.adapter is not None and not options.lora_rank:
        raise ValueError("--adapter needs --lora-rank: without LoRA there is no adapter to keep")
    make_method = METHODS[options.method, options.loss]
    settings = choose_settings("--set", options.set, make_method)
    torch.manual_seed(options.seed)
    model, task = _task(options)
    if options.all_kinds:
        task = task._replace(trained_kinds=tuple(task.train))
    if options.lora_rank:
        add_lora(model, rank=options.lora_rank)
    how = {name: getattr(options, name) for name in (*HOW, "device", "checkpoint", "save_every")}
    training = fine_tune(model, make_method(task, **settings), **how)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    counts = {"all": sum(parameter.numel() for parameter in model.parameters()), "trained": sum(trained)}
    if options.adapter is not None and workers.number() == 0:
        save_adapter(model, options.adapter)
    merged = {"merged": accuracy(merge_and_unload(model), task, options.questions)} if options.lora_rank else {}
    if options.save is not None and workers.number() == 0:
        model.tokenizer = options.model
        save_language_model(model, options.save)
    return {
        "settings": {"set": settings},
        "parameters": counts,
        "trained kinds": list(task.trained_kinds),
        "start": summary(training.measures[0], task),
        "end": {**summary(training.measures[options.steps], task), **merged},
        "measures": {step: measures._asdict() for step, measures in training.measures.items()},
        "curves": {**training.terms, **training.metrics},
        "seconds": round(training.seconds, 1),
    }


def _task(options: argparse.Namespace) -> tuple[LanguageModel, tasks.Task]:
    """The model and the task that the options name."""
    if options.data is not None:
        reward = None if options.reward is None else _function(options.reward)
        return tasks.from_file(options.data, options.model, reward, options.max_new_tokens)
    for name in ("reward", "max_new_tokens"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for questions of your own: it needs --data FILE")
    if (options.model, options.task) not in TASKS:
        models = " or ".join(model for model, task in TASKS if task == options.task)
        raise ValueError(f"--task {options.task} is for --model {models}; got {options.model}")
    return TASKS[options.model, options.task]()


def _function(name: str) -> Callable:
    """The function that module:function names, in the current folder too."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    found = None
    if module and function and not module.endswith(".py"):
        try:
            found = getattr(importlib.import_module(module), function, None)
        except Exception as error:
            raise ValueError(f"--reward: {module} cannot be read ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(f"--reward must be MODULE:FUNCTION, such as rewards:short for rewards.py; got {name!r}")
    return found


def summary(measures: Measures, task: tasks.Task) -> dict:
    """Measures with the mean accuracy on the kinds that were trained, and on the others."""
    trained = [measures.accuracy[kind] for kind in task.trained_kinds]
    others = [value for kind, value in measures.accuracy.items() if kind not in task.trained_kinds]
    means = {"trained kinds": sum(trained) / len(trained)}
    if others:
        means["other kinds"] = sum(others) / len(others)
    return {**means, **measures._asdict()}


def report(result: dict) -> None:
    """Print the result as a short table."""
    start, end, parameters = result["start"], result["end"], result["parameters"]
    print(f"trained {parameters['trained']:,} of {parameters['all']:,} parameters in {result['seconds']} s")
    own = result["settings"].get("reward")  # which may be of any size
    what, form = ("held-out mean reward", "#12.4g") if own else ("held-out accuracy", "12.3f")
    print(f"{what:<32}{'before':>12}{'after':>12}")
    for kind, before in start["accuracy"].items():
        name = kind if kind in result["trained kinds"] else f"{kind} (not trained)"
        print(f"{name:<32}{before:{form}}{end['accuracy'][kind]:{form}}")
    for name in ("kl", "entropy"):
        print(f"{name + ' of a token, nats':<32}{start[name]:12.3f}{end[name]:12.3f}")
