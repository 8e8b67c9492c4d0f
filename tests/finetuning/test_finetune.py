"""The trainer of fine-tuning, its methods and tasks, on a toy: a letter for each of four digits."""

import copy
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mini_impl.checkpoint import load_checkpoint
from mini_impl.finetuning import dapo, methods
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.methods import METHODS, Stream, join, sample, split, written
from mini_impl.finetuning.policy import advantages
from mini_impl.finetuning.sampling import generate, score
from mini_impl.finetuning.sft import add_lora
from mini_impl.finetuning.tasks import Task, examples
from mini_impl.finetuning.train import fine_tune, measure
from mini_impl.losses import LossTerms, NonFiniteLoss

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
STOP = 8


class Digit(NamedTuple):
    kind: str
    digit: int


class Letters:
    """Tokens 0 to 3 are digits, 4 to 7 their letters, 8 is the stop token."""

    stop = STOP

    def decode(self, ids):
        return "".join(map(str, ids))


def toy(max_tokens=3):
    digits = {"low": [Digit("low", 0), Digit("low", 1)], "high": [Digit("high", 2), Digit("high", 3)]}
    return Task(
        tokenizer=Letters(),
        question=lambda problem: [problem.digit] * (1 + problem.digit % 2),  # of two lengths
        answer=lambda problem: [problem.digit + 4, STOP],
        reward=lambda problem, text: float(text == str(problem.digit + 4)),
        train=digits,
        held_out={**digits, "other": [Digit("other", 0)]},
        trained_kinds=("low", "high"),
        max_tokens=max_tokens,
    )


def small(seed=0):
    torch.manual_seed(seed)
    model = LanguageModel(9, width=16, layers=1, heads=2, key_value_heads=1, feed_forward_width=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim == 2 else 1)  # so narrow a model learns faster from a wider start
    return model


def begun():
    """A model that is right now and then, so that its samples have a signal."""
    model = small()
    fine_tune(model, METHODS["sft", "documented"](toy(), sequences=16), steps=6, learning_rate=0.01)
    return model


def few(name, loss, **settings):
    """A method with few sequences a step."""
    size = {"sequences": 16} if name == "sft" or (name, loss) == ("dapo", "documented") else {"prompts": 8, "group": 4}
    return METHODS[name, loss](toy(), **{**size, **settings})


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_examples_by_hand():
    tokens, labels, present = examples(toy(), [Digit("low", 0), Digit("low", 1)])
    assert tokens.tolist() == [[0, 4, STOP], [1, 1, 5]]
    assert labels.tolist() == [[4, STOP, -100], [-100, 5, STOP]]
    assert present.tolist() == [[True, True, False], [True, True, True]]


# --- what a step draws ------------------------------------------------------------------------------------------------


def test_a_step_draws_the_same_whenever_it_comes():
    def draws(seed, step):
        stream = Stream(seed, step)
        kinds = stream.kinds(toy(), 20)
        return kinds, stream.problems(toy(), kinds), stream.seed()

    assert draws(3, 7) == draws(3, 7)
    assert len({str(draws(seed, step)) for seed in range(3) for step in range(3)}) == 9
    kinds, problems, _ = draws(0, 0)
    assert set(kinds) == {"low", "high"} and [problem.kind for problem in problems] == kinds


def test_samples_belong_to_their_problems():
    """The rewards are those of the texts, in the order of the problems; groups stand together."""
    task, model = toy(), small()
    problems = [Digit("low", 1), Digit("high", 2), Digit("low", 0)]
    rollout, rewards, texts = sample(model, task, problems, 4, 1.0, seed=1)
    assert rewards.shape == (3, 4) and len(texts) == 12
    expected = [
        [float(texts[4 * i + j] == str(problem.digit + 4)) for j in range(4)] for i, problem in enumerate(problems)
    ]
    assert rewards.tolist() == expected
    for row, problem in enumerate(problem for problem in problems for _ in range(4)):
        assert rollout.prompt[row][rollout.present[row]].tolist() == task.question(problem)


def test_texts_leave_out_the_stop_token_and_what_comes_after():
    task = toy()
    rollout, _, _ = sample(small(), task, [Digit("low", 1)] * 8, 4, 1.0, seed=2)
    for row, text in enumerate(written(rollout, task)):
        tokens = rollout.completion[row].tolist()
        end = tokens.index(STOP) if STOP in tokens else len(tokens)
        assert text == "".join(map(str, tokens[:end]))


