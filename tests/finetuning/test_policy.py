"""What GRPO and DAPO share: by hand, by exact enumeration, against plain autograd, against TRL and Liger."""

import json
import math
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mini_impl.finetuning.policy import (
    advantages,
    head_logprobs,
    head_loss,
    kl_k3,
    reduce,
    token_logprobs,
    token_loss,
    token_weights,
)
from mini_impl.losses import NonFiniteLoss

GOLDEN = Path(__file__).parents[1] / "golden" / "policy.json"
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
COMPILER = (
    any(map(shutil.which, ("c++", "g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
)
BY = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "length"}  # TRL's name -> ours


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def whole(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def same(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# --- log-probabilities ------------------------------------------------------------------------------------------------


def test_token_logprobs_by_hand():
    logits = f64([[0.0, math.log(2), 0.0], [math.log(3), 0.0, -math.inf]]) + 5  # p = 1/4 1/2 1/4;  3/4 1/4 0
    same(token_logprobs(logits, torch.tensor([1, 0])).exp(), f64([1 / 2, 3 / 4]))
    assert token_logprobs(logits, torch.tensor([0, 2])).tolist() == [pytest.approx(math.log(1 / 4)), -math.inf]


@given(st.lists(st.integers(1, 4), max_size=3), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 10**6))
def test_token_logprobs_against_log_softmax(shape, vocabulary, size, seed):
    logits, tokens = size * random(*shape, vocabulary, seed=seed), whole(vocabulary, *shape, seed=seed)
    ours = token_logprobs(logits, tokens)
    same(ours, logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0])
    assert ours.max() <= 0
    assert torch.equal(ours, token_logprobs(logits, tokens.int()))  # ids of any whole-number dtype


def test_token_logprobs_hold_one_table_only():
    logits, held = random(4, 5, 100).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x) or x, lambda x: x):
        token_logprobs(logits, whole(100, 4, 5))
    assert len({tensor.data_ptr() for tensor in held if tensor.numel() >= logits.numel()}) == 1
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, whole(4, 3)), (random(3, 4).requires_grad_(),))


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor that was made has, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.numbers = self.products = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        self.products += function._schema.name in ("aten::mm", "aten::addmm_", "aten::addmm")
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def plain(hidden, weight, tokens, temperature=1.0):
    return (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]


heads = st.tuples(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 7),
    st.floats(0.1, 5),
    st.integers(1, 30),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.integers(0, 10**6),
)


@given(heads)
@settings(max_examples=60)
def test_head_logprobs_against_the_plain_head(case):
    shape, width, vocabulary, temperature, chunk, trained, seed = case
    inputs = [2 * random(*shape, width, seed=seed), random(vocabulary, width, seed=seed + 1)]
    inputs = [value.requires_grad_(wanted) for value, wanted in zip(inputs, trained, strict=True)]
    tokens, upstream = whole(vocabulary, *shape, seed=seed), random(*shape, seed=seed + 2)
    ours, theirs = head_logprobs(*inputs, tokens, temperature, chunk), plain(*inputs, tokens, temperature)
    same(ours, theirs)
    assert ours.max() <= 0
    with_gradient = [value for value in inputs if value.requires_grad]
    for one, other in zip(
        torch.autograd.grad(ours, with_gradient, upstream), torch.autograd.grad(theirs, with_gradient, upstream),
        strict=True,
    ):  # fmt: skip
        same(one, other, 1e-10)


