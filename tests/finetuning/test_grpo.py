"""GRPO, documented and published: by hand, by exact enumeration, in the limits, against TRL."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_impl.finetuning.grpo import (
    contrastive_loss,
    documented_loss,
    first_of_each,
    published_loss,
    sequence_logprobs,
    target_distribution,
)
from mini_impl.finetuning.policy import advantages
from mini_impl.losses import LossTerms, NonFiniteLoss
from tests.finetuning.test_policy import BY, f64, golden
from tests.tensors import random, same


def gradient(value, of):
    return torch.autograd.grad(value, of, retain_graph=True)[0]


# --- the documented method: step 1, probabilities of whole answers ----------------------------------------------------


def test_sequence_logprobs_by_hand():
    logprobs = f64([[-1, -2, 9], [-3, math.nan, 0], [-0.5, -0.5, -0.5], [-4, -1, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])  # what stands beside the answers is not read
    assert sequence_logprobs(logprobs, mask, group_size=2).tolist() == [[-3, -3], [-1.5, -5]]
    assert sequence_logprobs(logprobs, mask.bool(), group_size=4).tolist() == [[-3, -3, -1.5, -5]]


def test_sequence_logprobs_have_a_gradient_where_the_answer_is():
    logprobs, mask = (-random(4, 3).abs()).requires_grad_(), torch.arange(3) < torch.tensor([[1], [3], [2], [1]])
    assert torch.equal(gradient(sequence_logprobs(logprobs, mask, 2).sum(), logprobs), mask.double())


# --- step 2, the target distribution ----------------------------------------------------------------------------------


def test_target_distribution_by_hand():
    old, rewards = f64([[0.5, 0.25, 0.25]]).log(), f64([[0, math.log(2), math.log(4)]])
    same(target_distribution(old, rewards, 1.0), f64([[0.5, 0.5, 1]]) / 2)
    same(target_distribution(old, rewards, 1.0, "corrected"), f64([[1, 2, 4]]) / 7)
    same(target_distribution(old, rewards, 0.5), f64([[0.5, 1, 4]]) / 5.5)


def test_a_group_as_the_set_that_the_documented_sum_runs_over():
    """An answer that came three times has the share of one: q is that of the group without the copies."""
    completion = torch.tensor([[5, 1, 1], [5, 2, 1], [5, 1, 9], [5, 1, 1], [3, 3, 3], [3, 3, 3], [3, 1, 1], [5, 1, 1]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 0]])
    distinct = first_of_each(completion, mask, group_size=4)
    assert distinct.tolist() == [[True, True, False, True], [True, False, True, True]]
    old, rewards = -random(2, 4).abs(), random(2, 4, seed=1)
    for weights in ("documented", "corrected"):
        q = target_distribution(old, rewards, 0.7, weights, distinct)
        for row, kept in enumerate(distinct):
            same(q[row][kept], target_distribution(old[row, kept][None], rewards[row, kept][None], 0.7, weights)[0])
        assert not q[~distinct].any()
        logprobs = (old - 0.1).requires_grad_()
        loss = documented_loss(logprobs, old, rewards, 0.7, weights, distinct)
        same(loss.total.detach(), (q * (old - logprobs + rewards / 0.7)).sum(1).mean().detach())
        same(gradient(loss.total, logprobs), -q / 2)
    everything = torch.ones(2, 4, dtype=torch.bool)
    same(target_distribution(old, rewards, 1.0, distinct=everything), target_distribution(old, rewards, 1.0), 0)


groups = st.tuples(st.integers(1, 3), st.integers(2, 6), st.floats(0.05, 20), st.integers(0, 10**6))


def case_of(case, spread=2.0):
    """(log pi, log pi_old, rewards, temperature) of sampled answers: their probabilities need not sum to 1."""
    prompts, group, temperature, seed = case
    logprobs, old = -spread * random(2, prompts, group, seed=seed).abs()
    return logprobs.requires_grad_(), old, random(prompts, group, seed=seed + 1), temperature


@given(groups, st.floats(-100, 100), st.sampled_from(["documented", "corrected"]))
def test_target_distribution(case, level, weights):
    _, old, rewards, temperature = case_of(case)
    q = target_distribution(old, rewards, temperature, weights)
    same(q.sum(1), torch.ones(len(q), dtype=torch.float64))
    same(target_distribution(old, rewards + level, temperature, weights), q, 1e-9)  # any baseline is free
    same(target_distribution(old - 7, rewards, temperature, weights), q, 1e-9)  # so is one factor for a group
    plain = (rewards / temperature).exp() * (old.exp() if weights == "documented" else 1)
    same(q, plain / plain.sum(1, keepdim=True), 1e-9)


@given(groups)
def test_the_ends_of_the_temperature_and_equal_rewards(case):
    _, old, rewards, temperature = case_of(case)
    best = torch.nn.functional.one_hot(rewards.argmax(1), rewards.shape[1]).double()
    uniform, policy = torch.full_like(old, 1 / old.shape[1]), old.softmax(1)
    gap = rewards.topk(2).values.diff().abs().min().item()
    for weights, prior in (("documented", policy), ("corrected", uniform)):
        same(target_distribution(old, rewards, gap / 100, weights), best, 1e-9)  # to 0: the best answer alone
        same(target_distribution(old, rewards, 1e9, weights), prior, 1e-7)  # to infinity: no preference
        same(target_distribution(old, 0 * rewards + 0.3, temperature, weights), prior, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_improbable_answers_have_their_share(dtype):
    """e^-500 is 0 even in float64's normal numbers after a product or two; its logarithm is a number like another."""
    old = torch.tensor([[-500.0, -501.0, -1500.0]], dtype=dtype)
    rewards = torch.tensor([[0.0, 1.0, 1000.0]], dtype=dtype)  # pi_old e^r: equal for all three
    q = target_distribution(old, rewards, 1.0)
    torch.testing.assert_close(q, torch.full_like(q, 1 / 3))
    logprobs = (old - 200).requires_grad_()
    for loss in (documented_loss(logprobs, old, rewards, 1.0), contrastive_loss(logprobs, old, rewards, 1.0)):
        assert torch.isfinite(loss.total) and torch.isfinite(gradient(loss.total, logprobs)).all()
    assert documented_loss(logprobs, old, 0 * rewards, 1.0).total.item() == pytest.approx(200)