def test_split_and_join_are_inverse_and_join_pads():
    model = small()
    one = generate(model, [[0], [1, 1]], 2, STOP, seed=1)
    two = generate(model, [[2, 2, 2], [3, 3]], 4, STOP, seed=2)
    whole = join([*split(one, 1), *split(two, 2)])
    assert whole.prompt.shape[1] == 3 and len(whole.prompt) == 4
    parts = [(one, 0), (one, 1), (two, 0), (two, 1)]
    for row, (rollout, place) in enumerate(parts):
        for tokens, there in (("prompt", "present"), ("completion", "mask"), ("logprobs", "mask")):
            now = getattr(whole, tokens)[row][getattr(whole, there)[row]]
            then = getattr(rollout, tokens)[place][getattr(rollout, there)[place]]
            assert torch.equal(now, then)
    torch.testing.assert_close(score(model, whole)[whole.mask], whole.logprobs[whole.mask], rtol=0, atol=1e-5)


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"weights": "corrected"}, {"weights": "contrastive"}], ids=str)
def test_documented_grpo_learns(settings):
    model = begun()
    training = fine_tune(model, few("grpo", "documented", beta=0.2, **settings), steps=60, learning_rate=0.02)
    first, last = training.measures[0], training.measures[60]
    gain = {kind: last.accuracy[kind] - first.accuracy[kind] for kind in ("low", "high")}
    assert sum(gain.values()) / 2 >= 0.25, gain


@pytest.mark.parametrize(
    ("name", "loss", "steps"),
    [
        ("sft", "documented", 40),
        ("sft", "published", 40),
        ("grpo", "published", 60),
        ("dapo", "documented", 40),
        ("dapo", "published", 60),
    ],
)
def test_every_other_method_learns_all_of_it(name, loss, steps):
    model = begun()
    training = fine_tune(model, few(name, loss), steps=steps, learning_rate=0.02)
    assert training.measures[steps].accuracy["low"] == training.measures[steps].accuracy["high"] == 1
    assert training.measures[steps].kl > 0.1
    assert set(map(len, training.terms.values())) == {len(next(iter(training.terms.values())))}


def test_the_terms_are_those_of_the_loss():
    method = few("dapo", "documented", clip_weight=0.1, sampling_weight=0.1)
    ((loss, words),) = method.updates(small(), small(), Stream(0, 0))
    assert set(loss.terms) == {"basic", "clip", "sampling"}
    assert words.keys() == {"weight of low", "weight of high"} and sum(words.values()) == pytest.approx(1)


def test_the_sampler_of_documented_dapo_has_a_gradient_by_live_losses_alone():
    for score_by, moves in (("loss", True), ("gradient norm", False)):
        model = small()
        method = few("dapo", "documented", clip_weight=0.0, score=score_by)
        ((loss, _),) = method.updates(model, model, Stream(0, 0))
        assert loss.terms["sampling"].requires_grad == moves


def test_documented_dapo_prefers_the_kind_that_goes_badly():
    """After training on `low` alone, `high` is drawn more often."""
    model, task = small(), toy()
    easy = METHODS["sft", "documented"](task._replace(trained_kinds=("low",)), sequences=16)
    fine_tune(model, easy, steps=30, learning_rate=0.02)
    method = few("dapo", "documented", beta=0.5)
    for step in range(4):
        ((_, words),) = method.updates(model, model, Stream(0, step))
    assert words["weight of high"] > 0.9


@pytest.mark.parametrize("reduce_by", ["sequence", "token", "length"])
def test_published_grpo_with_every_reduction(reduce_by):
    """Dr. GRPO's divides by the longest answer that there may be, and leaves the deviation of the rewards out."""
    model, method = begun(), few("grpo", "published", reduce_by=reduce_by, updates=1, kl_weight=0.0)
    ((loss, _),) = method.updates(model, model, Stream(0, 0))
    stream = Stream(0, 0)
    problems = stream.problems(method.task, stream.kinds(method.task, method.prompts))
    rollout, rewards, _ = sample(model, method.task, problems, method.group, 1.0, stream.seed())
    gains = (rewards - rewards.mean(1, keepdim=True)).flatten()
    deviation = rewards.std(1, keepdim=True).expand_as(rewards).flatten()
    if reduce_by == "length":
        expected = -(gains[:, None] * rollout.mask).sum() / (len(gains) * method.task.max_tokens)
    else:
        each = (gains / (deviation + 1e-4).where(deviation > 0, 1))[:, None] * rollout.mask
        by_sequence = (each.sum(1) / rollout.mask.sum(1)).mean()
        expected = -(by_sequence if reduce_by == "sequence" else each.sum() / rollout.mask.sum())
    torch.testing.assert_close(loss.total.detach(), expected, rtol=1e-4, atol=1e-6)