@given(heads)
@settings(max_examples=60)
def test_head_loss_against_the_plain_head(case):
    """With a loss that bends: the clipped one, every token with a weight of its own; scaled after, as a total is."""
    shape, width, vocabulary, temperature, chunk, trained, seed = case
    inputs = [2 * random(*shape, width, seed=seed), random(vocabulary, width, seed=seed + 1)]
    inputs = [value.requires_grad_(wanted) for value, wanted in zip(inputs, trained, strict=True)]
    tokens = whole(vocabulary, *shape, seed=seed)
    old = plain(*inputs, tokens, temperature).detach() + 0.3 * random(*shape, seed=seed + 2)
    advantage, weights = random(2, *shape, seed=seed + 3)

    def loss(logprobs, part):
        ratio = (logprobs - old[part]).exp()
        clipped = ratio.clamp(0.8, 1.28)
        return -weights[part] * torch.minimum(ratio * advantage[part], clipped * advantage[part])

    ours = 3 * head_loss(*inputs, tokens, loss, temperature, chunk)
    theirs = 3 * loss(plain(*inputs, tokens, temperature), slice(None)).sum()
    same(ours, theirs)
    with_gradient = [value for value in inputs if value.requires_grad]
    for one, other in zip(
        torch.autograd.grad(ours, with_gradient), torch.autograd.grad(theirs, with_gradient), strict=True
    ):
        same(one, other, 1e-10)


def test_the_example_of_head_loss_is_the_published_loss():
    hidden, weight, tokens = random(3, 5, 4).requires_grad_(), random(7, 4, seed=1).requires_grad_(), whole(7, 3, 5)
    old = plain(hidden, weight, tokens).detach() + 0.2 * random(3, 5, seed=2)
    old, scores, mask = old.clamp(max=0), random(3, seed=3), torch.arange(5) < torch.tensor([[5], [1], [3]])
    weights = token_weights(mask, by="sequence", dtype=torch.float64)
    ours = head_loss(
        hidden, weight, tokens,
        lambda logprobs, part: weights[part] * token_loss(logprobs, old[part], scores[part], 0.2, 0.28),
        chunk=4,
    )  # fmt: skip
    theirs = reduce(token_loss(plain(hidden, weight, tokens), old, scores, 0.2, 0.28), mask, "sequence")
    same(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(theirs, (hidden, weight)), strict=True
    ):
        same(one, other)


