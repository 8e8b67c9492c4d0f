"""Sampling: by hand, by exact enumeration, against the plain forward pass, and against another implementation."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_impl.finetuning import sampling
from mini_impl.finetuning.decoder import Decoder
from mini_impl.finetuning.language_model import Cache
from mini_impl.finetuning.sampling import Rollout, completion_logits, generate, score, truncate, uniforms
from mini_impl.finetuning.sft import add_lora
from mini_impl.losses import NonFiniteLoss
from tests import pretend
from tests.finetuning import models
from tests.finetuning.models import close, golden_model
from tests.finetuning.test_policy import f64
from tests.tensors import same

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sampling.json").read_text())
STOP = 3
PROMPTS = [[1, 2, 4], [5], [6, 0, 9, 9, 2, 1], [5], [10, 8]]
INF = math.inf


def small(dtype=torch.float64, seed=0, spread=0.4, **changes):
    return models.small(seed, dtype, spread, **changes)


def adapted(dtype=torch.float64, spread=0.4):
    """The same with LoRA that changes it."""
    model = add_lora(small(dtype, spread=spread), targets=("query", "value", "gate"), rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(rollout: Rollout) -> list[list[int]]:
    """What was sampled in each row."""
    return [row[there].tolist() for row, there in zip(rollout.completion, rollout.mask, strict=True)]


# --- against another implementation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", GOLDEN["greedy"], ids=lambda case: str(case["model"]["width"]))
def test_greedy_parity(case, dtype):
    """Golden numbers made by tests/golden/make_sampling.py with transformers' generate and the same weights."""
    model = golden_model(case["model"], case["weights"], dtype)
    rollout = generate(model, case["prompts"], case["max_tokens"], case["stop"], temperature=0)
    expected = torch.tensor(case["completion"])
    assert torch.equal(rollout.completion, expected[:, : rollout.completion.shape[1]])
    assert (expected[:, rollout.completion.shape[1] :] == case["stop"]).all()
    logprobs = f64(case["logprobs"])[:, : rollout.completion.shape[1]]
    close(score(model, rollout).double()[rollout.mask], logprobs[rollout.mask], 1e-5)


@pytest.mark.parametrize("case", GOLDEN["truncated"], ids=lambda case: str(case["settings"]))
def test_truncation_parity(case):
    close(truncate(f64(case["logits"]), **case["settings"]).softmax(-1), f64(case["probabilities"]))


# --- truncation -------------------------------------------------------------------------------------------------------


def test_truncation_by_hand():
    logits = f64([0.5, 0.2, 0.05, 0.25]).log()
    assert torch.equal(truncate(logits), logits)
    close(truncate(logits, 0.5).softmax(-1), f64([0.25, 0.04, 0.0025, 0.0625]) / 0.355)
    for settings_, left in [
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 3}, [0, 1, 3]),
        ({"top_k": 1}, [0]),
        ({"top_p": 1}, [0, 1, 2, 3]),
        ({"top_p": 0.96}, [0, 1, 2, 3]),
        ({"top_p": 0.94}, [0, 1, 3]),
        ({"top_p": 0.74}, [0, 3]),
        ({"top_p": 0.49}, [0]),
        ({"top_p": 1e-9}, [0]),
        ({"top_k": 2, "top_p": 0.7}, [0, 3]),  # top-p is of what top-k left: 0.5 of 0.75 is less than 0.7
        ({"top_k": 2, "top_p": 0.65}, [0]),
        ({"temperature": 0}, [0]),
        ({"temperature": 0.5, "top_p": 0.7}, [0]),  # the temperature comes first
    ]:
        assert truncate(logits, **settings_).isfinite().nonzero()[:, 0].tolist() == left, settings_


def test_ties_stay_but_one_is_most_likely():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert truncate(logits, top_k=1).isfinite().tolist() == [[False, True, True, False]]
    assert truncate(logits, top_p=0.1).isfinite().tolist() == [[False, True, True, False]]
    assert truncate(logits, 0).isfinite().tolist() == [[False, True, False, False]]