def test_published_dapo_uses_groups_with_a_signal_only():
    model, method = small(), few("dapo", "published")
    (_, words), _ = method.updates(model, model, Stream(0, 0))
    assert words["groups used"] <= method.prompts and words["groups drawn"] >= words["groups used"]


def test_published_dapo_without_a_signal_makes_no_update():
    task = toy()._replace(reward=lambda problem, text: 0.0)
    model = small()
    before = copy.deepcopy(model.state_dict())
    training = fine_tune(model, METHODS["dapo", "published"](task, prompts=4, group=2, rounds=2), steps=2)
    assert training.terms == {} and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def given_to_the_loss(monkeypatch, model, **settings):
    """(rewards [prompt, group], advantages [sequence], mask) of one step of published DAPO."""
    seen, loss_function = {}, dapo.published_loss

    def watched_advantages(rewards):
        seen["rewards"] = rewards
        return advantages(rewards)

    def watched_loss(new, old, gains, mask, *bounds):
        seen.update(gains=gains, mask=mask)
        return loss_function(new, old, gains, mask, *bounds)

    monkeypatch.setattr(methods, "advantages", watched_advantages)
    monkeypatch.setattr(dapo, "published_loss", watched_loss)
    method = METHODS["dapo", "published"](toy(max_tokens=2), prompts=8, group=4, updates=1, **settings)
    (update,) = method.updates(model, model, Stream(0, 0))
    assert math.isfinite(update[0].total.item())
    return seen["rewards"], seen["gains"], seen["mask"]


def test_answers_as_long_as_may_be_lose_reward_or_those_without_an_end_are_left_out(monkeypatch):
    model = begun()
    plain, gains, mask = given_to_the_loss(monkeypatch, model, overlong="none")
    assert set(plain.flatten().tolist()) == {-1.0, 1.0} and (gains.view_as(plain) != 0).any(1).all()
    full = (mask.sum(1) == 2).view_as(plain)  # the longest there may be, a right answer and its stop token too
    assert full.any() and not full.all()
    punished, _, _ = given_to_the_loss(monkeypatch, model, overlong="penalty")
    assert torch.equal(punished, plain - full.to(plain))
    _, kept, there = given_to_the_loss(monkeypatch, model, overlong="filter")
    assert 0 < len(kept) < len(gains) and len(kept) == len(there)