def test_heads_gradcheck():
    hidden, weight, tokens = random(2, 3, 4).requires_grad_(), random(5, 4, seed=1).requires_grad_(), whole(5, 2, 3)
    assert torch.autograd.gradcheck(lambda h, w: head_logprobs(h, w, tokens, 0.7, chunk=4), (hidden, weight))

    def loss(h, w):
        return head_loss(h, w, tokens, lambda logprobs, part: logprobs.sin(), 0.7, chunk=4)

    # gradcheck itself goes backward twice, which head_loss refuses: central differences here
    for which, ours in enumerate(torch.autograd.grad(loss(hidden, weight), (hidden, weight))):
        for i in range(ours.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                inputs = [hidden.detach().clone(), weight.detach().clone()]
                inputs[which].view(-1)[i] += step
                ends.append(loss(*inputs).item())
            assert ours.view(-1)[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


def test_the_logits_are_never_held():
    """1600 tokens over 600 words, 20 at a time: nothing as large as the logits; and no product more than is needed."""
    tokens, upstream = whole(600, 80, 20), random(80, 20)
    for frozen in (False, True):
        hidden, weight = random(80, 20, 8).requires_grad_(), random(600, 8, seed=1).requires_grad_(not frozen)
        with Largest() as seen:
            head_logprobs(hidden, weight, tokens, chunk=20).backward(upstream)
        # forward: logits, and the hidden states' gradient; backward: if the head is trained, logits again, and its own
        assert seen.numbers <= 12800 < 1600 * 600 and seen.products == 80 * (2 if frozen else 4)
        with Largest() as seen:
            head_loss(hidden, weight, tokens, lambda logprobs, part: logprobs * upstream[part], chunk=20).backward()
        assert seen.numbers <= 12800 and seen.products == 80 * (2 if frozen else 3)
        with torch.no_grad(), Largest() as seen:
            head_logprobs(hidden, weight, tokens, chunk=20)
            head_loss(hidden, weight, tokens, lambda logprobs, part: logprobs, chunk=20)
        assert seen.products == 160  # the logits alone


def test_what_the_chunked_heads_do_not_offer_is_said():
    hidden, weight, tokens = random(2, 3, 4).requires_grad_(), random(5, 4, seed=1).requires_grad_(), whole(5, 2, 3)
    logprobs = head_logprobs(hidden, weight, tokens)
    first = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(logprobs.sum(), (hidden, weight)), strict=True):
        assert torch.equal(one, other)  # two backward passes are all right
    loss = head_loss(hidden, weight, tokens, lambda logprobs, part: -logprobs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="head_loss has one backward pass"):
        loss.backward()
    for once in (head_logprobs(hidden, weight, tokens).sum(), head_loss(hidden, weight, tokens, lambda x, _: -x)):
        with pytest.raises(RuntimeError, match=r"head_lo.* has no second derivative"):
            torch.autograd.grad(once, hidden, create_graph=True)


@pytest.mark.parametrize("spread", [1e3, 1e6])
def test_logits_far_apart(spread):
    """The largest takes all: no overflow, log-probabilities of -spread, finite gradients."""
    hidden, weight = torch.eye(2, requires_grad=True), torch.tensor([[spread, 0.0], [0.0, -spread]], requires_grad=True)
    logprobs = head_logprobs(hidden, weight, torch.tensor([1, 1]))
    assert logprobs.tolist() == [-spread, -spread]
    logprobs.sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
def test_peak_memory_is_a_third_at_most():
    from bench.head import measure

    for variants in measure(turns=1).values():
        assert variants["head_logprobs"]["peak, to plain"] < 1 / 3 and variants["head_loss"]["peak, to plain"] < 1 / 3


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_by_hand():
    rewards = f64([[0, 1], [3, 3]])
    assert advantages(rewards, epsilon=0).tolist() == [[pytest.approx(-(0.5**0.5)), pytest.approx(0.5**0.5)], [0, 0]]
    assert advantages(rewards, ddof=0, epsilon=0).tolist() == [[-1, 1], [0, 0]]
    assert advantages(rewards, scale=False).tolist() == [[-0.5, 0.5], [0, 0]]
    assert advantages(rewards).tolist()[0][1] == pytest.approx(0.5 / (0.5**0.5 + 1e-4), rel=1e-12)
    nearly = advantages(f64([[1, 1, 1, 1.001]]))  # noise of 0.001 becomes a full-size signal
    assert nearly.max().item() == pytest.approx(0.00075 / (0.0005 + 1e-4))  # 1.25


groups = st.tuples(st.integers(1, 4), st.integers(2, 6), st.integers(0, 10**6))


@given(groups, st.sampled_from([0, 1]), st.floats(0.01, 1e3), st.floats(-1e3, 1e3))
def test_advantages_are_z_scores_of_each_group(case, ddof, unit, level):
    prompts, group, seed = case
    rewards = random(prompts, group, seed=seed)
    scores = advantages(rewards, ddof, epsilon=0)
    same(scores.mean(1), torch.zeros(prompts, dtype=torch.float64))
    same(scores.std(1, correction=ddof), torch.ones(prompts, dtype=torch.float64))
    same(advantages(unit * rewards + level, ddof, epsilon=0), scores, 1e-7)  # the level and unit of a reward are free
    same(advantages(rewards, ddof, epsilon=0.1) * (rewards.std(1, correction=ddof, keepdim=True) + 0.1),
         rewards - rewards.mean(1, keepdim=True))  # fmt: skip


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9), st.booleans(), st.sampled_from([0.0, 1e-4]))
def test_equal_rewards_teach_exactly_nothing(reward, group, scale, epsilon):
    """In float32, where the mean of equal numbers may be rounded."""
    assert advantages(torch.full((2, group), reward), epsilon=epsilon, scale=scale).tolist() == [[0.0] * group] * 2


# --- the loss per token -----------------------------------------------------------------------------------------------


def test_token_loss_by_hand():
    """Rows: advantage 2 and -3; columns: ratio 0.5, 0.9, 1, 1.1, 1.5; clip 0.2 below and 0.28 above."""
    ratio = f64([[0.5, 0.9, 1, 1.1, 1.5]] * 2)
    old = torch.full((2, 5), -2.0, dtype=torch.float64)
    logprobs = (old + ratio.log()).requires_grad_()
    loss = token_loss(logprobs, old, f64([2, -3]), 0.2, 0.28)
    same(loss, f64([[-1, -1.8, -2, -2.2, -2.56], [2.4, 2.7, 3, 3.3, 4.5]]))
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)  # -rho A, or 0 where the clip holds
    same(gradient, f64([[-1, -1.8, -2, -2.2, 0], [0, 2.7, 3, 3.3, 4.5]]))


