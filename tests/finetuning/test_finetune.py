"""The trainer of fine-tuning, its methods and tasks, on a toy: a letter for each of four digits."""

import copy
import doctest
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import mini_impl.finetuning
from mini_impl.finetuning import dapo, grpo, head, methods, sft
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.methods import METHODS, Stream, join, sample, split
from mini_impl.finetuning.policy import advantages
from mini_impl.finetuning.sampling import generate, score, written
from mini_impl.finetuning.sft import add_lora
from mini_impl.finetuning.tasks import Task, examples, sums
from mini_impl.finetuning.train import fine_tune, measure
from mini_impl.losses import LossTerms, NonFiniteLoss
from tests.finetuning.models import close
from tests.tensors import same

STOP = 8


class Digit(NamedTuple):
    kind: str
    digit: int


class Letters:
    """Tokens 0 to 3 are digits, 4 to 7 their letters, 8 ends a sequence."""

    eos_token_id = STOP

    def decode(self, ids):
        return "".join(map(str, ids))


def toy(max_new_tokens=3):
    digits = {"low": [Digit("low", 0), Digit("low", 1)], "high": [Digit("high", 2), Digit("high", 3)]}
    return Task(
        tokenizer=Letters(),
        question=lambda problem: [problem.digit] * (1 + problem.digit % 2),  # of two lengths
        answer=lambda problem: [problem.digit + 4, STOP],
        reward=lambda problem, text: float(text == str(problem.digit + 4)),
        train=digits,
        held_out={**digits, "other": [Digit("other", 0)]},
        trained_kinds=("low", "high"),
        max_new_tokens=max_new_tokens,
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
    samples = issubclass(METHODS[name, loss], methods.RewardMethod)
    return METHODS[name, loss](toy(), **({"prompts": 8, "group_size": 4} if samples else {"sequences": 16}), **settings)


def drawn(number):
    """The problems that a method draws in its first step, and the seed of its samples."""
    stream = Stream(0, 0)
    return stream.problems(toy(), stream.kinds(toy(), number)), stream.seed()


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_examples_by_hand():
    tokens, labels, attention_mask = examples(toy(), [Digit("low", 0), Digit("low", 1)])
    assert tokens.tolist() == [[0, 4, STOP], [1, 1, 5]]
    assert labels.tolist() == [[4, STOP, -100], [-100, 5, STOP]]
    assert attention_mask.tolist() == [[True, True, False], [True, True, True]]


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
    for row, problem in enumerate(problem for problem in problems for _ in range(4)):
        assert rewards.view(-1)[row] == (texts[row] == str(problem.digit + 4))
        assert rollout.prompt[row][rollout.attention_mask[row]].tolist() == task.question(problem)


def test_texts_leave_out_the_end_of_sequence_and_what_comes_after():
    task = toy()
    rollout, _, _ = sample(small(), task, [Digit("low", 1)] * 8, 4, 1.0, seed=2)
    for row, text in enumerate(written(rollout, task.tokenizer)):
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
        for tokens, there in (("prompt", "attention_mask"), ("completion", "mask"), ("logprobs", "mask")):
            now = getattr(whole, tokens)[row][getattr(whole, there)[row]]
            assert torch.equal(now, getattr(rollout, tokens)[place][getattr(rollout, there)[place]])
    close(score(model, whole)[whole.mask], whole.logprobs[whole.mask], 1e-5)


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["corrected", "contrastive"])
def test_documented_grpo_learns(weights):
    method = few("grpo", "documented", reward_temperature=0.2, weights=weights)
    measures = fine_tune(begun(), method, steps=60, learning_rate=0.02).measures
    gain = {kind: measures[60].accuracy[kind] - measures[0].accuracy[kind] for kind in ("low", "high")}
    assert sum(gain.values()) / 2 >= 0.25, gain


@pytest.mark.parametrize(("name", "loss"), METHODS)
def test_whole_numbers_of_any_kind_mean_the_same(name, loss):
    """4 x 100 answers are 144 in eight bits."""
    samples = issubclass(METHODS[name, loss], methods.RewardMethod)
    sizes = {"prompts": 4, "group_size": 100, "num_iterations": 1} if samples else {"sequences": 100}
    found = []
    for kind in (int, np.uint8):
        model, method = small(), METHODS[name, loss](toy(), **{size: kind(count) for size, count in sizes.items()})
        training = fine_tune(model, method, steps=1, questions=1)
        found.append((training._replace(seconds=0.0), [weight.tolist() for weight in model.parameters()]))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "loss"), [method for method in METHODS if method != ("grpo", "documented")])