def test_sampled_answers_count_pi_old_twice_unless_corrected():
    """Each answer as often as pi_old draws it, of 20: the corrected weights of its copies sum to q exactly; documented
    ones go to pi_old^2 e^r, as the copies' number holds pi_old already."""
    counts, rewards = torch.tensor([10, 5, 4, 1]), f64([0.0, 0.5, -1.0, 2.0])
    old = counts.double() / counts.sum()
    answer = torch.arange(4).repeat_interleave(counts)  # [20]
    q = target_distribution(old.log()[None], rewards[None], 0.8)[0]  # over every answer there is
    for weights, law in (("corrected", old * (rewards / 0.8).exp()), ("documented", old**2 * (rewards / 0.8).exp())):
        share = target_distribution(old.log()[answer][None], rewards[answer][None], 0.8, weights)[0]
        by_answer = torch.zeros(4, dtype=torch.float64).index_add(0, answer, share)
        same(by_answer, law / law.sum())
        assert torch.allclose(by_answer, q) == (weights == "corrected")


# --- step 3, the surrogate --------------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    old, rewards, logprobs = f64([[0.5, 0.25]]).log(), f64([[0, math.log(2)]]), f64([[0.25, 0.5]]).log()
    # q = 1/2 1/2;  1/2 log 2 + 1/2 log 1/2 = 0;  1/2 log 2.  Corrected: 1/3 2/3
    loss = documented_loss(logprobs, old, rewards, 1.0)
    assert list(loss.terms) == ["log_ratio", "reward"]
    same(torch.stack(list(loss.terms.values())), f64([0, math.log(2) / 2]))
    loss = documented_loss(logprobs, old, rewards, 1.0, "corrected")
    same(torch.stack(list(loss.terms.values())), f64([-math.log(2) / 3, math.log(2) * 2 / 3]))