def test_clipping_higher_frees_the_unlikely_token():
    """A token of 0.01 may rise to 0.012 with a bound of 0.2 and to 0.0128 with 0.28; one of 0.9 meets no bound."""
    for clip_high in (0.2, 0.28):
        for probability in (0.01, 0.9):
            highest = min(1, probability * (1 + clip_high))
            logprobs = f64([[math.log(highest * 0.999)], [math.log(min(highest * 1.001, 1))]]).requires_grad_()
            loss = token_loss(logprobs, torch.full_like(logprobs, math.log(probability)), f64([1, 1]), 0.2, clip_high)
            below, above = torch.autograd.grad(loss.sum(), logprobs)[0].flatten().tolist()
            assert below < 0 and (above == 0) == (probability == 0.01)


@given(st.integers(1, 3), st.integers(1, 4), st.floats(0, 0.9), st.floats(0, 3), st.integers(0, 10**6))
def test_token_loss_at_the_old_policy_and_its_gradient(sequences, time, low, high, seed):
    old = -random(sequences, time, seed=seed).abs() - 0.1
    scores, logprobs = random(sequences, seed=seed + 1), old.clone().requires_grad_()
    loss = token_loss(logprobs, old, scores, low, high)
    same(loss.detach(), -scores[:, None].expand(-1, time))
    same(torch.autograd.grad(loss.sum(), logprobs)[0], -scores[:, None].expand(-1, time))  # no clip holds at ratio 1
    moved = (old + 0.09 * random(sequences, time, seed=seed + 2)).requires_grad_()
    if low > 0.3 and high > 0.5:
        assert torch.autograd.gradcheck(lambda x: token_loss(x, old, scores, low, high), (moved.clamp(max=0),))


def test_only_logprobs_carry_a_gradient():
    tensors = [(-random(2, 3, seed=i).abs() - 0.1).requires_grad_() for i in range(3)]
    scores = random(2).requires_grad_()
    token_loss(tensors[0], tensors[1], scores).sum().backward()
    kl_k3(*tensors).sum().backward()
    assert tensors[0].grad is not None
    assert tensors[1].grad is None and tensors[2].grad is None and scores.grad is None
    assert not advantages(random(2, 3).requires_grad_()).requires_grad


# --- KL ---------------------------------------------------------------------------------------------------------------


def test_k3_by_hand():
    logprobs, ref = f64([math.log(0.5), math.log(0.2)]), f64([math.log(0.25), math.log(0.2)])
    same(kl_k3(logprobs, ref), f64([0.5 + math.log(2) - 1, 0]))
    same(kl_k3(logprobs, ref, logprobs - math.log(3)), 3 * f64([0.5 + math.log(2) - 1, 0]))