def test_every_other_method_learns_all_of_it(name, loss):
    method = few(name, loss)
    steps = 60 if isinstance(method, methods.RewardMethod) else 40
    training = fine_tune(begun(), method, steps=steps, learning_rate=0.02)
    assert training.measures[steps].accuracy["low"] == training.measures[steps].accuracy["high"] == 1
    assert training.measures[steps].kl > 0.1
    assert len(set(map(len, training.terms.values()))) == 1


def test_the_terms_are_those_of_the_loss_and_the_metrics_name_both_weights():
    """The sampler draws by its running average, at first evenly; the penalty is on weights of this batch's losses."""
    method = few("dapo", "documented", clip_penalty_weight=0.1, sampling_penalty_weight=0.1)
    ((loss, metrics),) = method.updates(small(), small(), Stream(0, 0))
    assert set(loss.terms) == {"basic", "clip", "sampling"}
    assert metrics.keys() == {"drawn: low", "drawn: high", "penalised: low", "penalised: high"}
    assert metrics["drawn: low"] == metrics["drawn: high"] == 0.5 != metrics["penalised: low"]
    assert metrics["penalised: low"] + metrics["penalised: high"] == pytest.approx(1)
    after = method.sampler.weights()
    ((_, metrics),) = method.updates(small(), small(), Stream(0, 1))
    assert [metrics["drawn: low"], metrics["drawn: high"]] == after.tolist()


def test_the_sampler_of_documented_dapo_has_a_gradient_by_live_losses_alone():
    for score_by, moves in (("loss", True), ("gradient norm", False)):
        method = few("dapo", "documented", clip_penalty_weight=0.0, score=score_by)
        ((loss, _),) = method.updates(small(), small(), Stream(0, 0))
        assert loss.terms["sampling"].requires_grad == moves


def test_documented_dapo_prefers_the_kind_that_goes_badly():
    """After training on `low` alone, `high` is drawn more often."""
    model, task = small(), toy()
    easy = METHODS["sft", "documented"](task._replace(trained_kinds=("low",)), sequences=16)
    fine_tune(model, easy, steps=30, learning_rate=0.02)
    method = few("dapo", "documented", sampler_temperature=0.5)
    for step in range(4):
        ((_, metrics),) = method.updates(model, model, Stream(0, step))
    assert metrics["drawn: high"] > 0.9 and metrics["penalised: high"] > 0.9


@pytest.mark.parametrize("reduce_by", ["sequence", "token", "length"])
def test_published_grpo_with_every_reduction(reduce_by):
    """Dr. GRPO's divides by the longest answer that there may be, and leaves the deviation of the rewards out."""
    model, method = begun(), few("grpo", "published", reduce_by=reduce_by, num_iterations=1, kl_weight=0.0)
    ((loss, _),) = method.updates(model, model, Stream(0, 0))
    problems, seed = drawn(method.prompts)
    rollout, rewards, _ = sample(model, method.task, problems, method.group_size, 1.0, seed)
    centred = (rewards - rewards.mean(1, keepdim=True)).flatten()
    deviation = rewards.std(1, keepdim=True).expand_as(rewards).flatten()
    if reduce_by == "length":
        expected = -(centred[:, None] * rollout.mask).sum() / (len(centred) * method.task.max_new_tokens)
    else:
        each = (centred / (deviation + 1e-4).where(deviation > 0, 1))[:, None] * rollout.mask
        by_sequence = (each.sum(1) / rollout.mask.sum(1)).mean()
        expected = -(by_sequence if reduce_by == "sequence" else each.sum() / rollout.mask.sum())
    torch.testing.assert_close(loss.total.detach(), expected, rtol=1e-4, atol=1e-6)


def test_published_dapo_uses_groups_with_a_signal_only():
    model, method = small(), few("dapo", "published")
    (_, metrics), _ = method.updates(model, model, Stream(0, 0))
    assert metrics["groups used"] <= method.prompts and metrics["groups drawn"] >= metrics["groups used"]


