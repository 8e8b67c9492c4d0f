"""One trainer for every way of fine-tuning, and the measures that all of them are judged by."""

import copy
import functools
import hashlib
import inspect
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mini_impl import checks, workers
from mini_impl.checkpoint import Run, describe, located, note, progress_bar, trained_parameters
from mini_impl.faster import adam, faster
from mini_impl.finetuning.language_model import Cache, LanguageModel
from mini_impl.finetuning.methods import Method, Stream, sample
from mini_impl.finetuning.sampling import completion_logits
from mini_impl.finetuning.tasks import Task
from mini_impl.losses import NonFiniteLoss

# --- measuring --------------------------------------------------------------------------------------------------------


class Measures(NamedTuple):
    """How a model does on problems that it was not trained on."""

    accuracy: dict[str, float]  # of each kind: the share of greedy answers that are right
    kl: float  # KL(model || ref_model) of the next token, in nats, the mean over tokens that the model samples
    entropy: float  # of the model's next token, in nats, the mean over the same tokens


def accuracy(model: LanguageModel, task: Task, questions: int = 200) -> dict[str, float]:
    """Of each kind, the share of held-out problems whose greedy answer is right.

    questions: how many problems of each kind (all of them where there are fewer), the same every time.
    Raises TypeError, ValueError, NonFiniteLoss.
    """
    checks.integers(questions=questions)
    checks.instance("task", task, Task, "a Task")
    right = {}
    for kind in task.held_out:
        _, rewards, _ = sample(model, task, _asked(task, kind, questions), 1, 0.0, seed=0)
        right[kind] = rewards.mean().item()
    return right


