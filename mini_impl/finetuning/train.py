"""One trainer for every way of fine-tuning, and the measures that all of them are judged by."""

import copy
import hashlib
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from mini_impl import checks
from mini_impl.checkpoint import (
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    same_settings,
    save_checkpoint,
    tensor_group,
)
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.methods import Method, Stream, sample
from mini_impl.finetuning.sampling import completion_logits
from mini_impl.finetuning.tasks import Task
from mini_impl.losses import NonFiniteLoss

# --- measuring --------------------------------------------------------------------------------------------------------


class Measures(NamedTuple):
    """How a model does on problems that it was not trained on."""

    accuracy: dict[str, float]  # of each kind: the share of greedy answers that are right
    kl: float  # KL(model || start) of the next token, in nats, the mean over tokens that the model samples
    entropy: float  # of the model's next token, in nats, the mean over the same tokens


def accuracy(model: LanguageModel, task: Task, questions: int = 200) -> dict[str, float]:
    """Of each kind, the share of held-out problems whose greedy answer is right.

    questions: how many problems of each kind (all of them where there are fewer), the same every time.
    """
    checks.integer("questions", questions)
    right = {}
    for kind in task.held_out:
        _, rewards, _ = sample(model, task, _asked(task, kind, questions), 1, 0.0, seed=0)
        right[kind] = rewards.mean().item()
    return right