def test_published_dapo_without_a_signal_makes_no_update():
    task = toy()._replace(reward=lambda problem, text: 0.0)
    model = small()
    before = copy.deepcopy(model.state_dict())
    training = fine_tune(model, METHODS["dapo", "published"](task, prompts=4, group_size=2, rounds=2), steps=2)
    assert training.terms == {} and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def given_to_the_loss(monkeypatch, model, **settings):
    """(rewards [prompt, group], advantages [sequence], mask) of one step of published DAPO."""
    seen, loss_function = {}, dapo.published_loss

    def watched_advantages(rewards):
        seen["rewards"] = rewards
        return advantages(rewards)

    def watched_loss(new, old, gained, mask, *bounds):
        seen.update(advantages=gained, mask=mask)
        return loss_function(new, old, gained, mask, *bounds)

    monkeypatch.setattr(methods, "advantages", watched_advantages)
    monkeypatch.setattr(dapo, "published_loss", watched_loss)
    method = METHODS["dapo", "published"](toy(max_new_tokens=2), prompts=8, group_size=4, num_iterations=1, **settings)
    (update,) = method.updates(model, model, Stream(0, 0))
    assert math.isfinite(update[0].total.item())
    return seen["rewards"], seen["advantages"], seen["mask"]


def test_answers_as_long_as_may_be_lose_reward_or_those_without_an_end_are_left_out(monkeypatch):
    model = begun()
    plain, gained, mask = given_to_the_loss(monkeypatch, model, overlong="none")
    assert set(plain.flatten().tolist()) == {-1.0, 1.0} and (gained.view_as(plain) != 0).any(1).all()
    full = (mask.sum(1) == 2).view_as(plain)  # the longest there may be, a right answer with its end too
    assert full.any() and not full.all()
    punished, _, _ = given_to_the_loss(monkeypatch, model, overlong="penalty")
    assert torch.equal(punished, plain - full.to(plain))
    _, kept, there = given_to_the_loss(monkeypatch, model, overlong="filter")
    assert 0 < len(kept) < len(gained) and len(kept) == len(there)


def test_a_task_that_cannot_be():
    task = toy()
    for change, words in (
        ({"trained_kinds": ()}, "task must have trained_kinds.*got none of trained_kinds"),
        ({"trained_kinds": ("low", "none")}, r"got none of \[\('train', 'none'\), \('held_out', 'none'\)\]"),
        ({"train": {**task.train, "low": []}}, r"got none of \[\('train', 'low'\)\]"),
        ({"held_out": {**task.held_out, "other": []}}, r"got none of \[\('held_out', 'other'\)\]"),
    ):
        with pytest.raises(ValueError, match=words):
            METHODS["sft", "documented"](task._replace(**change))


def test_several_updates_of_one_rollout_move_the_ratio():
    """The second update of a rollout has another loss than the first, and the recorded log-probabilities stay."""
    model, method = begun(), few("grpo", "published", num_iterations=3, kl_weight=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    values = []
    for loss, _ in method.updates(model, model, Stream(0, 0)):
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        values.append(loss.total.item())
    assert len(values) == 3 and values[1] < values[0] - 1e-4


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        (("sft", "documented"), {"sequences": 0}, "sequences must be at least 1; got 0"),
        (("grpo", "published"), {"group_size": 1}, "group_size must be at least 2; got 1"),
        (("grpo", "published"), {"temperature": 0}, "temperature must be .* greater than 0; got 0"),
        (("grpo", "published"), {"clip_low": -1}, "clip_low must be .* at least 0; got -1"),
        (("grpo", "published"), {"reduce_by": "none"}, "reduce_by must be one of"),
        (("grpo", "published"), {"replay": -1}, "replay must be at least 0; got -1"),
        (("grpo", "published"), {"replay_weight": -1}, "replay_weight must be .* at least 0; got -1"),
        (("grpo", "documented"), {"weights": "none"}, "weights must be one of"),
        (("grpo", "documented"), {"reward_temperature": 0}, "reward_temperature must be .* greater than 0; got 0"),
        (("grpo", "documented"), {"distinct": True, "weights": "contrastive"}, "distinct is for documented and"),
        (("dapo", "documented"), {"sampling_penalty_weight": -1}, "sampling_penalty_weight must be .* at least 0"),
        (("dapo", "documented"), {"floor": 0.5}, "floor must be .* less than 0.5; got 0.5"),
        (("dapo", "documented"), {"quantile": 1}, "quantile must be .* less than 1; got 1"),
        (("dapo", "published"), {"overlong": "cut"}, "overlong must be one of"),
        (("dapo", "published"), {"buffer": 4}, "buffer must be at most 3, the longest answer; got 4"),
        (("dapo", "published"), {"rounds": 0}, "rounds must be at least 1; got 0"),
    ],
)
def test_settings_of_a_method_that_cannot_be(method, settings, says):
    with pytest.raises(ValueError, match=says):
        METHODS[method](toy(), **settings)