@given(st.integers(2, 6), st.floats(0.1, 3), st.integers(0, 10**6))
def test_kl_estimators_by_exact_enumeration(vocabulary, spread, seed):
    """Sum over the vocabulary what the mean over samples would be, of each estimator and of its gradient."""
    logits = (spread * random(vocabulary, seed=seed)).requires_grad_()
    ref, old = (spread * random(2, vocabulary, seed=seed + 1)).log_softmax(-1)
    logprobs = logits.log_softmax(-1)

    def gradient(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    reverse, forward = (logprobs.exp() * (logprobs - ref)).sum(), (ref.exp() * (ref - logprobs)).sum()
    here = logprobs.exp().detach()  # who draws the tokens
    k1, k2 = (logprobs - ref), (logprobs - ref).square() / 2
    plain, weighted = kl_k3(logprobs, ref), kl_k3(logprobs, ref, logprobs)
    assert plain.min() > -1e-15
    same((here * plain).sum(), reverse.detach(), 1e-10)
    same((here * weighted).sum(), reverse.detach(), 1e-10)
    same(gradient((here * k1).sum()), torch.zeros(vocabulary, dtype=torch.float64), 1e-10)  # noise and nothing else
    same(gradient((here * k2).sum()), gradient(reverse), 1e-10)
    same(gradient((here * plain).sum()), gradient(forward), 1e-10)  # of the other divergence
    same(gradient((here * weighted).sum()), gradient(reverse), 1e-10)
    elsewhere = kl_k3(logprobs, ref, old)  # tokens that another policy drew
    same((old.exp() * elsewhere).sum(), reverse.detach(), 1e-9)
    same(gradient((old.exp() * elsewhere).sum()), gradient(reverse), 1e-9)


def test_k3_near_the_reference_is_not_rounded_away():
    """In float32 e^d - 1 - d has no digit left at d = 1e-4, where it is 5e-9."""
    ref = torch.tensor([-1.0])
    assert kl_k3(ref - 1e-4, ref).item() == pytest.approx(5e-9, rel=0.02)
    assert torch.autograd.gradcheck(
        lambda x, old: kl_k3(x, f64([-1.0, -2.0]), old), (f64([-0.5, -3]).requires_grad_(), f64([-1, -2.5]))
    )


# --- reduction --------------------------------------------------------------------------------------------------------


def test_reduce_by_hand():
    per_token, mask = f64([[1, 2, 99], [3, 99, 99]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert reduce(per_token, mask, "sequence").item() == (1.5 + 3) / 2
    assert reduce(per_token, mask, "token").item() == 6 / 3
    assert reduce(per_token, mask, "length", max_length=4).item() == 6 / 8
    same(token_weights(mask, "sequence"), torch.tensor([[1 / 4, 1 / 4, 0], [1 / 2, 0, 0]]))
    same(token_weights(mask, "token"), torch.tensor([[1 / 3, 1 / 3, 0], [1 / 3, 0, 0]]))
    same(token_weights(mask, "length", 4), torch.tensor([[1 / 8, 1 / 8, 0], [1 / 8, 0, 0]]))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_reductions_agree_on_equal_lengths_and_ignore_what_is_masked(sequences, time, seed):
    per_token = random(sequences, time, seed=seed)
    full = torch.ones(sequences, time, dtype=torch.bool)
    for by, limit in (("sequence", None), ("token", None), ("length", time)):
        same(reduce(per_token, full, by, limit), per_token.mean())
    mask = torch.arange(time) < 1 + whole(time, sequences, 1, seed=seed)
    noise = per_token.where(mask, math.nan)
    for by, limit in (("sequence", None), ("token", None), ("length", time + 3)):
        assert torch.equal(reduce(noise, mask, by, limit), reduce(per_token, mask, by, limit))
    same(token_weights(mask, "sequence", dtype=torch.float64).sum(1), f64([1 / sequences] * sequences))
    same(token_weights(mask, "token", dtype=torch.float64).sum(), f64(1.0))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("by", BY.values())
def test_masks_of_any_dtype(dtype, by):
    per_token, mask = random(3, 4), torch.arange(4) < torch.tensor([[1], [4], [2]])
    limit = 6 if by == "length" else None
    assert torch.equal(reduce(per_token, mask.to(dtype), by, limit), reduce(per_token, mask, by, limit))


def test_reduce_gradcheck():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    for by, limit in (("sequence", None), ("token", None), ("length", 3)):
        inputs = random(2, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, by=by, limit=limit: reduce(x, mask, by, limit), (inputs,))
        (gradient,) = torch.autograd.grad(reduce(inputs, mask, by, limit), inputs)
        assert torch.equal(gradient != 0, mask.bool())


# --- against others ---------------------------------------------------------------------------------------------------

golden = json.loads(GOLDEN.read_text())


def loss_like(case, logprobs):
    """TRL's and Liger's loss out of our parts."""
    old, ref, scores = f64(case["old_logprobs"]), f64(case["ref_logprobs"]), f64(case["advantages"])
    by = BY[case["loss_type"]]
    limit, mask = golden["max_length"] if by == "length" else None, torch.tensor(case["mask"])
    per_token = token_loss(logprobs, old, scores, *golden["clip"])
    per_token = per_token + case["beta"] * kl_k3(logprobs, ref, old if case["weighted"] else None)
    return per_token, mask, by, limit


@pytest.mark.parametrize("case", golden["trl"], ids=lambda case: f"{case['loss_type']}-{case['beta']}")
def test_parity_with_trl(case):
    logprobs = f64(case["logprobs"]).requires_grad_()
    loss = reduce(*loss_like(case, logprobs))
    assert loss.item() == pytest.approx(case["loss"], rel=1e-13, abs=1e-14)
    same(torch.autograd.grad(loss, logprobs)[0], f64(case["gradient"]), 1e-14)


@pytest.mark.parametrize("case", golden["liger"], ids=lambda case: case["loss_type"])
@pytest.mark.parametrize("built", ["forward", "backward"])
def test_parity_with_liger(case, built):
    hidden, weight = f64(case["hidden"]).requires_grad_(), f64(case["weight"]).requires_grad_()
    tokens, temperature = torch.tensor(case["tokens"]), case["temperature"]
    if built == "backward":
        loss = reduce(*loss_like(case, head_logprobs(hidden, weight, tokens, temperature, chunk=3)))
    else:
        _, mask, by, limit = loss_like(case, f64(case["old_logprobs"]))
        weights = token_weights(mask, by, limit, torch.float64)

        def per_token(logprobs, part):
            cut = {name: case[name][part] for name in ("old_logprobs", "ref_logprobs", "advantages", "mask")}
            return weights[part] * loss_like(case | cut, logprobs)[0]

        loss = head_loss(hidden, weight, tokens, per_token, temperature)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)  # Liger computes in float32
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), ("hidden", "weight"), strict=True):
        same(ours, f64(case[f"{theirs}_gradient"]), 1e-6)