@given(groups)
@settings(max_examples=50)
def test_the_surrogate_is_a_kl_and_a_constant(case):
    """Over every answer there is, and over a group: sum q log(q / pi) + log Z. Corrected: sum w log(w pi_old / pi) +
    log sum e^{r / beta}. As log w = r / beta - log sum e^{r / beta}, the bracket log pi_old - log pi + r / beta is
    log(w pi_old / pi) + log sum e^{r / beta}."""
    logprobs, old, rewards, temperature = case_of(case)
    for logprobs, old in ((logprobs, old), (logprobs.log_softmax(1), old.log_softmax(1))):  # noqa: B020
        q = target_distribution(old, rewards, temperature)
        kl = (q * (q.log() - logprobs)).sum(1) + (old + rewards / temperature).logsumexp(1)
        same(documented_loss(logprobs, old, rewards, temperature).total, kl.mean())
        w = target_distribution(old, rewards, temperature, "corrected")
        kl = (w * (w.log() + old - logprobs)).sum(1) + (rewards / temperature).logsumexp(1)
        same(documented_loss(logprobs, old, rewards, temperature, "corrected").total, kl.mean())


@given(groups)
@settings(max_examples=30)
def test_over_every_answer_the_gradient_is_pi_less_q(case):
    _, old, rewards, temperature = case_of(case)
    logits, old = random(*old.shape, seed=9).requires_grad_(), old.log_softmax(1)
    loss = documented_loss(logits.log_softmax(1), old, rewards, temperature).total
    q = target_distribution(old, rewards, temperature)
    same(gradient(loss, logits), (logits.softmax(1) - q) / len(q))
    log_z = (old + rewards / temperature).logsumexp(1).mean()
    assert loss >= log_z - 1e-12  # the least value, at pi = q
    same(documented_loss(q.log(), old, rewards, temperature).total, log_z)


@given(groups)
@settings(max_examples=30)
def test_of_a_group_documented_weights_push_all_up_and_contrastive_ones_do_not(case):
    logprobs, old, rewards, temperature = case_of(case)
    for weights in ("documented", "corrected"):
        q = target_distribution(old, rewards, temperature, weights)
        up = gradient(documented_loss(logprobs, old, rewards, temperature, weights).total, logprobs)
        same(up, -q / len(q))  # never positive: a bad answer is imitated too
    w, p = target_distribution(old, rewards, temperature, "corrected"), (logprobs - old).softmax(1)
    slopes = gradient(contrastive_loss(logprobs, old, rewards, temperature).total, logprobs)
    same(slopes, (p - w) / len(w))
    same(slopes.sum(1), torch.zeros(len(w), dtype=torch.float64))


# --- the contrastive form ---------------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    old, rewards, logprobs = f64([[0.5, 0.25]]).log(), f64([[0, math.log(3)]]), f64([[0.5, 0.75]]).log()
    same(contrastive_loss(logprobs, old, rewards, 1.0).total, f64(0.0))  # w = 1/4 3/4; p = 1 : 3
    loss = contrastive_loss(old, old, rewards, 1.0)
    same(loss.total, f64(0.25 * math.log(0.5) + 0.75 * math.log(1.5)))
    assert list(loss.terms) == ["contrast"]


@given(groups, st.floats(-5, 5))
def test_contrastive_loss_is_a_divergence_with_its_zero_at_the_target(case, factor):
    logprobs, old, rewards, temperature = case_of(case)
    assert contrastive_loss(logprobs, old, rewards, temperature).total >= -1e-14
    there = old + rewards / temperature  # pi ~ pi_old e^{r / beta} on the group, with any factor
    there = (there - there.max() - abs(factor)).requires_grad_()
    loss = contrastive_loss(there, old, rewards, temperature).total
    same(loss.detach(), f64(0.0), 1e-9)
    same(gradient(loss, there), torch.zeros_like(there), 1e-9)


@given(groups)
def test_at_the_old_policy_contrastive_is_corrected_less_the_mean_weight(case):
    _, old, rewards, temperature = case_of(case)
    logprobs = old.clone().requires_grad_()
    corrected = gradient(documented_loss(logprobs, old, rewards, temperature, "corrected").total, logprobs)
    contrast = gradient(contrastive_loss(logprobs, old, rewards, temperature).total, logprobs)
    same(contrast, corrected - corrected.mean(1, keepdim=True))
    equal = contrastive_loss(logprobs, old, 0 * rewards + 1, temperature).total
    same(gradient(equal, logprobs), torch.zeros_like(old))  # equal rewards teach nothing


# --- the published method ---------------------------------------------------------------------------------------------