# --- the options of a method ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["documented", "published"])
def test_the_chunked_head_of_sft_is_the_loss_on_all_logits(form, monkeypatch):
    """To the bit where all of it fits into one chunk, value and gradients; within rounding where it does not."""
    model, method = small(), few("sft", form)
    tokens, labels, attention_mask = examples(method.task, drawn(16)[0])
    loss_function = sft.documented_loss if form == "documented" else sft.published_loss

    def with_slopes(loss):
        return loss.total, torch.autograd.grad(loss.total, [*model.parameters()])

    expected = with_slopes(loss_function(model(tokens, attention_mask), labels))
    for chunk, tolerance in ((2**22, 0), (18, 1e-5)):  # all at once; two places of nine logits
        monkeypatch.setattr(head, "CHUNK", chunk)
        ((loss, _),) = method.updates(model, model, Stream(0, 0))
        same(with_slopes(loss), expected, tolerance)


def test_an_answer_that_came_again_counts_once(monkeypatch):
    """`distinct` gives the loss the first of each, and changes the weights where there is another."""
    model, seen, loss_function = begun(), [], grpo.documented_loss
    monkeypatch.setattr(grpo, "documented_loss", lambda *given: seen.append(given[5]) or loss_function(*given))
    losses = []
    for distinct in (False, True):
        ((loss, _),) = few("grpo", "documented", distinct=distinct).updates(model, model, Stream(0, 0))
        losses.append(loss.total.item())
    assert seen[0] is None and seen[1][:, 0].all() and not seen[1].all() and losses[0] != losses[1]


def test_clipping_each_gradient_to_its_threshold():
    """In place of the norm of all: every entry is within its parameter's threshold, and some lie on it."""
    for penalty in (0.0, 0.01):
        model = small()
        method = few("dapo", "documented", adaptive_clip=True, clip_penalty_weight=penalty, quantile=0.5)
        ((loss, _),) = method.updates(model, model, Stream(0, 0))
        loss.total.backward()
        parameters = [*model.parameters()]
        before = [parameter.grad.clone() for parameter in parameters]
        norm = method.clip(parameters, 1e-9)
        assert norm.item() == pytest.approx(math.sqrt(sum(gradient.square().sum().item() for gradient in before)))
        for parameter, gradient, threshold in zip(parameters, before, method.thresholds.values, strict=True):
            assert torch.equal(parameter.grad, gradient.clamp(-threshold, threshold))
            assert (gradient.abs() > threshold).any()
    plain = few("dapo", "documented")
    plain.clip(parameters, 1e-3)
    assert torch.nn.utils.clip_grad_norm_(parameters, math.inf).item() == pytest.approx(1e-3, rel=1e-2)


REWARDED = [("grpo", "documented"), ("grpo", "published"), ("dapo", "published")]


@pytest.mark.parametrize("method", REWARDED, ids=map("-".join, REWARDED))
def test_replay_adds_the_cross_entropy_of_the_answers_before(method):
    """By hand; and without it the loss is as it was."""
    model, ref_model = begun(), small(1)
    updates = [
        list(few(*method, num_iterations=1, **settings).updates(model, ref_model, Stream(0, 0)))
        for settings in ({}, {"replay": 5, "replay_weight": 0.3})
    ]
    ((plain, _),), ((loss, _),) = updates
    assert set(loss.terms) == {*plain.terms, "replay"}
    assert all(torch.equal(loss.terms[name], value) for name, value in plain.terms.items())
    task = toy()
    rollout, _, _ = sample(ref_model, task, [Digit("", digit) for digit in range(4)], 1, 0.0, seed=0)
    nats = -score(model, rollout)  # of what ref_model answers to each digit: the term is a mean of some of these
    lowest, highest = (limit.item() for limit in nats[rollout.mask].aminmax())
    assert 0.3 * lowest - 1e-6 <= loss.terms["replay"].item() <= 0.3 * highest + 1e-6


def test_replay_keeps_what_the_model_could_do():
    """Trained on `low` alone, it forgets `high`, which it had learnt; with replay it does not."""
    learnt = small()
    fine_tune(learnt, few("sft", "documented"), steps=40, learning_rate=0.02)
    other = {0: 5, 1: 4}  # the letters of `low`, changed: something new to learn
    task = toy()._replace(trained_kinds=("low",))
    task = task._replace(reward=lambda problem, text: float(text == str(other.get(problem.digit, problem.digit + 4))))
    right = {}
    for replay in (0, 8):
        model = copy.deepcopy(learnt)
        more = {"temperature": 2.0, "kl_weight": 0.0, "replay": replay}
        method = METHODS["grpo", "published"](task, prompts=8, group_size=8, **more)
        training = fine_tune(model, method, steps=40, learning_rate=0.02)
        right[replay] = training.measures[40].accuracy
    assert right[0]["high"] < 0.5 and right[8]["high"] == 1, right