@given(
    st.lists(st.integers(-800, 800).map(lambda hundredths: hundredths / 100), min_size=2, max_size=12),
    st.sampled_from([0.1, 0.7, 1.0, 5.0]),
    st.integers(1, 12) | st.none(),
    st.floats(0.01, 1) | st.none(),
)
def test_what_truncation_leaves(values, temperature, top_k, top_p):
    """The most likely tokens, no fewer than asked for and no more than it takes, in their old proportions."""
    logits = f64(values)
    top_k = None if top_k is None else min(top_k, len(values))
    left = truncate(logits, temperature, top_k, top_p)
    stays = left.isfinite()
    close(left[stays], logits[stays] / temperature, 1e-12)
    assert logits[stays].min() > logits[~stays].max() if not stays.all() else True
    after_k = (logits / temperature).where(truncate(logits, top_k=top_k).isfinite(), -INF).softmax(-1)
    if top_k is not None:
        assert stays.sum() <= (logits >= logits.sort(descending=True).values[top_k - 1]).sum()
    if top_p is None:
        assert stays.sum() >= (len(values) if top_k is None else top_k)
    else:
        last = logits[stays].min()
        assert after_k[stays].sum() >= top_p - 1e-9
        assert after_k[logits > last].sum() < top_p + 1e-9


def test_truncation_has_the_gradient_of_what_it_leaves():
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    for settings_ in ({}, {"temperature": 0.7, "top_k": 4}, {"top_p": 0.8}, {"temperature": 0}):
        kept = truncate(logits, **settings_)
        best = logits.argmax(-1, keepdim=True)
        (gradient,) = torch.autograd.grad(kept.log_softmax(-1).gather(-1, best).sum(), logits)
        temperature = settings_.get("temperature", 1.0) or 1.0
        expected = (torch.zeros_like(gradient).scatter(-1, best, 1) - kept.detach().softmax(-1)) / temperature
        close(gradient, expected)


def test_half_precision_is_left_for_float32():
    for dtype in (torch.float16, torch.bfloat16):
        assert truncate(torch.randn(2, 5).to(dtype), 0.7, 3, 0.9).dtype == torch.float32


# --- random streams ---------------------------------------------------------------------------------------------------


def test_the_mixing_is_that_of_splitmix64():
    """First outputs of the published generator for the states 0 and 1234567."""
    mixed = sampling._mix(np.array([0, 1234567], dtype=np.uint64))
    assert mixed.tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_uniform_numbers():
    many = uniforms(5, range(2000), 50)
    assert many.shape == (2000, 50) and many.min() >= 0 and many.max() < 1
    assert (many * 2**23 == np.round(many * 2**23)).all() and (many.astype(np.float32) == many).all()
    counts = np.histogram(many, bins=64, range=(0, 1))[0]
    expected = many.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 4 * math.sqrt(2 * 63)
    assert abs(np.corrcoef(many[:, :-1].ravel(), many[:, 1:].ravel())[0, 1]) < 4 / math.sqrt(many.size)
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 4 / math.sqrt(many.size)
    assert abs(np.corrcoef(uniforms(6, range(2000), 50).ravel(), many.ravel())[0, 1]) < 4 / math.sqrt(many.size)
    assert len({tuple(row) for row in many.tolist()}) == 2000


@given(st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(1, 9))
def test_a_row_draws_the_same_whatever_is_beside_it(seed, rows, count):
    many = uniforms(seed, rows, count + 3)
    for row, numbers in zip(rows, many, strict=True):
        assert (uniforms(seed, [row], count)[0] == numbers[:count]).all()


# --- the distribution -------------------------------------------------------------------------------------------------


def paths(model, prompt, max_new_tokens, truncation):
    """{completion: its probability}, by going through all of them with the plain forward pass."""
    found, open_ones = {}, {(): 1.0}
    for _ in range(max_new_tokens):
        longer = {}
        for said, probability in open_ones.items():
            logits = model(torch.tensor([[*prompt, *said]]))[0, -1]
            for token, share in enumerate(truncate(logits, *truncation).softmax(-1).tolist()):
                goes_on = longer if token != STOP else found
                goes_on[(*said, token)] = probability * share
        open_ones = longer
    return {path: p for path, p in {**found, **open_ones}.items() if p > 0}