def measure(model: LanguageModel, start: LanguageModel, task: Task, questions: int = 200, seed: int = 0) -> Measures:
    """How a model does on held-out problems: `accuracy`, and on an eighth as many problems KL and entropy.

    start: the model before fine-tuning. seed: of the answers on which KL and entropy are measured.
    """
    right = accuracy(model, task, questions)
    asked = [problem for kind in task.held_out for problem in _asked(task, kind, max(1, questions // 8))]
    rollout, _, _ = sample(model, task, asked, 1, 1.0, seed)
    with torch.no_grad():
        own, first = (completion_logits(policy, rollout).log_softmax(-1) for policy in (model, start))
        kl = (own.exp() * (own - first)).sum(-1)[rollout.mask].mean().item()
        entropy = -(own.exp() * own).sum(-1)[rollout.mask].mean().item()
    return Measures(right, kl, entropy)


def _asked(task: Task, kind: str, questions: int) -> list:
    """The held-out problems of a kind that are asked: the same every time."""
    problems = task.held_out[kind]
    return random.Random(kind).sample(problems, min(questions, len(problems)))


# --- the trainer ------------------------------------------------------------------------------------------------------


class FineTuning(NamedTuple):
    """How a fine-tuning went."""

    terms: dict[str, list[float]]  # each term of the loss at every update
    logged: dict[str, list[float]]  # what the method says of every update, such as the mean reward
    measures: dict[int, Measures]  # by the number of steps before them; 0: the model of the start
    seconds: float  # that it took, measuring and breaks left out


def fine_tune(
    model: LanguageModel,
    method: Method,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    largest_gradient: float = 1.0,
    measure_every: int | None = None,
    questions: int = 200,
    seed: int = 0,
    device: str | torch.device | None = None,
    checkpoint: Path | str | None = None,
    progress: bool | None = None,
) -> FineTuning:
    """Fine-tune a model with Adam and leave it as it is after the last step, in eval mode.

    model: what is trained are its parameters that need a gradient: all, or those of LoRA after `add_lora`.
    method: one of methods.METHODS, made with a task. A step is what it draws
        at once; it may make several updates of it.
    largest_gradient: a longer gradient, over all parameters, is shortened to this norm.
    measure_every: steps between measures on held-out problems, `questions` of each kind; None: before and after only.
    seed: of everything that is drawn.
    checkpoint: a file that is replaced at every measure. If it is there already, the training goes on from it and ends
        as it would have without the break, on the CPU with the same bits. Only `steps` may change in between, upwards.
    progress: show a progress bar; None: if there is a terminal.
    Raises TypeError, ValueError; NonFiniteLoss with the step if a term of the loss is NaN or infinite.
    """
    checks.integer("steps", steps)
    checks.number("learning_rate", learning_rate, above=0)
    checks.number("largest_gradient", largest_gradient, above=0)
    every = steps if measure_every is None else checks.integer("measure_every", measure_every)
    checks.integer("seed", seed, least=0)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("model has no parameter to train")
    if device is not None:
        model.to(checks.device("device", device))
    start = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(trained.values(), lr=learning_rate)
    terms: dict[str, list[float]] = {}
    logged: dict[str, list[float]] = {}
    measures: dict[int, Measures] = {}
    done, seconds = 0, 0.0
    settings = {
        "model": _digest(start) if checkpoint is not None else None,
        "trained": list(trained),
        "method": _describe(method),
        "task": _describe_task(method.task),
        "learning_rate": learning_rate,
        "largest_gradient": largest_gradient,
        "measure_every": measure_every,
        "questions": questions,
        "seed": seed,
    }
    method.begin(seed)
    if checkpoint is not None and Path(checkpoint).exists():
        tensors, state = load_checkpoint(checkpoint)
        same_settings(checkpoint, state.get("settings"), settings)
        if state["done"] > steps:
            raise ValueError(f"steps must be at least {state['done']}, which {checkpoint} has already; got {steps}")
        done, terms, logged, seconds = state["done"], state["terms"], state["logged"], state["seconds"]
        measures = {int(step): Measures(**values) for step, values in state["measures"].items()}
        with torch.no_grad():
            for name, value in tensor_group(tensors, "model").items():
                trained[name].copy_(value)
        restore_optimizer(optimizer, tensor_group(tensors, "optimizer"))
        method.restore(tensor_group(tensors, "method"))

    bar = tqdm(total=steps, initial=done, desc=type(method).__name__, leave=False, disable=_hide(progress))
    while True:
        if done not in measures and (done % every == 0 or done == steps):
            measures[done] = measure(model, start, method.task, questions, seed)
            if checkpoint is not None and done:
                tensors = {f"model/{name}": value for name, value in trained.items()}
                tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors(optimizer).items()}
                tensors |= {f"method/{name}": value for name, value in method.state().items()}
                state = {"settings": settings, "done": done, "terms": terms, "logged": logged, "seconds": seconds}
                state["measures"] = {step: values._asdict() for step, values in measures.items()}
                save_checkpoint(checkpoint, tensors, state)
        if done == steps:
            break
        before = time.perf_counter()
        try:
            for loss, words in method.updates(model, start, Stream(seed, done)):
                values = loss.values()
                optimizer.zero_grad()
                loss.total.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained.values(), largest_gradient)
                checks.all_finite("the norm of the gradient", norm, NonFiniteLoss)
                optimizer.step()
                for name, value in values.items():
                    terms.setdefault(name, []).append(value)
                for name, value in words.items():
                    logged.setdefault(name, []).append(value)
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"training stopped at step {done + 1}: {error}") from error
        done += 1
        seconds += time.perf_counter() - before
        bar.update()
    bar.close()
    model.eval()
    return FineTuning(terms, logged, measures, seconds)


def _hide(progress: bool | None) -> bool | None:
    """The `disable` of tqdm for the argument `progress`, for which None means: only if there is no terminal."""
    return None if progress is None else not progress


def _digest(model: LanguageModel) -> str:
    """A fingerprint of a model's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _describe(method: Method) -> dict:
    """The kind of a method with its plain settings."""
    plain = (bool, int, float, str)
    settings = {name: value for name, value in vars(method).items() if isinstance(value, plain)}
    return {"kind": type(method).__name__, **settings}


def _describe_task(task: Task) -> dict:
    """The trained kinds of a task, and a fingerprint of its problems."""
    problems = hashlib.sha256(repr((task.train, task.held_out)).encode()).hexdigest()
    return {"trained kinds": list(task.trained_kinds), "longest answer": task.max_tokens, "problems": problems}