def test_published_loss_by_hand():
    old = torch.full((2, 3), -2.0, dtype=torch.float64)
    logprobs = old + f64([[1.1, 1.5, 7], [0.5, 1.0, 0.9]]).log()
    scores, mask = f64([1, -1]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    # -min(rho A, clip A): -1.1, -1.2;  0.8, 1, 0.9
    loss = published_loss(logprobs, old, scores, mask)
    assert list(loss.terms) == ["policy"] and isinstance(loss, LossTerms)
    same(loss.total, f64((-1.15 + 0.9) / 2))
    same(published_loss(logprobs, old, scores, mask, reduce_by="token").total, f64(0.4 / 5))
    same(published_loss(logprobs, old, scores, mask, reduce_by="length", max_length=4).total, f64(0.4 / 8))
    higher = published_loss(logprobs, old, scores, mask, clip_high=0.28, reduce_by="token")
    same(higher.total, f64((-1.1 - 1.28 + 2.7) / 5))
    ref = logprobs - math.log(2)  # k3 = 1/2 + log 2 - 1 at each token
    loss = published_loss(logprobs, old, scores, mask, ref, kl_weight=0.1)
    same(loss.terms["kl"], f64(0.1 * (math.log(2) - 0.5)))
    weighted = published_loss(logprobs, old, scores, mask, ref, kl_weight=0.1, kl_gradient="weighted")
    same(weighted.terms["kl"], loss.terms["kl"] * ((1.1 + 1.5) / 2 + 2.4 / 3) / 2)
    assert published_loss(logprobs, old, scores, mask, ref).terms["kl"] == 0


@pytest.mark.parametrize("kl_gradient", ["plain", "weighted"])
def test_what_stands_beside_the_answers_is_not_read(kl_gradient):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tensors = [(-random(2, 3, seed=i).abs()) for i in range(3)]
    results = []
    for beside in (0.0, math.nan, math.inf, 5.0, -1e4):
        logprobs, old, ref = (value.where(mask.bool(), beside).requires_grad_() for value in tensors)
        loss = published_loss(logprobs, old, f64([1, -1]), mask, ref, kl_weight=0.3, kl_gradient=kl_gradient)
        loss.total.backward()
        assert old.grad is None and ref.grad is None
        results.append((loss.total.detach(), logprobs.grad))
    for loss_and_slopes in results:
        same(loss_and_slopes, results[0], 0)
    assert torch.equal(logprobs.grad != 0, mask.bool())


def test_the_loss_is_0_at_first_and_its_gradient_is_not():
    """By sequence it is minus the mean advantage; by token a long answer counts for more, and it is not 0."""
    old, mask = -random(4, 5).abs(), torch.arange(5) < torch.tensor([[5], [1], [2], [3]])
    logprobs, scores = old.clone().requires_grad_(), advantages(f64([[0, 1, 1, 0]])).flatten()
    loss = published_loss(logprobs, old, scores, mask).total
    same(loss.detach(), f64(0.0))
    assert gradient(loss, logprobs).abs().max() > 0.01
    assert published_loss(logprobs, old, scores, mask, reduce_by="token").total.abs() > 0.01


def test_equal_rewards_leave_the_kl_alone_to_pull():
    old, mask = -random(4, 5).abs(), torch.ones(4, 5)
    logprobs, scores = old.clone().requires_grad_(), advantages(torch.full((2, 2), 0.1, dtype=torch.float64)).flatten()
    loss = published_loss(logprobs, old, scores, mask, old - 0.5, kl_weight=0.1)
    assert gradient(loss.terms["policy"], logprobs).abs().max() == 0
    assert gradient(loss.total, logprobs).abs().min() > 0


def test_several_updates_a_rollout():
    """Ascent on one rollout: the ratio leaves 1 and stays at the bound, as no gradient is left there."""
    old = torch.full((2, 1), -1.0, dtype=torch.float64)
    logprobs, mask, sizes = old.clone(), torch.ones(2, 1), []
    for _ in range(12):
        logprobs.requires_grad_()
        slope = gradient(published_loss(logprobs, old, f64([1, -1]), mask).total, logprobs)
        logprobs = (logprobs - 0.1 * slope).detach()
        sizes.append(slope.abs().max().item())
    ratio = (logprobs - old).exp().flatten()
    assert sizes[0] > 0 and sizes[-1] == 0 and 1.2 < ratio[0] < 1.3 and 0.7 < ratio[1] < 0.8


# An autoregressive policy over the tokens a, b and stop, answers of at most two tokens: every one of them.
ANSWERS = [(2,), *((first, second) for first in (0, 1) for second in (0, 1, 2))]
MASK = torch.tensor([[1, 0] if len(answer) == 1 else [1, 1] for answer in ANSWERS])


def policy_table(logits):
    """Log-probabilities of the tokens of every answer, [answer, 2]. logits: [context: start, a, b; next token]."""
    logprobs = logits.log_softmax(1)
    rows = [
        torch.stack([logprobs[0, first], logprobs[1 + first, second[0]] if second else logits.new_zeros(())])
        for first, *second in ANSWERS
    ]
    return torch.stack(rows)


def cosine(one, other):
    return torch.cosine_similarity(one.flatten(), other.flatten(), 0).item()


@given(st.integers(0, 10**6))
@settings(max_examples=10)
def test_the_policy_gradient_has_no_bias(seed):
    """The mean gradient over every group of answers, each with its probability, against that of the mean reward.

    The mean of the group is a baseline that holds the answer's own reward: (group - 1) / group of the gradient is left.
    """
    logits, rewards = random(3, 3, seed=seed).requires_grad_(), random(7, seed=seed + 1)
    table = policy_table(logits)
    probability = table.sum(1).exp()
    same(probability.sum().detach(), f64(1.0))
    exact = gradient(-(probability * rewards).sum(), logits)
    groups = torch.tensor(list(itertools.product(range(7), repeat=2)))  # [49, 2]
    chance = probability.detach()[groups].prod(1)

    def expected(by, max_length=None, scores=lambda r: r):
        total = torch.zeros_like(exact)
        for group, weight in zip(groups, chance, strict=True):
            given = table[group]
            loss = published_loss(given, given.detach(), scores(rewards[group]), MASK[group], reduce_by=by,
                                  max_length=max_length)  # fmt: skip
            total += weight * gradient(loss.total, logits)
        return total

    same(2 * expected("length", 2), exact, 1e-10)  # no baseline: no bias
    centred = expected("length", 2, lambda r: advantages(r[None], scale=False)[0])
    same(2 * centred, exact / 2, 1e-10)  # the group's mean: half of it, and its direction
    by_sequence = expected("sequence", scores=lambda r: advantages(r[None], scale=False)[0])
    assert cosine(by_sequence, exact) < 1 - 1e-6  # 1 / length turns it


def test_the_bridge_from_documented_to_published():
    """beta times the documented gradient (corrected weights), less its mean weight, goes to that of the published loss
    with the group's mean as baseline, as 1 / beta: w_i = 1/G + (r_i - mean) / (G beta) + O(1 / beta^2)."""
    prompts, group = 3, 5
    old, rewards = -random(prompts, group, seed=3).abs(), random(prompts, group, seed=4)
    logits = old.clone().requires_grad_()  # any parameters of log pi would do
    scores = advantages(rewards, scale=False).flatten()
    published = gradient(published_loss(logits.view(-1, 1), old.view(-1, 1), scores, torch.ones(15, 1)).total, logits)
    errors = []
    for temperature in (1e1, 1e2, 1e3, 1e4):
        documented = gradient(documented_loss(logits, old, rewards, temperature, "corrected").total, logits)
        centred = temperature * (documented - documented.mean(1, keepdim=True))
        contrast = temperature * gradient(contrastive_loss(logits, old, rewards, temperature).total, logits)
        same(centred, contrast, 1e-9)
        errors.append(((centred - published).norm() / published.norm()).item())
    assert 0.001 < errors[0] < 0.2
    for larger, smaller in itertools.pairwise(errors):
        assert larger / smaller == pytest.approx(10, rel=0.15)


# --- gradients, devices, others, bad input ----------------------------------------------------------------------------


@given(groups)
@settings(max_examples=10)
def test_gradcheck(case):
    logprobs, old, rewards, temperature = case_of(case)
    for weights in ("documented", "corrected"):
        given = old, rewards, temperature, weights
        assert torch.autograd.gradcheck(lambda x, given=given: documented_loss(x - 1, *given).total, (logprobs,))
    assert torch.autograd.gradcheck(lambda x: contrastive_loss(x - 1, old, rewards, temperature).total, (logprobs,))
    near, scores = (old - 1.05).requires_grad_(), rewards[:, 0]
    for by, limit, kl in (("sequence", None, "plain"), ("token", None, "weighted"), ("length", 9, "plain")):
        given = old - 1, scores, torch.ones_like(old), old - 2, 0.2, 0.2, 0.3, by, limit, kl
        assert torch.autograd.gradcheck(lambda x, given=given: published_loss(x, *given).total, (near,))


def test_rewards_and_the_old_policy_carry_no_gradient():
    logprobs, old, ref = (-random(3, 4, 5, seed=1).abs()).unbind()
    old, ref, rewards, logprobs = (x.clone().requires_grad_() for x in (old, ref, random(4, 5), logprobs))
    assert not target_distribution(old, rewards, 1.0).requires_grad
    loss = documented_loss(logprobs, old, rewards, 1.0).total + contrastive_loss(logprobs, old, rewards, 1.0).total
    scores = random(4).requires_grad_()
    loss = loss + published_loss(logprobs, old, scores, torch.ones(4, 5), ref, kl_weight=1.0).total
    loss.backward()
    assert logprobs.grad is not None
    assert all(x.grad is None for x in (old, ref, rewards, scores))
    assert not documented_loss(logprobs, old, rewards, 1.0).terms["reward"].requires_grad


@pytest.mark.parametrize("case", golden["trl"], ids=lambda case: f"{case['loss_type']}-{case['beta']}")
def test_parity_with_trl(case):
    """Golden numbers made by tests/golden/make_policy.py."""
    by, beta, kl_gradient = BY[case["loss_type"]], case["beta"], "weighted" if case["weighted"] else "plain"
    logprobs, old, ref = (f64(case[name]) for name in ("logprobs", "old_logprobs", "ref_logprobs"))
    given = logprobs.requires_grad_(), old, f64(case["advantages"]), torch.tensor(case["mask"]), ref if beta else None
    limit = golden["max_length"] if by == "length" else None
    loss = published_loss(*given, *golden["clip"], beta, by, limit, kl_gradient)
    assert loss.total.item() == pytest.approx(case["loss"], rel=1e-13, abs=1e-14)
    same(gradient(loss.total, logprobs), f64(case["gradient"]), 1e-14)


def test_devices_and_dtypes(device):
    results = []
    for place, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        logprobs, old = (-random(2, 4, 3, seed=2).abs()).to(place, dtype).unbind()
        old, rewards = logprobs - 0.1 * (old / (1 - old)).abs(), random(2, 2).to(place, dtype)
        logprobs, mask = logprobs.requires_grad_(), (torch.arange(3) < torch.tensor([[3], [1], [2], [3]])).to(place)
        whole, before = sequence_logprobs(logprobs, mask, 2), sequence_logprobs(old, mask, 2)
        loss = (
            documented_loss(whole, before, rewards, 0.7).total
            + contrastive_loss(whole, before, rewards, 0.7).total
            + published_loss(logprobs, old, advantages(rewards).flatten(), mask, old, kl_weight=0.1).total
        )
        assert loss.device.type == torch.device(place).type and loss.dtype == dtype
        results.append(torch.cat([loss.detach()[None], gradient(loss, logprobs).flatten()]).cpu().double())
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


OLD = torch.full((2, 3), -1.0)
REWARDS = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
SCORES, ONES = torch.ones(2), torch.ones(2, 3)
bad = [
    (lambda f: f(OLD[:, :1], OLD[:, :1], REWARDS[:, :1], 1.0), ValueError, "at least 2 answers a group"),
    (lambda f: f(OLD, OLD, REWARDS[0], 1.0), ValueError, r"rewards.*\[prompt, group\].*got shape \[3\]"),
    (lambda f: f(OLD, OLD, REWARDS.long(), 1.0), TypeError, "rewards.*got dtype torch.int64"),
    (lambda f: f(OLD, OLD, REWARDS, 0.0), ValueError, "temperature must be.*greater than 0; got 0"),
    (lambda f: f(OLD, OLD, REWARDS, 1e-45), ValueError, "rewards / temperature must hold finite numbers"),
    (lambda f: f(OLD, OLD[:1], REWARDS, 1.0), ValueError, r"old_logprobs and rewards must.*got \[1, 3\]"),
    (lambda f: f(OLD, OLD + 2, REWARDS, 1.0), ValueError, "old_logprobs must be logarithms of probabilities.*got 1"),
    (lambda f: f(OLD, OLD / 0, REWARDS, 1.0), ValueError, "old_logprobs must hold finite numbers only"),
]  # fmt: skip
functions = [lambda logprobs, *rest: target_distribution(*rest), documented_loss, contrastive_loss]


@pytest.mark.parametrize("function", functions, ids=["target", "documented", "contrastive"])
@pytest.mark.parametrize(("call", "error", "says"), bad)
def test_bad_groups_are_named(function, call, error, says):
    with pytest.raises(error, match=says):
        call(function)


@pytest.mark.parametrize("loss", [documented_loss, contrastive_loss])
def test_a_bad_new_policy_is_named(loss):
    with pytest.raises(ValueError, match=r"logprobs must be logarithms of probabilities, at most 0; got 0.5"):
        loss(OLD + 1.5, OLD, REWARDS, 1.0)
    with pytest.raises(ValueError, match=r"logprobs must hold finite numbers only"):
        loss(OLD * math.nan, OLD, REWARDS, 1.0)
    with pytest.raises(ValueError, match=r"logprobs and rewards must have one shape"):
        loss(OLD[:1], OLD, REWARDS, 1.0)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: documented_loss(OLD, OLD, REWARDS, 1.0, "snis"), ValueError, "weights must be one of 'documented'"),
        (lambda: documented_loss(3e38 * OLD, OLD, REWARDS, 1.0).values(), NonFiniteLoss, "term 'log_ratio'.*is inf"),
        (lambda: sequence_logprobs(OLD, ONES, 3), ValueError, "a multiple of group_size; got 2"),
        (lambda: sequence_logprobs(OLD + 2, ONES, 2), ValueError, "logprobs must be logarithms.*got 1"),
        (lambda: sequence_logprobs(OLD, 0 * ONES, 2), ValueError, r"mask counts no token of the rows \[0, 1\]"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES * torch.tensor([[1], [0]])), ValueError, r"of the rows \[1\]"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES[:, :2]), ValueError, "mask and logprobs must have one shape"),
        (lambda: published_loss(OLD, OLD[:1], SCORES, ONES), ValueError, "must have one shape"),
        (lambda: published_loss(OLD, OLD, SCORES[:1], ONES), ValueError, "advantages and the first tokens of logprobs"),
        (lambda: published_loss(OLD, OLD, SCORES / 0, ONES), ValueError, "advantages must hold finite numbers"),
        (lambda: published_loss(OLD + 2, OLD, SCORES, ONES), ValueError, "logprobs must be logarithms.*got 1"),
        (lambda: published_loss(OLD, 99 * OLD, SCORES, ONES), NonFiniteLoss, r"the ratio pi / pi_old.*got e\^98"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, kl_weight=0.1), ValueError, "kl_weight 0.1 needs.*None"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, OLD, kl_weight=-1), ValueError, "kl_weight.*at least 0"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, OLD[:1]), ValueError, "must have one shape"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, OLD + 2), ValueError, "ref_logprobs must be logarithms"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, kl_gradient="k1"), ValueError, "kl_gradient must be one of"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, clip_low=-1), ValueError, "clip_low.*at least 0; got -1"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, reduce_by="mean"), ValueError, "reduce_by must be one of"),
        (lambda: published_loss(OLD, OLD, SCORES, ONES, reduce_by="length"), ValueError, "max_length, the most.*None"),
        (lambda: target_distribution(OLD, REWARDS, 1.0, distinct=ONES), ValueError, "distinct must be a bool tensor"),
        (lambda: documented_loss(OLD, OLD, REWARDS, 1.0, distinct=ONES == 0), ValueError, r"rows \[0, 1\]"),
        (lambda: first_of_each(OLD, ONES, 2), TypeError, "completion must be a tensor of token ids"),
        (lambda: published_loss(OLD, OLD, SCORES, None), TypeError, "mask must be.*got NoneType"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


@given(st.integers(0, 10**6), st.sampled_from([math.nan, math.inf, -math.inf]))
@settings(max_examples=20)
def test_no_silent_nan(seed, value):
    rewards = random(2, 3, seed=seed)
    rewards.view(-1)[seed % 6] = value
    for function in (*functions, lambda logprobs, old, rewards, temperature: advantages(rewards)):
        with pytest.raises(ValueError, match=r"rewards.*1 of its 6 are NaN or infinite"):
            function(OLD.double(), OLD.double(), rewards, 1.0)