TRUNCATIONS = [(1.0, None, None), (0.6, None, None), (1.5, 3, None), (1.0, None, 0.7)]


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@torch.no_grad()
def test_samples_have_the_exact_distribution(truncation):
    """20,000 answers to one prompt against the probabilities of all answers that there are, by a chi-square bound."""
    model, count = small(seed=3, vocab_size=5), 20_000
    exact = paths(model, [1, 4], 3, truncation)
    assert sum(exact.values()) == pytest.approx(1)
    rollout = generate(model, [[1, 4]] * count, 3, STOP, *truncation, seed=11)
    counts = dict.fromkeys(exact, 0)
    for tokens in tokens_of(rollout):
        counts[tuple(tokens)] += 1  # none outside the support
    often = [path for path, p in exact.items() if count * p >= 5]
    rest = count * sum(p for path, p in exact.items() if path not in often)
    excess = sum((counts[path] - count * exact[path]) ** 2 / (count * exact[path]) for path in often)
    assert len(often) > 4 and excess < len(often) + 4 * math.sqrt(2 * len(often))
    assert abs(count - sum(counts[path] for path in often) - rest) <= 4 * math.sqrt(rest + 1)


@torch.no_grad()
def test_a_draw_picks_the_token_in_whose_stretch_it_lies():
    model = small(vocab_size=6)
    probabilities = model(torch.tensor([[2, 1]]))[0, -1].softmax(-1)
    rollout = generate(model, [[2, 1]] * 200, 1, STOP, seed=4)
    ends = probabilities.cumsum(-1)
    for token, draw in zip(rollout.completion[:, 0].tolist(), uniforms(4, range(200), 1)[:, 0], strict=True):
        assert ends[token] - probabilities[token] <= draw < ends[token] or abs(draw - ends[token]) < 1e-9


@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-23])
def test_the_ends_of_the_line_are_tokens_that_stay(draw, monkeypatch):
    """The smallest and the largest draw, with the first and the last token left out: no token of probability 0."""
    monkeypatch.setattr(sampling, "uniforms", lambda seed, rows, count: np.full((len(rows), count), draw))
    for seed in range(20):
        model = small(torch.float32, seed)
        rollout = generate(model, PROMPTS, 5, STOP, top_k=2)
        assert rollout.logprobs.isfinite().all() and (rollout.logprobs[rollout.mask] < 0).all()


# --- the same again ---------------------------------------------------------------------------------------------------

how = st.tuples(*map(st.sampled_from, ([1.0, 0.5, 2.0], [None, 1, 4, 11], [None, 0.5, 0.9, 1.0])))


@given(how, st.integers(1, 20), st.integers(0, 10**6))
@settings(max_examples=25)
def test_what_was_recorded_is_what_a_forward_pass_gives(truncation, max_new_tokens, seed):
    model = small(seed=seed % 7)
    rollout = generate(model, PROMPTS, max_new_tokens, STOP, *truncation, seed=seed)
    close(score(model, rollout, *truncation).detach(), rollout.logprobs, 1e-10)
    for row, prompt in enumerate(PROMPTS):  # and each row alone, without padding
        tokens = tokens_of(rollout)[row]
        logits = model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        expected = truncate(logits, *truncation).log_softmax(-1)[torch.arange(len(tokens)), tokens]
        close(rollout.logprobs[row][rollout.mask[row]], expected.detach(), 1e-10)


@given(how, st.integers(0, 10**6))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_float32_it_is_so_to_five_digits(device, truncation, seed):
    model = small(torch.float32, seed % 7, 0.2).to(device)
    rollout = generate(model, PROMPTS, 12, STOP, *truncation, seed=seed)
    assert all(part.device.type == device for part in rollout)
    close(score(model, rollout, *truncation).detach(), rollout.logprobs, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [small, adapted])
def test_half_precision(make, dtype):
    model = make(dtype, spread=0.1)
    rollout = generate(model, PROMPTS, 12, STOP, seed=1)
    assert rollout.logprobs.dtype == torch.float32
    close(score(model, rollout).detach(), rollout.logprobs, 0.05)


@pytest.mark.parametrize("truncation", [(0.7, None, None), (1.0, 4, 0.9)], ids=str)
def test_a_score_waits_twice(truncation):
    """For what it was given, and for what came out; inside, a score of what is known to fit does not wait at all."""
    rollout = generate(small(torch.float32), PROMPTS, 5, STOP, *truncation, seed=4)
    with pretend.device() as elsewhere:
        model, there = small(torch.float32).to(elsewhere), Rollout(*(part.to(elsewhere) for part in rollout))
        with pretend.waits() as waits:
            score(model, there, *truncation).sum().backward()
        assert len(waits) == 2, waits
        with pretend.waits() as waits:
            sampling._score(model, there, *truncation, padded=True).sum().backward()
        assert not waits