# --- measuring --------------------------------------------------------------------------------------------------------


def test_a_model_is_no_distance_from_itself():
    model = small()
    measures = measure(model, copy.deepcopy(model), toy())
    assert measures.kl == pytest.approx(0, abs=1e-7)
    assert 0 < measures.entropy <= math.log(9) + 1e-6
    assert measures.accuracy.keys() == {"low", "high", "other"}


def test_measures_are_the_same_every_time_and_change_nothing():
    model, ref_model = small(1), small(2)
    model.train()
    before = copy.deepcopy(model.state_dict())
    assert measure(model, ref_model, toy()) == measure(model, ref_model, toy())
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_only_lora_is_trained_and_the_model_before_counts_as_without_it():
    model = add_lora(small(), rank=2)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    training = fine_tune(model, few("sft", "documented"), steps=20, learning_rate=0.02)
    assert training.measures[0].kl == pytest.approx(0, abs=1e-7) and training.measures[20].kl > 1e-3
    for name, value in model.named_parameters():
        assert (name in frozen) == (not value.requires_grad)
        assert name not in frozen or torch.equal(frozen[name], value)


every_method = pytest.mark.parametrize(("name", "loss"), METHODS)


@every_method
def test_a_resumed_training_ends_with_the_same_bits(name, loss, tmp_path):
    whole, parts = small(), small()
    how = {"learning_rate": 0.01, "measure_every": 2, "seed": 4}
    expected = fine_tune(whole, few(name, loss), steps=6, **how)
    fine_tune(parts, few(name, loss), steps=4, **how, checkpoint=tmp_path / "run")
    parts = small()
    result = fine_tune(parts, few(name, loss), steps=6, **how, checkpoint=tmp_path / "run")
    assert result.terms == expected.terms and result.measures == expected.measures
    assert result.metrics == expected.metrics
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_is_named_with_its_step_before_it_reaches_the_weights():
    """Shortening it would make every gradient 0, or every weight NaN."""
    model, method = small(), few("sft", "documented")
    logits = model.embedding.weight
    method.updates = lambda *_: [(LossTerms.of(large=1e25 * (logits - logits.detach()).sum()), {})]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteLoss, match="training stopped at step 1: the norm of the gradient must hold finite"):
        fine_tune(model, method, steps=2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@every_method
def test_numbers_that_overflow_are_named_with_their_step_wherever_they_are_found(name, loss):
    with pytest.raises(NonFiniteLoss, match=r"training stopped at step [12]: .*(finite|NaN)"):
        fine_tune(small(), few(name, loss), steps=3, learning_rate=1e30)


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
    model, method = begun(), few("grpo", form, temperature=0.5, num_iterations=1, **more)
    ((loss, _),) = method.updates(model, model, Stream(0, 0))
    assert loss.terms["policy" if form == "published" else "log_ratio"].item() == pytest.approx(0, abs=1e-5)


def test_a_model_with_nothing_to_train():
    with pytest.raises(ValueError, match="model has no parameter to train"):
        fine_tune(small().requires_grad_(False), few("sft", "documented"), steps=1)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"measure_every": 0}, "measure_every must be at least 1; got 0"),
        ({"questions": 0}, "questions must be at least 1; got 0"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"learning_rate": 0}, "learning_rate must be a finite number greater than 0 .*; got 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be a finite number greater than 0; got nan"),
        ({"device": "abacus"}, "device: 'abacus' cannot be used here"),
    ],
    ids=str,
)
def test_settings_of_the_trainer_that_cannot_be(wrong, says):
    with pytest.raises(ValueError, match=says):
        fine_tune(small(), few("sft", "documented"), **wrong)


@every_method
def test_every_method_on_every_device(name, loss, device):
    training = fine_tune(small(), few(name, loss), steps=1, device=device)
    assert all(math.isfinite(value) for values in training.terms.values() for value in values)


def test_every_method_says_what_it_is():
    for method in METHODS.values():
        assert method.__doc__ and issubclass(method, methods.Method)


def test_the_example_of_the_package_runs():
    assert doctest.testmod(mini_impl.finetuning) == (0, 5)


def test_a_first_model_of_nan_is_named():
    model, task = sums()
    first = copy.deepcopy(model)
    with torch.no_grad():
        first.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLoss, match="KL and entropy of the model must hold finite numbers"):
        measure(model, first, task, questions=8)