def measure(
    model: LanguageModel, ref_model: LanguageModel, task: Task, questions: int = 200, seed: int = 0
) -> Measures:
    """How a model does on held-out problems: `accuracy`, and on an eighth as many problems KL and entropy.

    ref_model: the model before fine-tuning. seed: of the answers on which KL and entropy are measured.
    Raises TypeError, ValueError, NonFiniteLoss.
    """
    right = accuracy(model, task, questions)
    asked = [problem for kind in task.held_out for problem in _asked(task, kind, max(1, questions // 8))]
    rollout, _, _ = sample(model, task, asked, 1, 1.0, seed)
    with torch.no_grad():
        own, first = (completion_logits(policy, rollout).log_softmax(-1) for policy in (model, ref_model))
        kl = (own.exp() * (own - first)).sum(-1)[rollout.mask].mean()
        entropy = -(own.exp() * own).sum(-1)[rollout.mask].mean()
    checks.look(checks.finite("KL and entropy of the model", torch.stack([kl, entropy]), NonFiniteLoss))
    return Measures(right, kl.item(), entropy.item())


def _asked(task: Task, kind: str, questions: int) -> list:
    """The held-out problems of a kind that are asked: the same every time."""
    problems = task.held_out[kind]
    return random.Random(kind).sample(problems, min(questions, len(problems)))


# --- the trainer ------------------------------------------------------------------------------------------------------


class FineTuning(NamedTuple):
    """How a fine-tuning went."""

    terms: dict[str, list[float]]  # each term of the loss at every update
    metrics: dict[str, list[float]]  # what the method says of every update, such as the mean reward
    measures: dict[int, Measures]  # by the number of steps before them; 0: the model before fine-tuning
    seconds: float  # that it took, measuring and breaks left out


def fine_tune(
    model: LanguageModel,
    method: Method,
    *,
    steps: int = 100,
    learning_rate: float = 1e-3,
    max_grad_norm: float = 1.0,
    measure_every: int | None = None,
    questions: int = 200,
    seed: int = 0,
    device: str | torch.device | None = None,
    compile: bool = False,
    precision: str = "float32",
    checkpoint: Path | str | None = None,
    save_every: int | None = None,
    progress: bool | None = None,
) -> FineTuning:
    """Fine-tune a model with Adam and leave it as it is after the last step, in eval mode.

    model: what is trained are its parameters that need a gradient: all, or those of LoRA after `add_lora`. LoRA leaves
        two outcomes: this model with its adapter, and what `merge_and_unload` makes of it.
    method: one of methods.METHODS, made with a task. A step is what it draws at once; it may make several updates of
        it. How a gradient that is too long is shortened is the method's to say, in its `clip`.
    max_grad_norm: a longer gradient, over all parameters, is shortened to this norm.
    measure_every: steps between measures on held-out problems, `questions` of each kind; None: before and after only.
    seed: of everything that is drawn.
    compile: have torch.compile write code for the model's blocks, which takes up to a minute; not for a method that
        differentiates twice. precision: "bf16" computes their products in bfloat16 in every update, and the rest, the
        head and sampling too, in float32: see `faster`. What was sampled then differs a little from what is scored.
    checkpoint: a file that is replaced at every measure, after every `save_every` steps, and when SIGTERM or Ctrl-C
        ends the training. If it is there already, the training goes on from it and ends as it would have without the
        break, on the CPU with the same bits. Only `steps` may change in between, upwards.
    progress: show a progress bar; None: if there is a terminal.
    Under `torchrun` or `accelerate launch` several workers share the answers of each step, those that are sampled and
    those that are learnt from, and take the steps of one: see `workers`.
    Raises TypeError, ValueError; NonFiniteLoss with the step if a term of the loss or the gradient is NaN or infinite;
    BlockingIOError while another training has the checkpoint.
    """
    every = steps if measure_every is None else measure_every
    steps, every, questions = checks.integers(steps=steps, measure_every=every, questions=questions)
    seed = checks.integer("seed", seed, least=0, most=2**63 - 1)
    checks.number("learning_rate", learning_rate, above=0, most=1e36)
    checks.positive(max_grad_norm=max_grad_norm)
    checks.instance("method", method, Method, "one of METHODS, made with a task")
    if compile and method.second_derivative:
        raise ValueError(f"compile=True has no second derivative, which {type(method).__name__} takes; leave it out")
    trained = trained_parameters(model, workers.place(device))
    workers.begin(model)
    ref_model = copy.deepcopy(model).eval().requires_grad_(False)
    faster_blocks = _faster_blocks((model, ref_model), compile, precision)
    optimizer = adam(trained.values(), learning_rate, precision)
    method.begin(seed)

    terms: dict[str, list[float]] = {}
    metrics: dict[str, list[float]] = {}
    measures: dict[int, Measures] = {}
    done, seconds = 0, 0.0
    settings = {
        "model": ref_model.state_dict().values(),
        "trained": list(trained),
        "method": method,
        "task": _describe_task(method.task),
        "learning_rate": learning_rate,
        "max_grad_norm": max_grad_norm,
        "measure_every": measure_every,
        "questions": questions,
        "seed": seed,
        "compile": compile,
        "precision": precision,
    }

    def snapshot() -> tuple[dict, dict]:
        state = {"done": done, "terms": terms, "metrics": metrics, "seconds": seconds}
        state["measures"] = {step: values._asdict() for step, values in measures.items()}
        return {"model": trained, "method": method.state()}, state

    with Run(checkpoint, optimizer, settings, save_every) as run:
        if broken_off := run.restore(steps=steps):
            groups, state = broken_off
            model.load_state_dict(groups["model"], strict=False)  # the trained parameters alone
            method.restore(groups["method"])
            done, terms, metrics, seconds = state["done"], state["terms"], state["metrics"], state["seconds"]
            measures = {int(step): Measures(**values) for step, values in state["measures"].items()}
        else:
            measures[0] = measure(model, ref_model, method.task, questions, seed)

        for step in progress_bar(range(done, steps), type(method).__name__, progress, initial=done, total=steps):
            before = time.perf_counter()
            with located(f"at step {step + 1}"), faster_blocks():
                for loss, said in method.updates(model, ref_model, Stream(seed, step)):
                    optimizer.zero_grad()
                    loss.total.backward()
                    if method.shared:
                        workers.add_up_gradients(trained.values())
                    norm = method.clip(list(trained.values()), max_grad_norm)
                    note(terms, loss.values())  # here the host waits for the device; NaN gets no further
                    checks.look(checks.finite("the norm of the gradient", norm, NonFiniteLoss))
                    optimizer.step()
                    note(metrics, said)
            seconds += time.perf_counter() - before
            done = step + 1
            due = done % every == 0 or done == steps
            if due:
                measures[done] = measure(model, ref_model, method.task, questions, seed)
            run.step(done, snapshot, due)
    model.eval()
    return FineTuning(terms, metrics, measures, seconds)


def _faster_blocks(models: Sequence[LanguageModel], compile: bool, precision: str) -> Callable:
    """A context in which the blocks of the models are computed as `faster` says; with a cache, to sample, as before."""
    plain = compile is False and precision == "float32"
    made = [] if plain else [(model, faster(model._hidden, compile, precision)) for model in models]

    @contextmanager
    def context() -> Iterator[None]:
        for model, fast in made:
            model._hidden = _faster_without_cache(model._hidden, fast)
        try:
            yield
        finally:
            for model, _ in made:
                del model._hidden  # what hid the method of the class

    return context


def _faster_without_cache(plain: Callable, fast: Callable) -> Callable:
    def hidden(tokens: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return fast(tokens, attention_mask) if cache is None else plain(tokens, attention_mask, cache)

    return hidden


def _describe_task(task: Task) -> dict:
    """The trained kinds of a task, and fingerprints of its problems and of its reward."""
    problems = hashlib.sha256(repr((task.train, task.held_out)).encode()).hexdigest()
    told = {"trained kinds": list(task.trained_kinds), "longest answer": task.max_new_tokens, "problems": problems}
    return {**told, "reward": _describe_reward(task.reward)}


def _describe_reward(reward: Callable) -> list[str]:
    """Its name and, for one of a reader's own, a fingerprint of the file that it stands in."""
    own = reward.args[0] if isinstance(reward, functools.partial) and reward.args else reward
    module = getattr(own, "__module__", None) or ""
    try:
        source = "" if module.startswith("mini_impl.") else inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # written in a notebook
        source = ""
    return [describe(reward), hashlib.sha256(source.encode()).hexdigest()]