def test_score_has_the_gradient_of_the_log_probabilities():
    model = small()
    rollout = generate(model, PROMPTS, 6, STOP, 0.8, seed=2)
    weights = torch.randn(rollout.logprobs.shape, dtype=torch.float64)
    total = (score(model, rollout, 0.8) * weights).sum()
    gradients = torch.autograd.grad(total, list(model.parameters()))
    expected = 0
    for row, (prompt, tokens) in enumerate(zip(PROMPTS, tokens_of(rollout), strict=True)):
        logprobs = (model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
        expected = expected + (logprobs[torch.arange(len(tokens)), tokens] * weights[row][rollout.mask[row]]).sum()
    same(gradients, torch.autograd.grad(expected, list(model.parameters())))


def test_tokens_that_are_left_out_score_minus_infinity_and_have_no_gradient():
    model = small()
    rollout = generate(model, PROMPTS, 6, STOP, 2.0, seed=2)
    logprobs = score(model, rollout, top_k=1)
    assert (logprobs == -INF).any() and (logprobs[~rollout.mask] == 0).all()
    logprobs[logprobs.isfinite()].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_greedy_is_certain():
    model = small()
    rollout = generate(model, PROMPTS, 9, STOP, temperature=0, seed=1)
    same(rollout, generate(model, PROMPTS, 9, STOP, temperature=0, seed=2))
    assert (rollout.logprobs == 0).all() and (score(model, rollout, temperature=0) == 0).all()
    same(rollout, generate(model, PROMPTS, 9, STOP, top_k=1, seed=3))


def test_completion_logits_are_those_that_predict_the_tokens():
    model = small()
    rollout = generate(model, [[1, 2], [4, 0]], 5, STOP, seed=0)
    whole = torch.cat([rollout.prompt, rollout.completion], 1)
    close(completion_logits(model, rollout), model(whole)[:, 1:-1])


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("truncation", [(1.0, None, None), (1.3, 6, 0.95)], ids=str)
def test_a_row_is_the_same_alone_and_in_a_batch(truncation, dtype):
    model = small(dtype=dtype)
    prompts = [PROMPTS[i % 5] for i in range(40)]
    batch = generate(model, prompts, 15, STOP, *truncation, seed=6)
    assert len({len(tokens) for tokens in tokens_of(batch)}) > 5
    for row, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 15, STOP, *truncation, seed=6, rows=[row])
        assert tokens_of(alone)[0] == tokens_of(batch)[row]
        close(alone.logprobs[0][alone.mask[0]], batch.logprobs[row][batch.mask[row]], 1e-5)


@given(st.permutations(range(8)), st.integers(0, 10**6))
@settings(max_examples=20)
def test_rows_may_come_in_any_order(order, seed):
    model, prompts = small(), [PROMPTS[i % 5] for i in range(8)]
    here = generate(model, prompts, 7, STOP, seed=seed)
    there = generate(model, [prompts[i] for i in order], 7, STOP, seed=seed, rows=order)
    same(there, Rollout(*(part[order] for part in here)))


def test_streams_differ_by_row_and_seed():
    model = small()
    answers = tokens_of(generate(model, [[1, 2]] * 50, 12, STOP, seed=0))
    assert len(set(map(tuple, answers))) > 30
    assert answers != tokens_of(generate(model, [[1, 2]] * 50, 12, STOP, seed=1))
    assert answers == tokens_of(generate(model, [[1, 2]] * 50, 12, STOP, seed=0))
    assert tokens_of(generate(model, [[1, 2]] * 2, 12, STOP, rows=[7, 7])) == [answers[7]] * 2


@pytest.mark.parametrize("make", [small, adapted])
@torch.no_grad()
def test_the_decoder_is_the_model(make):
    """Rows that are branched, left out and gone on with, against the plain forward pass on all their tokens."""
    model, source = make(), torch.Generator().manual_seed(0)
    time, rows = 4, [[1, 2, 4, 9], [5], [6, 0]]
    attention_mask = torch.tensor([[False] * (time - len(row)) + [True] * len(row) for row in rows])
    cache = Cache()
    model.hidden(torch.tensor([[0] * (time - len(row)) + row for row in rows]), attention_mask, cache)
    decoder = Decoder(model, cache, attention_mask, 30)
    for step in range(30):
        branches = torch.randint(len(rows), (1 + step % 5,), generator=source) if step % 3 else torch.arange(len(rows))
        decoder.branch(branches)
        tokens = torch.randint(11, (len(branches),), generator=source)
        rows = [rows[branch] + [token] for branch, token in zip(branches.tolist(), tokens.tolist(), strict=True)]
        for ours, row in zip(decoder(tokens), rows, strict=True):
            close(ours, model.hidden(torch.tensor([row]))[0, -1])