def test_the_golden_cases_meet_both_clips():
    ratios = [(f64(c["logprobs"]) - f64(c["old_logprobs"])).exp()[f64(c["mask"]) == 1] for c in golden["trl"]]
    assert all(ratio.min() < 0.8 and ratio.max() > 1.28 for ratio in ratios)


# --- devices, compilation, bad input ----------------------------------------------------------------------------------


def everything(device, dtype=torch.float32):
    hidden, weight, tokens = random(4, 5, 6).to(dtype), random(9, 6, seed=1).to(dtype), whole(9, 4, 5)
    hidden, weight, tokens = (value.to(device) for value in (hidden, weight, tokens))
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = head_logprobs(hidden, weight, tokens, 0.8, chunk=6)
    same(logprobs, token_logprobs(hidden @ weight.T / 0.8, tokens), 1e-5)
    scores = advantages(random(2, 2).to(device, dtype)).flatten()
    mask = (torch.arange(5) < torch.tensor([[5], [1], [2], [3]])).to(device)
    old = logprobs.detach() - 0.1
    loss = reduce(token_loss(logprobs, old, scores) + kl_k3(logprobs, old, old), mask, "token")
    loss = loss + head_loss(hidden, weight, tokens, lambda logprobs, part: -logprobs, chunk=6)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("device", DEVICES)
def test_devices_and_dtypes(device):
    exact = everything("cpu", torch.float64)
    for ours, theirs in zip(everything(device), exact, strict=True):
        assert ours.device.type == device and ours.dtype == torch.float32
        same(ours.cpu().double(), theirs, 1e-4)


def tail_of_the_loss(logprobs, old, scores, mask):
    return reduce(token_loss(logprobs, old, scores) + 0.1 * kl_k3(logprobs, old, old), mask, "sequence")


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler and Python.h")],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_compiled(backend):
    old, scores, mask = -random(2, 3).abs() - 0.5, random(2, seed=1), torch.tensor([[1, 1, 0], [1, 1, 1]])
    results = []
    for function in (tail_of_the_loss, torch.compile(tail_of_the_loss, backend=backend)):
        logprobs = (old + 0.1).requires_grad_()
        loss = function(logprobs, old, scores, mask)
        results.append((loss.detach(), *torch.autograd.grad(loss, logprobs)))
    for ours, theirs in zip(*results, strict=True):
        same(ours, theirs)


