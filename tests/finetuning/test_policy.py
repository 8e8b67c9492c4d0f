"""What GRPO and DAPO share: by hand, by exact enumeration, against plain autograd, against TRL and Liger."""

import json
import math
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl.finetuning.policy import advantages, kl_k3, reduce, token_logprobs, token_loss, token_weights
from mini_impl.losses import NonFiniteLoss
from tests.tensors import random, same, whole

GOLDEN = Path(__file__).parents[1] / "golden" / "policy.json"
COMPILER = (
    any(map(shutil.which, ("c++", "g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
)
BY = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "dr_grpo": "length"}  # TRL's name -> ours


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


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
    given = f64([-0.5, -3]).requires_grad_(), f64([-1, -2.5])
    assert torch.autograd.gradcheck(lambda x, old: kl_k3(x, f64([-1.0, -2.0]), old), given)


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


def test_the_golden_cases_meet_both_clips():
    ratios = [(f64(c["logprobs"]) - f64(c["old_logprobs"])).exp()[f64(c["mask"]) == 1] for c in golden["trl"]]
    assert all(ratio.min() < 0.8 and ratio.max() > 1.28 for ratio in ratios)


# --- devices, compilation, bad input ----------------------------------------------------------------------------------


def everything(device, dtype=torch.float32):
    logprobs = (-random(4, 5).abs()).to(device, dtype).requires_grad_()
    scores = advantages(random(2, 2).to(device, dtype)).flatten()
    mask = (torch.arange(5) < torch.tensor([[5], [1], [2], [3]])).to(device)
    old = logprobs.detach() - 0.1
    loss = reduce(token_loss(logprobs, old, scores) + kl_k3(logprobs, old, old), mask, "token")
    loss.backward()
    return loss.detach(), logprobs.grad


def test_devices_and_dtypes(device):
    for ours, theirs in zip(everything(device), everything("cpu", torch.float64), strict=True):
        assert ours.device.type == device and ours.dtype == torch.float32
        same(ours.cpu().double(), theirs, 1e-4)


def tail_of_the_loss(logprobs, old, scores, mask):
    return reduce(token_loss(logprobs, old, scores) + 0.1 * kl_k3(logprobs, old, old), mask, "sequence")


SLOW = [pytest.mark.slow, pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler and Python.h")]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=SLOW)])
@pytest.mark.filterwarnings("ignore")
def test_compiled(backend):
    old, scores, mask = -random(2, 3).abs() - 0.5, random(2, seed=1), torch.tensor([[1, 1, 0], [1, 1, 1]])
    results = []
    for function in (tail_of_the_loss, torch.compile(tail_of_the_loss, backend=backend)):
        logprobs = (old + 0.1).requires_grad_()
        loss = function(logprobs, old, scores, mask)
        results.append((loss.detach(), *torch.autograd.grad(loss, logprobs)))
    same(*results)


LOG = torch.full((2, 3), -1.0)
ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: token_logprobs(LOG, torch.tensor([0, 3])), ValueError, "whole numbers from 0 to 2; got ids from 0 to"),
        (lambda: token_logprobs(LOG, torch.tensor([0])), ValueError, r"leading axes of logits, \[2\]; got \[1\]"),
        (lambda: token_logprobs(LOG, [0, 1]), TypeError, "tokens must be.*got list"),
        (lambda: token_logprobs(LOG.long(), torch.zeros(2).long()), TypeError, "logits.*got dtype torch.int64"),
        (lambda: token_logprobs(LOG * math.nan, torch.zeros(2).long()), NonFiniteLoss, "log-probabilities are NaN"),
        (lambda: token_logprobs(LOG * math.inf, torch.zeros(2).long()), NonFiniteLoss, "nothing but -inf"),
        (lambda: advantages(torch.ones(2, 1)), ValueError, r"at least 2 answers a group.*\[2, 1\]: an answer alone"),
        (lambda: advantages(torch.ones(4)), ValueError, r"rewards.*\[prompt, group\].*got shape \[4\]"),
        (lambda: advantages(ONES.bool()), TypeError, "rewards.*got dtype torch.bool"),
        (lambda: advantages(torch.tensor([[3e38, -3e38]])), NonFiniteLoss, "standard deviation of the rewards"),
        (lambda: advantages(ONES, ddof=2), ValueError, "ddof must be one of 0, 1; got 2"),
        (lambda: advantages(ONES, epsilon=-1.0), ValueError, "epsilon.*at least 0; got -1"),
        (lambda: advantages(ONES, scale="batch"), TypeError, "scale must be True or False; got 'batch'"),
        (lambda: token_loss(LOG, LOG[:, :2], ONES[:, 0]), ValueError, "old_logprobs and logprobs must have one shape"),
        (lambda: token_loss(LOG, LOG, ONES[:1, 0]), ValueError, r"advantages and the first tokens.*\[1\] and \[2\]"),
        (lambda: token_loss(LOG, LOG, ONES), ValueError, r"advantages.*\[sequence\].*got shape \[2, 3\]"),
        (lambda: token_loss(LOG * math.inf, LOG, ONES[:, 0]), ValueError, "logprobs.*6 of its 6 are NaN or infinite"),
        (lambda: token_loss(LOG, 99 * LOG, ONES[:, 0]), NonFiniteLoss, r"the ratio pi / pi_old.* only; got e\^98"),
        (lambda: token_loss(LOG, LOG, ONES[:, 0], clip_low=-0.1), ValueError, "clip_low.*at least 0; got -0.1"),
        (lambda: token_loss(LOG, LOG, ONES[:, 0], clip_high=math.nan), ValueError, "clip_high.*got nan"),
        (lambda: kl_k3(LOG, LOG[0]), ValueError, "ref_logprobs and logprobs must have one shape"),
        (lambda: kl_k3(LOG, LOG, LOG[0]), ValueError, "old_logprobs and logprobs must have one shape"),
        (lambda: kl_k3(LOG, LOG + 2), ValueError, "ref_logprobs must be logarithms"),
        (lambda: kl_k3(99 * LOG, LOG), NonFiniteLoss, "the KL estimate.*6 of its 6"),
        (lambda: reduce(LOG, ONES[:1]), ValueError, r"mask and per_token must have one shape; got \[1, 3\] and"),
        (lambda: reduce(LOG, ONES / 2), ValueError, "mask must be.*0 and 1.*got other numbers among its torch.float32"),
        (lambda: reduce(LOG, [[1, 1, 1]] * 2), TypeError, "mask must be.*got list"),
        (lambda: reduce(LOG, torch.tensor([[1, 0, 0], [0, 0, 0]])), ValueError, r"no token of the rows \[1\]"),
        (lambda: token_weights(torch.zeros(3, 2)), ValueError, r"no token of the rows \[0, 1, 2\]; leave"),
        (lambda: token_weights(torch.ones(3)), ValueError, r"mask must be.*got shape \[3\]"),
        (lambda: reduce(LOG, ONES, by="mean"), ValueError, "by must be one of 'sequence', 'token', 'length'; got"),
        (lambda: reduce(LOG, ONES, by="length"), ValueError, "max_length, the most tokens.*is for by='length'.*None"),
        (lambda: reduce(LOG, ONES, by="length", max_length=2), ValueError, "max_length must be at least 3.*got 2"),
        (lambda: reduce(LOG, ONES, max_length=3), ValueError, "alone; got by='sequence' and max_length=3"),
        (lambda: reduce(LOG / 0, ONES), NonFiniteLoss, "per_token, where the mask counts,.*6 of its 6"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