def test_adapters_count():
    plain, with_lora = small(), adapted()
    here, there = (tokens_of(generate(model, PROMPTS, 10, STOP, seed=3)) for model in (plain, with_lora))
    assert here != there
    rollout = generate(with_lora, PROMPTS, 10, STOP, seed=3)
    close(score(with_lora, rollout).detach(), rollout.logprobs)


# --- the end ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 10))
@settings(max_examples=30)
def test_the_shape_of_a_rollout(max_new_tokens, seed, stop):
    rollout = generate(small(), PROMPTS, max_new_tokens, stop, seed=seed)
    lengths = rollout.mask.sum(1)
    assert rollout.prompt.tolist() == [[stop] * (6 - len(prompt)) + prompt for prompt in PROMPTS]
    assert rollout.attention_mask.tolist() == [[False] * (6 - len(prompt)) + [True] * len(prompt) for prompt in PROMPTS]
    assert rollout.completion.shape == rollout.mask.shape == rollout.logprobs.shape == (5, lengths.max())
    assert rollout.completion.dtype == torch.int64 and rollout.mask.dtype == torch.bool
    for row, length in enumerate(lengths.tolist()):
        said = rollout.completion[row].tolist()
        assert 1 <= length <= max_new_tokens and stop not in said[: length - 1]
        assert said[length - 1] == stop or length == max_new_tokens
        assert set(said[length:]) <= {stop}
        assert rollout.mask[row].tolist() == [True] * length + [False] * (len(said) - length)
    assert (rollout.logprobs[rollout.mask] < 0).all() and (rollout.logprobs[~rollout.mask] == 0).all()


@pytest.fixture
def steps(monkeypatch):
    """A list of how many tokens the decoder read, step by step."""
    found, decode = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, tokens: found.append(len(tokens)) or decode(self, tokens))
    return found


def test_it_ends_when_all_have_stopped(steps):
    """One that always says the stop token first, and one that never does."""
    model = small()
    favourite = int(model(torch.tensor([[1, 2]]))[0, -1].argmax())
    rollout = generate(model, [[1, 2]] * 3, 50, favourite, temperature=0)
    assert rollout.completion.tolist() == [[favourite]] * 3 and not steps
    never = next(token for token in range(11) if token not in generate(model, [[1, 2]], 9, 0, 0).completion)
    assert generate(model, [[1, 2]], 9, never, temperature=0).mask.sum() == 9
    assert steps == [1] * len(steps)


def test_what_has_stopped_and_what_is_the_same_costs_nothing(steps):
    """The model reads each continuation once, and only those that go on."""
    rollout = generate(small(), [[1, 2]] * 30 + [[4]] * 30, 8, STOP, seed=5)
    rows = list(zip([(1, 2)] * 30 + [(4,)] * 30, tokens_of(rollout), strict=True))
    goes_on = [[(prompt, *said[:step]) for prompt, said in rows if len(said) > step] for step in range(1, 8)]
    assert steps == [len(set(open_ones)) for open_ones in goes_on if open_ones] and steps[0] < 25


def test_the_model_stays_as_it_was():
    model = small().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    (model(torch.tensor([[1, 2]])).sum()).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    rollout = generate(model, PROMPTS, 5, STOP, seed=1)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert not any(part.requires_grad or part.is_inference() for part in rollout)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    with torch.no_grad():
        model.embedding.weight[0] = math.nan
    with pytest.raises(NonFiniteLoss):
        generate(model, PROMPTS, 5, STOP)
    assert [module.training for module in model.modules()] == modes


def test_training_goes_on_after_sampling():
    """Nothing that sampling left behind (rotations that are kept, say) is unfit for a gradient."""
    model = small(rope_base=77.0)
    rollout = generate(model, PROMPTS, 5, STOP, seed=1)
    ratio = (score(model, rollout) - rollout.logprobs).exp()
    (ratio * rollout.mask).sum().backward()
    assert model.embedding.weight.grad.abs().max() > 0