LOG = torch.full((2, 3), -1.0)
ONES = torch.ones(2, 3)
HEAD = (torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: token_logprobs(LOG, torch.tensor([0, 3])), ValueError, "whole numbers from 0 to 2; got ids from 0 to"),
        (lambda: token_logprobs(LOG, torch.tensor([0, -100])), ValueError, "token ids.*got ids from -100 to 0"),
        (lambda: token_logprobs(LOG, torch.tensor([0])), ValueError, r"leading axes of logits, \[2\]; got \[1\]"),
        (lambda: token_logprobs(LOG, torch.zeros(2)), TypeError, "tokens must be.*whole.*got torch.float32"),
        (lambda: token_logprobs(LOG, [0, 1]), TypeError, "tokens must be.*got list"),
        (lambda: token_logprobs(LOG.long(), torch.zeros(2).long()), TypeError, "logits.*got dtype torch.int64"),
        (lambda: token_logprobs(LOG * math.nan, torch.zeros(2).long()), NonFiniteLoss, "log-probabilities are NaN"),
        (lambda: token_logprobs(LOG * math.inf, torch.zeros(2).long()), NonFiniteLoss, "nothing but -inf"),
        (lambda: head_logprobs(HEAD[0], HEAD[1][:, :3], HEAD[2]), ValueError, r"one width.*\[2, 3, 4\] and \[5, 3\]"),
        (lambda: head_logprobs(HEAD[0], HEAD[1], HEAD[2] + 5), ValueError, "from 0 to 4; got ids from 5 to 5"),
        (lambda: head_logprobs(HEAD[0], HEAD[1], HEAD[2][0]), ValueError, r"leading axes of hidden, \[2, 3\]"),
        (lambda: head_logprobs(HEAD[0].double(), *HEAD[1:]), TypeError, "hidden must have the dtype"),
        (lambda: head_logprobs(*HEAD, temperature=0), ValueError, "temperature.*greater than 0; got 0"),
        (lambda: head_logprobs(*HEAD, chunk=0), ValueError, "chunk must be at least 1; got 0"),
        (lambda: head_logprobs(HEAD[0] / 0, *HEAD[1:]), NonFiniteLoss, "hidden states, head, or both.*6 of its 6"),
        (lambda: head_logprobs(HEAD[0], HEAD[1] / 0, HEAD[2]), NonFiniteLoss, "hidden states, head, or both"),
        (lambda: head_loss(*HEAD, lambda logprobs, part: 0.0), TypeError, "per_token must return a tensor; got float"),
        (lambda: head_loss(*HEAD, lambda x, part: x.sum()), ValueError, r"per_token returned.*one shape; got \[\] and"),
        (lambda: head_loss(*HEAD, lambda x, part: x.detach()), ValueError, "must return a function of its logprobs"),
        (lambda: head_loss(*HEAD, lambda x, part: x / 0), NonFiniteLoss, "the loss per token.*6 of its 6"),
        (lambda: head_loss(*HEAD, lambda x, part: x, temperature=-1), ValueError, "temperature.*got -1"),
        (lambda: advantages(torch.ones(2, 1)), ValueError, r"at least 2 answers a group.*\[2, 1\]: an answer alone"),
        (lambda: advantages(torch.ones(2, 0)), ValueError, r"no axis empty; got shape \[2, 0\]"),
        (lambda: advantages(torch.ones(4)), ValueError, r"rewards.*\[prompt, group\].*got shape \[4\]"),
        (lambda: advantages(ONES.bool()), TypeError, "rewards.*got dtype torch.bool"),
        (lambda: advantages(torch.tensor([[1.0, math.nan]])), ValueError, "rewards.*1 of its 2 are NaN"),
        (lambda: advantages(torch.tensor([[1.0, math.inf]])), ValueError, "rewards.*1 of its 2 are NaN or infinite"),
        (lambda: advantages(torch.tensor([[3e38, -3e38]])), NonFiniteLoss, "standard deviation of the rewards"),
        (lambda: advantages(ONES, ddof=2), ValueError, "ddof must be one of 0, 1; got 2"),
        (lambda: advantages(ONES, epsilon=-1.0), ValueError, "epsilon.*at least 0; got -1"),
        (lambda: advantages(ONES, scale="batch"), TypeError, "scale must be True or False; got 'batch'"),
        (lambda: token_loss(LOG, LOG[:, :2], ONES[:, 0]), ValueError, "old_logprobs and logprobs must have one shape"),
        (lambda: token_loss(LOG, LOG, ONES[:1, 0]), ValueError, r"advantages and the first tokens.*\[1\] and \[2\]"),
        (lambda: token_loss(LOG, LOG, ONES), ValueError, r"advantages.*\[sequence\].*got shape \[2, 3\]"),
        (lambda: token_loss(LOG + 2, LOG, ONES[:, 0]), ValueError, "logprobs must be logarithms.*at most 0; got 1"),
        (lambda: token_loss(LOG, LOG + 2, ONES[:, 0]), ValueError, "old_logprobs must be logarithms.*got 1"),
        (lambda: token_loss(LOG * math.inf, LOG, ONES[:, 0]), ValueError, "logprobs.*6 of its 6 are NaN or infinite"),
        (lambda: token_loss(LOG, 99 * LOG, ONES[:, 0]), NonFiniteLoss, "the ratio pi / pi_old.*6 of its 6"),
        (lambda: token_loss(LOG, LOG, ONES[:, 0], clip_low=-0.1), ValueError, "clip_low.*at least 0; got -0.1"),
        (lambda: token_loss(LOG, LOG, ONES[:, 0], clip_high=math.nan), ValueError, "clip_high.*got nan"),
        (lambda: token_loss(LOG, LOG.double(), ONES[:, 0]), TypeError, "old_logprobs and logprobs must have one dtype"),
        (lambda: kl_k3(LOG, LOG[0]), ValueError, "ref_logprobs and logprobs must have one shape"),
        (lambda: kl_k3(LOG, LOG, LOG[0]), ValueError, "old_logprobs and logprobs must have one shape"),
        (lambda: kl_k3(LOG, LOG + 2), ValueError, "ref_logprobs must be logarithms"),
        (lambda: kl_k3(99 * LOG, LOG), NonFiniteLoss, "the KL estimate.*6 of its 6"),
        (lambda: reduce(LOG, ONES[:1]), ValueError, r"mask and per_token must have one shape; got \[1, 3\] and"),
        (lambda: reduce(LOG, ONES / 2), ValueError, "mask must be.*0 and 1.*got other numbers among its torch.float32"),
        (lambda: reduce(LOG, ONES * math.nan), ValueError, "got other numbers"),
        (lambda: reduce(LOG, [[1, 1, 1]] * 2), TypeError, "mask must be.*got list"),
        (lambda: reduce(LOG, torch.tensor([[1, 0, 0], [0, 0, 0]])), ValueError, r"no token of the rows \[1\]"),
        (lambda: token_weights(torch.zeros(3, 2)), ValueError, r"no token of the rows \[0, 1, 2\]; leave"),
        (lambda: token_weights(torch.ones(3)), ValueError, r"mask must be.*got shape \[3\]"),
        (lambda: reduce(LOG, ONES, by="mean"), ValueError, "by must be one of 'sequence', 'token', 'length'; got"),
        (lambda: reduce(LOG, ONES, by="length"), ValueError, "by='length' divides by max_length.*got None"),
        (lambda: reduce(LOG, ONES, by="length", max_length=2), ValueError, "max_length must be at least 3.*got 2"),
        (lambda: reduce(LOG, ONES, max_length=3), ValueError, "max_length is for by='length' alone; got 3"),
        (lambda: reduce(LOG / 0, ONES), NonFiniteLoss, "per_token, where the mask counts,.*6 of its 6"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