def test_a_task_that_cannot_be():
    task = toy()
    for change, words in (
        ({"trained_kinds": ()}, "task must have trained_kinds; got none"),
        ({"trained_kinds": ("low", "none")}, r"task.train must have problems of every kind; got none of \['none'\]"),
        ({"train": {**task.train, "low": []}}, r"task.train must have .* got none of \['low'\]"),
        ({"held_out": {**task.held_out, "other": []}}, r"task.held_out must have .* got none of \['other'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            METHODS["sft", "documented"](task._replace(**change))


def test_several_updates_of_one_rollout_move_the_ratio():
    """The second update of a rollout has another loss than the first, and the recorded log-probabilities stay."""
    model, method = begun(), few("grpo", "published", updates=3, kl_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    for loss, _ in method.updates(model, model, Stream(0, 0)):
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        values.append(loss.total.item())
    assert len(values) == 3 and values[1] < values[0] - 1e-4


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_settings_of_a_method_that_cannot_be(name):
    with pytest.raises(ValueError, match="group must be at least 2; got 1"):
        METHODS[name, "published"](toy(), group=1)
    with pytest.raises(ValueError, match="weights must be one of"):
        METHODS["grpo", "documented"](toy(), weights="none")


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_model_is_no_distance_from_itself():
    model = small()
    measures = measure(model, copy.deepcopy(model), toy())
    assert measures.kl == pytest.approx(0, abs=1e-7)
    assert 0 < measures.entropy <= math.log(9) + 1e-6
    assert measures.accuracy.keys() == {"low", "high", "other"}


def test_measures_are_the_same_every_time_and_change_nothing():
    model, start = small(1), small(2)
    model.train()
    before = copy.deepcopy(model.state_dict())
    assert measure(model, start, toy()) == measure(model, start, toy())
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_only_lora_is_trained_and_the_start_counts_as_without_it():
    model = add_lora(small(), rank=2)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    training = fine_tune(model, few("sft", "documented"), steps=20, learning_rate=0.02)
    assert training.measures[0].kl == pytest.approx(0, abs=1e-7) and training.measures[20].kl > 1e-3
    for name, value in model.named_parameters():
        assert (name in frozen) == (not value.requires_grad)
        assert name not in frozen or torch.equal(frozen[name], value)


ALL = [*METHODS]


@pytest.mark.parametrize(("name", "loss"), ALL, ids=map("-".join, ALL))
def test_a_resumed_training_ends_with_the_same_bits(name, loss, tmp_path):
    whole, parts = small(), small()
    how = {"learning_rate": 0.01, "measure_every": 2, "seed": 4}
    expected = fine_tune(whole, few(name, loss), steps=6, **how)
    fine_tune(parts, few(name, loss), steps=4, **how, checkpoint=tmp_path / "run")
    parts = small()
    result = fine_tune(parts, few(name, loss), steps=6, **how, checkpoint=tmp_path / "run")
    assert result.terms == expected.terms and result.measures == expected.measures
    assert result.logged == expected.logged
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import torch
from test_finetune import few, small, fine_tune
torch.set_num_threads(1)
method = few("dapo", "documented")
updates = method.updates
def dying(model, start, stream):
    yield from updates(model, start, stream)
    dying.left -= 1
    if not dying.left:
        os.kill(os.getpid(), signal.SIGKILL)
dying.left = 5
method.updates = dying
fine_tune(small(), method, steps=8, learning_rate=0.01, measure_every=2, checkpoint={checkpoint!r})
"""


def test_a_killed_training_goes_on(tmp_path):
    """Killed -9 after its fifth step, it goes on from the fourth, with the sampler and the thresholds that it had."""
    checkpoint = str(tmp_path / "run")
    code = KILLED.format(tests=str(Path(__file__).parent), checkpoint=checkpoint)
    killed = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert killed.returncode == -signal.SIGKILL
    tensors, state = load_checkpoint(checkpoint)
    assert state["done"] == 4 and {"method/sampler/generator", "method/thresholds/values"} <= tensors.keys()
    whole, rest = small(), small()
    expected = fine_tune(whole, few("dapo", "documented"), steps=8, learning_rate=0.01, measure_every=2)
    result = fine_tune(
        rest, few("dapo", "documented"), steps=8, learning_rate=0.01, measure_every=2, checkpoint=checkpoint
    )
    assert result.terms == expected.terms
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    checkpoint = tmp_path / "run"
    fine_tune(small(), few("sft", "documented"), steps=2, checkpoint=checkpoint)
    for change, words in (
        ({"seed": 1}, "its seed was 0, now it is 1"),
        ({"learning_rate": 0.5}, "its learning_rate was"),
        ({"steps": 1}, "steps must be at least 2"),
    ):
        with pytest.raises(ValueError, match=words):
            fine_tune(small(), few("sft", "documented"), **{"steps": 3, **change}, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="its model was"):
        fine_tune(small(9), few("sft", "documented"), steps=3, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="its task was"):
        task = toy()._replace(trained_kinds=("low",))
        fine_tune(small(), METHODS["sft", "documented"](task, sequences=16), steps=3, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="its method was"):
        fine_tune(small(), few("sft", "published"), steps=3, checkpoint=checkpoint)


def test_a_gradient_that_is_not_finite_is_named_with_its_step():
    """Shortening it would make every gradient 0, or every weight NaN."""
    model, method = small(), few("sft", "documented")
    method.loss = lambda logits, labels: LossTerms.of(large=1e25 * (logits - logits.detach()).sum())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match="training stopped at step 1: the norm of the gradient"):
        fine_tune(model, method, steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_every_seed_draws_kinds_of_its_own_and_a_method_begins_anew():
    method, runs = few("dapo", "documented"), []
    for seed in (1, 2, 1):
        model = small()
        fine_tune(model, method, steps=3, seed=seed)
        runs.append((model.state_dict(), method.state()))
    (first, state), (_, other), (again, same) = runs
    assert not torch.equal(state["sampler/generator"], other["sampler/generator"])
    assert torch.equal(state["sampler/generator"], same["sampler/generator"])
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("form", ["documented", "published"])
def test_samples_are_scored_at_the_temperature_that_they_were_drawn_at(form):
    """Then the first update has a ratio of 1 everywhere."""
    more = {"kl_weight": 0.0} if form == "published" else {"weights": "corrected"}
    model, method = begun(), few("grpo", form, temperature=0.5, updates=1, **more)
    ((loss, _),) = method.updates(model, model, Stream(0, 0))
    assert loss.terms["policy" if form == "published" else "log_ratio"].item() == pytest.approx(0, abs=1e-5)


def test_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match="model has no parameter to train"):
        fine_tune(small().requires_grad_(False), few("sft", "documented"), steps=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "loss"), ALL, ids=map("-".join, ALL))
def test_every_method_on_every_device(name, loss, device):
    training = fine_tune(small(), few(name, loss), steps=1, device=device)
    assert all(math.isfinite(value) for values in training.terms.values() for value in values)


def test_every_method_says_what_it_is():
    for method in METHODS.values():
        assert method.__doc__ and issubclass(method, methods.Method)