# --- bad input --------------------------------------------------------------------------------------------------------


def call(model=None, prompts=PROMPTS, max_new_tokens=3, eos_token_id=STOP, **settings):
    return lambda: generate(model or small(), prompts, max_new_tokens, eos_token_id, **settings)


def nothing_but_nan():
    model = small()
    with torch.no_grad():
        model.norm.weight[2] = math.nan
    return model


ALL = torch.tensor([[True, True]])
GOOD = Rollout(torch.tensor([[1, 2]]), ALL, torch.tensor([[4, STOP]]), ALL, torch.zeros(1, 2))


def scored(model=None, **changes):
    return lambda: score(model or small(), GOOD._replace(**changes))


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (call(model=torch.nn.Linear(2, 2)), TypeError, "model must be a LanguageModel; got Linear"),
        (call(max_new_tokens=0), ValueError, "max_new_tokens must be at least 1; got 0"),
        (call(prompts=[]), ValueError, r"none of them empty; got \[\]"),
        (call(prompts=[[1], []]), ValueError, r"prompts\[1\] is \[\]"),
        (call(prompts="12"), TypeError, "prompts must be lists of token ids, whole numbers .*got '12'"),
        (call(prompts=[1, 2]), TypeError, r"prompts\[0\] is 1"),
        (call(prompts=[[1], "2"]), TypeError, r"prompts\[1\] is '2'"),
        (call(prompts=[[1], [2.0]]), TypeError, r"prompts\[1\] is \[2.0\]"),
        (call(prompts=[[True]]), TypeError, r"prompts\[0\] is \[True\]"),
        (call(prompts=[[1, 11]]), ValueError, r"from 0 to 10, .*prompts\[0\] is \[1, 11\]"),
        (call(prompts=[[-1]]), ValueError, r"prompts\[0\] is \[-1\]"),
        (call(eos_token_id=11), ValueError, "eos_token_id must be at most 10, the last token id; got 11"),
        (call(eos_token_id=-1), ValueError, "eos_token_id must be at least 0"),
        (call(temperature=-0.1), ValueError, "temperature must be a finite number of at least 0; got -0.1"),
        (call(top_k=12), ValueError, "top_k must be at most 11, the number of tokens; got 12"),
        (call(top_p=0), ValueError, "top_p must be a finite number greater than 0 and of at most 1; got 0"),
        (call(top_p=1.1), ValueError, "top_p must be .*of at most 1; got 1.1"),
        (call(seed=-1), ValueError, "seed must be at least 0"),
        (call(seed=2**64), ValueError, "seed must be at most"),
        (call(rows=[0, 1]), ValueError, r"rows must be .* each of the 5 prompts; got \[0, 1\]"),
        (call(rows=3), ValueError, "rows must be whole numbers.*got 3"),
        (call(rows=[0, 1, 2, 3, -4]), ValueError, r"rows\[4\] must be at least 0; got -4"),
        (call(nothing_but_nan()), NonFiniteLoss, "log-probabilities of what was sampled must hold finite numbers"),
        (lambda: truncate([1.0, 2.0]), TypeError, "logits must be a floating-point tensor"),
        (lambda: score(small(), "rollout"), TypeError, "rollout must be what generate returned; got str"),
        (scored(prompt=torch.tensor([[1, 12]])), ValueError, "rollout .* from 0 to 10; got ids from 1 to 12"),
        (scored(mask=torch.ones(1, 2)), ValueError, "attention_mask must be a bool tensor"),
        (scored(prompt=ALL.long().repeat(2, 1)), ValueError, "rollout must have a completion for each.*1 and 2"),
        (scored(nothing_but_nan()), NonFiniteLoss, "NaN"),
    ],
)
def test_bad_input_is_named(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_infinite_logits_are_named():
    """A model that overflows: the largest logits are +inf, and their softmax is NaN."""
    model = small(dtype=torch.float32)
    with torch.no_grad():
        model.embedding.weight[4] *= 1e38
        model.norm.weight.mul_(1e6)
    with pytest.raises(NonFiniteLoss):
        for token in itertools.count():
            generate(model, [[token % 4]], 3, STOP)
