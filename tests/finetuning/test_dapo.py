"""DAPO: by hand, in closed form, against finite differences and TRL's numbers; where a penalty trains nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_impl.checkpoint import load_checkpoint, save_checkpoint
from mini_impl.finetuning import sft
from mini_impl.finetuning.dapo import (
    AdaptiveThresholds,
    BatchNotFilled,
    TypeSampler,
    clip_penalty,
    clip_to_thresholds,
    documented_loss,
    fill_batch,
    finished,
    informative_groups,
    overlong_penalty,
    published_loss,
    sampling_penalty,
    sampling_weights,
)
from mini_impl.finetuning.head import head_logprobs
from mini_impl.losses import LossTerms, NonFiniteLoss
from tests.finetuning.models import close, small
from tests.finetuning.test_policy import f64, golden
from tests.tensors import random, same, whole

GOLDEN = Path(__file__).parents[1] / "golden" / "dapo.json"


def curved(*parameters):
    """A scalar with third derivatives, in which every parameter meets every other."""
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    slopes = random(len(flat), len(flat), seed=5)
    return (flat @ slopes).tanh().square().sum() + (flat.sum() / 3).sin()


def tiny(dtype=torch.float64, key_value_heads=1):
    return small(dtype=dtype, vocab_size=7, width=8, heads=2, key_value_heads=key_value_heads, feed_forward_width=6)


def cross_entropy(model, backend=SDPBackend.MATH):
    device = model.embedding.weight.device
    with sdpa_kernel(backend):
        return sft.documented_loss(model(whole(7, 3, 5).to(device)), whole(7, 3, 5, seed=1).to(device)).total


# --- documented: the penalty on gradients -----------------------------------------------------------------------------


def test_clip_penalty_by_hand():
    """|3| and |-1| with threshold 0.5: 2.5^2 + 0.5^2; 0.25 does not exceed 1, and -4 does by 3."""
    gradients = [torch.tensor([3.0, -1.0, 0.5, 0.0]), torch.tensor([[0.25], [-4.0]])]
    assert clip_penalty(gradients, [0.5, 1]).item() == 2.5**2 + 0.5**2 + 9
    assert clip_penalty(gradients, torch.tensor([0.5, 1.0])) == clip_penalty(gradients, [torch.tensor(0.5), 1.0])
    clipped = clip_to_thresholds(gradients, [0.5, 1])
    assert clipped[0].tolist() == [0.5, -0.5, 0.5, 0.0] and clipped[1].tolist() == [[0.25], [-1.0]]


@given(st.integers(1, 4), st.floats(0, 2), st.integers(0, 10**6))
def test_penalty_and_clipping_split_the_gradient(count, threshold, seed):
    """g = clipped + e; the penalty is the square of e; clipping bounds every entry, and what is clipped has none."""
    gradients = [random(3, number, seed=seed + number) for number in range(1, count + 1)]
    thresholds = [threshold * number for number in range(1, count + 1)]
    clipped = clip_to_thresholds(gradients, thresholds)
    excess = [g - c for g, c in zip(gradients, clipped, strict=True)]
    penalty = clip_penalty(gradients, thresholds).item()
    assert penalty == pytest.approx(sum(e.square().sum().item() for e in excess), abs=1e-12)
    assert all((c.abs() <= tau).all() for c, tau in zip(clipped, thresholds, strict=True))
    assert clip_penalty(clipped, thresholds) == 0
    assert all((g * c >= 0).all() for g, c in zip(gradients, clipped, strict=True))
    assert clip_penalty(gradients, [0.0] * count).item() == pytest.approx(sum(g.square().sum() for g in gradients))


def test_gradient_of_the_clip_penalty_by_its_gradients():
    gradients = [random(3, seed=1).requires_grad_(), random(2, 2, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(lambda *g: clip_penalty(g, [0.3, 0.7]), gradients)


def penalty_slope(parameters, thresholds):
    """d L_clip / d parameters, through the gradient of `curved`."""
    gradients = torch.autograd.grad(curved(*parameters), parameters, create_graph=True)
    return torch.autograd.grad(clip_penalty(gradients, thresholds), parameters)


@given(st.floats(0, 1.5), st.integers(0, 10**6))
@settings(max_examples=25)
def test_the_gradient_is_2_h_e(threshold, seed):
    """2 H e with the whole Hessian written out, across parameters too."""
    flat = 0.5 * random(5, seed=seed)
    parameters = [flat[:2].clone().requires_grad_(), flat[2:].clone().requires_grad_()]
    gradients = torch.autograd.grad(curved(*parameters), parameters)
    thresholds = [threshold, 2 * threshold]
    clipped = clip_to_thresholds(gradients, thresholds)
    excess = torch.cat([g - c for g, c in zip(gradients, clipped, strict=True)])
    hessian = torch.autograd.functional.hessian(lambda x: curved(x[:2], x[2:]), flat)
    slope = torch.cat(penalty_slope(parameters, thresholds))
    torch.testing.assert_close(slope, 2 * hessian @ excess, rtol=1e-9, atol=1e-9)


def test_the_gradient_against_finite_differences():
    parameters = [(0.5 * random(2, seed=1)).requires_grad_(), (0.5 * random(3, seed=2)).requires_grad_()]

    def penalty(*parameters):
        return clip_penalty(torch.autograd.grad(curved(*parameters), parameters, create_graph=True), [0.2, 0.1])

    assert penalty(*parameters) > 0
    assert torch.autograd.gradcheck(penalty, parameters)


def test_the_gradient_against_two_passes():
    """grad L(theta + 2 l e) = g + l grad L_clip + O(l^2): no second derivative, and ten times closer each time."""
    parameters = [(0.5 * random(2, seed=1)).requires_grad_(), (0.5 * random(3, seed=2)).requires_grad_()]
    thresholds = [0.2, 0.1]
    gradients = torch.autograd.grad(curved(*parameters), parameters)
    excess = [g - c for g, c in zip(gradients, clip_to_thresholds(gradients, thresholds), strict=True)]
    exact, errors = torch.cat(penalty_slope(parameters, thresholds)), []
    for weight in (1e-3, 1e-4, 1e-5):
        moved = [(p + 2 * weight * e).detach().requires_grad_() for p, e in zip(parameters, excess, strict=True)]
        there = torch.autograd.grad(curved(*moved), moved)
        slope = torch.cat([(t - g) / weight for t, g in zip(there, gradients, strict=True)])
        errors.append(((slope - exact).norm() / exact.norm()).item())
    assert errors[0] < 0.1 and errors[1] < 0.15 * errors[0] and errors[2] < 0.15 * errors[1]


def test_where_the_clip_penalty_trains_nothing():
    """A detached gradient, or one that `backward` left in .grad, makes a number; so does a linear loss, as H is 0."""
    parameter = random(3).requires_grad_()
    (detached,) = torch.autograd.grad(curved(parameter), parameter)
    curved(parameter).backward()
    for gradient in (detached, parameter.grad):
        penalty = clip_penalty([gradient], [0.0])
        assert penalty > 0 and not penalty.requires_grad
    (live,) = torch.autograd.grad(curved(parameter), parameter, create_graph=True)
    assert torch.autograd.grad(clip_penalty([live], [0.0]), parameter, retain_graph=True)[0].abs().max() > 0
    assert clip_penalty([live], [1e3]) == 0  # nor does one within its threshold
    assert torch.autograd.grad(clip_penalty([live], [1e3]), parameter)[0].abs().max() == 0


def test_the_penalty_bounds_nothing():
    """It adds to the step of a gradient that exceeds its threshold; clipping cuts that step."""
    x = f64(10.0).requires_grad_()
    loss = documented_loss(x.square() / 2, [x], [1.0], torch.ones(1), 0.1, 0.0).total
    (step,) = torch.autograd.grad(loss, x)
    assert step.item() == pytest.approx(10 + 0.1 * 2 * 9)
    assert clip_to_thresholds([torch.tensor(10.0)], [1.0])[0] == 1


# --- documented: thresholds that adapt --------------------------------------------------------------------------------


def test_thresholds_by_hand():
    """Quantile 0.75 of four entries: the third smallest. Then 0.5 of the old and 0.5 of the new."""
    thresholds = AdaptiveThresholds(quantile=0.75, decay=0.5)
    first = [torch.tensor([[1.0, -2.0], [3.0, -4.0]]), torch.tensor([0.5])]
    assert thresholds.update(first).tolist() == [3, 0.5]
    assert thresholds.update([2 * gradient for gradient in first]).tolist() == [4.5, 0.75]
    assert AdaptiveThresholds(0.0).update(first).tolist() == [1, 0.5]


@given(st.integers(1, 40), st.floats(0, 0.999), st.integers(0, 10**6))
def test_the_quantile(count, quantile, seed):
    gradient = random(count, seed=seed)
    tau = AdaptiveThresholds(quantile).update([gradient]).item()
    magnitudes = gradient.abs()
    assert (magnitudes <= tau).sum() >= quantile * count
    assert (magnitudes < tau).sum() < max(quantile * count, 1)  # and no smaller one does
    assert tau in magnitudes.tolist()


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.floats(0, 0.99))
def test_the_running_average(scales, decay):
    """Closed form: rho^t s_0 + (1 - rho) sum of rho^(t - k) s_k; each parameter by itself."""
    thresholds = AdaptiveThresholds(0.5, decay)
    for scale in scales:
        found = thresholds.update([f64([scale]), f64([1, 1, 1])])
    last = len(scales) - 1
    new = sum((1 - decay) * decay ** (last - k) * s for k, s in enumerate(scales) if k > 0)
    assert found.tolist() == pytest.approx([decay**last * scales[0] + new, 1])


def test_a_threshold_does_not_begin_at_zero():
    """LoRA's A has a gradient of exactly 0 at the first step: its threshold is that of the second."""
    thresholds = AdaptiveThresholds(0.5, 0.9)
    assert thresholds.update([torch.zeros(3)]).item() == 0
    assert thresholds.update([torch.full((3,), 2.0)]).item() == 2
    assert thresholds.update([torch.full((3,), 3.0)]).item() == pytest.approx(2.1)


def test_thresholds_are_constants_and_can_be_stored(tmp_path):
    parameter = random(4).requires_grad_()
    thresholds = AdaptiveThresholds()
    gradients = torch.autograd.grad(curved(parameter), parameter, create_graph=True)
    assert not thresholds.update(gradients).requires_grad
    save_checkpoint(tmp_path / "state", thresholds.state_dict(), {})
    again = AdaptiveThresholds()
    again.load_state_dict(load_checkpoint(tmp_path / "state")[0])
    new = [random(4, seed=3)]
    assert torch.equal(again.update(new), thresholds.update(new))
    again.load_state_dict(AdaptiveThresholds().state_dict())
    assert again.values is None


# --- documented: the sampler ------------------------------------------------------------------------------------------


def test_sampling_weights_by_hand():
    scores = f64([0.0, math.log(3.0)])
    same(sampling_weights(scores, 1.0), f64([0.25, 0.75]))
    same(sampling_weights(scores, 0.5), f64([0.1, 0.9]))
    same(sampling_weights(scores, 1.0, floor=0.2), f64([0.2 + 0.6 * 0.25, 0.2 + 0.6 * 0.75]))
    same(sampling_penalty(f64([0.25, 0.75])), f64(0.25 * math.log(0.5) + 0.75 * math.log(1.5)))


@given(st.integers(1, 6), st.floats(0.01, 100), st.floats(0, 0.99), st.integers(0, 10**6))
def test_sampling_weights(count, temperature, share, seed):
    scores, floor = 3 * random(count, seed=seed), share / count
    weights = sampling_weights(scores, temperature, floor)
    assert weights.sum().item() == pytest.approx(1) and (weights >= floor - 1e-12).all()
    assert (weights.argsort() == scores.argsort()).all() or weights.unique().numel() < count
    torch.testing.assert_close(sampling_weights(scores + 7, temperature, floor), weights)
    if temperature > 0.1:
        powers = (scores / temperature).exp()
        torch.testing.assert_close(weights, floor + (1 - share) * powers / powers.sum())
    penalty = sampling_penalty(weights).item()
    assert -1e-12 <= penalty <= math.log(count) + 1e-12
    assert penalty <= sampling_penalty(sampling_weights(scores, temperature)).item() + 1e-12  # a floor evens out


@given(st.integers(2, 6), st.floats(0.2, 10), st.integers(0, 10**6))
def test_gradient_of_the_sampling_penalty(count, temperature, seed):
    """d KL / d s_k = p_k (log p_k + H(p)) / beta; and KL ~ Var(s) / (2 beta^2) for a small spread."""
    scores = random(count, seed=seed).requires_grad_()
    p = sampling_weights(scores, temperature)
    (slope,) = torch.autograd.grad(sampling_penalty(p), scores)
    p = p.detach()
    entropy = -(p * p.log()).sum()
    torch.testing.assert_close(slope, p * (p.log() + entropy) / temperature, rtol=1e-9, atol=1e-12)
    small = 1e-3 * random(count, seed=seed)
    penalty = sampling_penalty(sampling_weights(small, temperature)).item()
    assert penalty == pytest.approx(small.var(correction=0).item() / (2 * temperature**2), rel=0.05, abs=1e-13)


def test_gradcheck_of_the_sampler():
    scores = random(2, 4).requires_grad_()
    for floor in (0.0, 0.1):
        assert torch.autograd.gradcheck(lambda s, f=floor: sampling_weights(s, 0.7, f), (scores,))
        assert torch.autograd.gradcheck(lambda s, f=floor: sampling_penalty(sampling_weights(s, 0.7, f)), (scores,))


def test_where_the_sampling_penalty_trains_nothing():
    """Live losses as scores: a pull towards equal losses. Those that a sampler stored: a constant."""
    parameter = random(3).requires_grad_()
    live = parameter.square()  # the losses of three types
    stored = TypeSampler(["a", "b", "c"], 1.0)
    stored.update(["a", "b", "c"], live)
    for weights in (stored.weights(), sampling_weights(live.detach(), 1.0)):
        loss = documented_loss(live.sum(), [parameter], [1.0], weights, 0.0, 5.0)
        assert loss.terms["sampling"] > 0 and not loss.terms["sampling"].requires_grad
        (slope,) = torch.autograd.grad(loss.total, parameter, retain_graph=True)
        torch.testing.assert_close(slope, 2 * parameter.detach())
    loss = documented_loss(live.sum(), [parameter], [1.0], sampling_weights(live, 1.0), 0.0, 5.0)
    (slope,) = torch.autograd.grad(loss.terms["sampling"], parameter, retain_graph=True)
    p = sampling_weights(live, 1.0).detach()
    expected = 5 * p * (p.log() - (p * p.log()).sum()) * 2 * parameter.detach()
    torch.testing.assert_close(slope, expected)


def test_sampling_by_the_weights_is_tilted_risk():
    """softmax(l / beta) maximises <p, l> - beta KL(p || u), of value beta log mean e^(l / beta); it is its gradient."""
    losses, beta = random(5).abs().requires_grad_(), 0.6
    weights = sampling_weights(losses.detach(), beta)

    def value(p):
        return (p * losses).sum() - beta * sampling_penalty(p)

    tilted = beta * ((losses / beta).logsumexp(0) - math.log(5))
    torch.testing.assert_close(value(weights), tilted)
    for seed in range(20):
        assert value(random(5, seed=seed).softmax(0)) < tilted
    torch.testing.assert_close(torch.autograd.grad(tilted, losses)[0], weights)


def test_the_sampler_by_hand():
    sampler = TypeSampler(["easy", "hard"], temperature=1.0, decay=0.5)
    assert sampler.weights().tolist() == [0.5, 0.5]
    sampler.update(["easy", "easy"], torch.tensor([1.0, 3.0]))
    assert sampler.scores[0] == 2 and sampler.weights().tolist() == [0.5, 0.5]  # the unseen counts as the worst
    sampler.update(["hard", "easy", "hard"], torch.tensor([5.0, 1.0, 7.0]))
    assert sampler.scores.tolist() == [1.5, 6]
    assert sampler.weights().tolist() == pytest.approx(sampling_weights(torch.tensor([1.5, 6.0]), 1.0).tolist())
    sampler.update(["hard"], torch.tensor([2.0]))
    assert sampler.scores.tolist() == [1.5, 4]


def test_gradient_norms_as_scores():
    """The norm over all parameters of the gradient of each type's mean loss; the graph is still there afterwards."""
    a, b = random(2, seed=1).requires_grad_(), random(3, seed=2).requires_grad_()
    losses = torch.stack([a.square().sum() + b.sum(), a.sum(), 3 * a.sum()])
    sampler = TypeSampler(["x", "y"], 1.0, score="gradient norm")
    sampler.update(["x", "y", "y"], losses + 0 * b.sum(), [a, b])
    norm_x = (4 * a.square().sum() + 3).sqrt().item()
    assert sampler.scores.tolist() == pytest.approx([norm_x, 2 * math.sqrt(2)])
    losses.sum().backward()
    assert a.grad is not None


def test_draws_follow_the_weights():
    sampler = TypeSampler(["a", "b", "c"], temperature=1.0, floor=0.05, seed=3)
    sampler.update(["a", "b", "c"], torch.tensor([0.0, 1.0, -3.0]))
    weights, draws = sampler.weights(), sampler.draw(20000)
    for kind, weight in zip("abc", weights.tolist(), strict=True):
        assert draws.count(kind) / 20000 == pytest.approx(weight, abs=4 * math.sqrt(weight * (1 - weight) / 20000))
    assert TypeSampler(["a", "b", "c"], 1.0, seed=1).draw(30) == TypeSampler(["a", "b", "c"], 1.0, seed=1).draw(30)
    assert TypeSampler(["a", "b", "c"], 1.0, seed=1).draw(30) != TypeSampler(["a", "b", "c"], 1.0, seed=2).draw(30)


def test_the_sampler_goes_on_after_a_break(tmp_path):
    sampler = TypeSampler(["a", "b", "c"], 0.5, seed=3)
    sampler.update(["a", "b"], torch.tensor([1.0, 2.0]))
    sampler.draw(5)
    state = sampler.state_dict()
    save_checkpoint(tmp_path / "state", state, {})
    again = TypeSampler(["a", "b", "c"], 0.5, seed=99)
    again.load_state_dict(load_checkpoint(tmp_path / "state")[0])
    for one in (sampler, again):
        one.update(["c"], torch.tensor([0.3]))
    assert torch.equal(again.weights(), sampler.weights()) and again.draw(50) == sampler.draw(50)
    later = TypeSampler(["a", "b", "c"], 0.5)
    later.load_state_dict(state)  # what came after it has not changed it
    assert later.scores.isnan().tolist() == [False, False, True]


# --- documented: the whole loss ---------------------------------------------------------------------------------------


def test_documented_loss_by_hand():
    """L = x^2, so g = 2x = 6, e = 4: 9 + 0.5 * 16 + 2 * KL; d by x: 6 + 0.5 * 2 * 2 * 4."""
    x = f64(3.0).requires_grad_()
    loss = documented_loss(x.square(), [x], [2.0], f64([0.25, 0.75]), 0.5, 2.0)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert isinstance(loss, LossTerms)
    assert loss.values() == pytest.approx({"basic": 9, "clip": 8, "sampling": 2 * kl})
    loss.total.backward()
    assert x.grad.item() == 6 + 0.5 * 2 * 2 * 4


def test_documented_loss_against_finite_differences():
    """With live losses as scores too, all three terms have a gradient."""
    parameters = [(0.5 * random(2, seed=1)).requires_grad_(), (0.5 * random(3, seed=2)).requires_grad_()]

    def total(*parameters):
        types = torch.stack([curved(parameters[0], parameters[1]), curved(parameters[1], parameters[0])])
        weights = sampling_weights(types, 0.8, 0.05)
        return documented_loss(types.mean(), parameters, [0.2, 0.1], weights, 0.3, 0.7).total

    assert torch.autograd.gradcheck(total, parameters)


@pytest.mark.parametrize("lora", [False, True])
def test_documented_loss_of_a_language_model(lora):
    """Along a direction, against a difference of the whole loss; with LoRA, by A and B alone."""
    model = tiny()
    if lora:
        sft.add_lora(model, rank=2)
        for layer in sft.lora_layers(model).values():
            layer.B.data.copy_(0.3 * random(*layer.B.shape, seed=4))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    thresholds, weights = [0.01] * len(parameters), torch.ones(2) / 2

    def loss():
        return documented_loss(cross_entropy(model), parameters, thresholds, weights, 0.5, 1.0)

    slopes = torch.autograd.grad(loss().total, parameters)
    plain = torch.autograd.grad(cross_entropy(model), parameters)
    assert max((a - b).abs().max() for a, b in zip(slopes, plain, strict=True)) > 1e-3  # the second term is in it
    direction = [random(*p.shape, seed=9) for p in parameters]
    values, step = [], 1e-5
    for move in (step, -2 * step):  # ahead, then as far behind
        for parameter, d in zip(parameters, direction, strict=True):
            parameter.data.add_(move * d)
        values.append(loss().total.item())
    along = sum((s * d).sum() for s, d in zip(slopes, direction, strict=True)).item()
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(along, rel=1e-6)


def test_adaptive_thresholds_take_in_the_step():
    x = random(4).requires_grad_()
    thresholds = AdaptiveThresholds(0.5, 0.9)
    loss = documented_loss(curved(x), [x], thresholds, torch.ones(1), 0.3, 0.0)
    (gradient,) = torch.autograd.grad(curved(x), x)
    tau = gradient.abs().sort().values[1]
    assert thresholds.values.tolist() == [tau.item()]
    fixed = documented_loss(curved(x), [x], [tau.item()], torch.ones(1), 0.3, 0.0)
    assert loss.total == fixed.total
    torch.testing.assert_close(torch.autograd.grad(loss.total, x), torch.autograd.grad(fixed.total, x))


def test_weights_of_zero_leave_the_cross_entropy():
    """Then nothing is differentiated twice, so that fused attention will do, and no threshold is moved."""
    model, thresholds = tiny(), AdaptiveThresholds()
    basic = sft.documented_loss(model(whole(7, 3, 5)), whole(7, 3, 5, seed=1)).total
    loss = documented_loss(basic, model.parameters(), thresholds, torch.tensor([0.2, 0.8]), 0, 0)
    assert loss.total == basic and loss.values() == {"basic": basic.item(), "clip": 0, "sampling": 0}
    assert thresholds.values is None
    loss.total.backward()


def test_fused_attention_is_named():
    model = tiny(key_value_heads=2)  # on the CPU, torch 2.5 has no fused attention with shared keys
    basic = cross_entropy(model, SDPBackend.FLASH_ATTENTION)
    with pytest.raises(RuntimeError, match=r"differentiated twice.*ScaledDotProduct.*sdpa_kernel.*SDPBackend.MATH"):
        documented_loss(basic, model.parameters(), AdaptiveThresholds(), torch.ones(1), 0.1, 0.0)


def test_a_gradient_of_its_own_is_named():
    """The chunked head has no second derivative; its part would be left out without a word."""
    model = tiny()
    with sdpa_kernel(SDPBackend.MATH):
        hidden, labels = model.hidden(whole(7, 3, 5)), whole(7, 3, 5, seed=1)
        basic = -head_logprobs(hidden, model.embedding.weight, labels, chunk=4).mean()
    with pytest.raises(RuntimeError, match=r"differentiated twice.*HeadLogprobs.*gradient of its own"):
        documented_loss(basic, model.parameters(), AdaptiveThresholds(), torch.ones(1), 0.1, 0.0)


def test_the_documented_method_on_devices(device):
    """Its five steps, a few times over, with each score: losses fall, and everything stays finite."""
    for score in ("loss", "gradient norm"):
        model = tiny(torch.float32).to(device)
        tokens, labels, kinds = whole(7, 8, 5).to(device), whole(7, 8, 5, seed=1).to(device), ["a", "b"] * 4
        sampler, thresholds = TypeSampler(["a", "b"], 0.5, 0.1, score=score), AdaptiveThresholds()
        parameters = list(model.parameters())
        optimiser = torch.optim.SGD(parameters, lr=0.05)
        losses = []
        for _ in range(8):
            rows = [kinds.index(kind) + 2 * (i % 4) for i, kind in enumerate(sampler.draw(8))]
            with sdpa_kernel(SDPBackend.MATH):
                each = sft.log_sum_exp_loss(model(tokens[rows]), labels[rows]).mean(1)  # 1.
            sampler.update([kinds[row] for row in rows], each, parameters)
            loss = documented_loss(each.mean(), parameters, thresholds, sampler.weights(), 0.01, 0.1)  # 2. to 4.
            optimiser.zero_grad()
            loss.total.backward()
            optimiser.step()  # 5.
            losses.append(loss.values()["basic"])
        assert losses[-1] < losses[0] and loss.total.device.type == device
        assert thresholds.values.device.type == device and len(thresholds.values) == len(parameters)


# --- published: the loss ----------------------------------------------------------------------------------------------


def test_published_loss_by_hand():
    """Ratios 1.25 (A > 0: below 1.28, not clipped), 2 (clipped to 1.28); 0.5 with A < 0 (clipped to 0.8)."""
    old, ratio = f64([[-3.0, -3.0]] * 2), f64([[1.25, 2.0], [0.5, 7.0]])
    advantages, mask = f64([1.0, -2.0]), torch.tensor([[1, 1], [1, 0]])
    loss = published_loss(old + ratio.log(), old, advantages, mask)
    assert loss.total.item() == pytest.approx(-(1.25 + 1.28 - 2 * 0.8) / 3)
    assert list(loss.terms) == ["policy"]
    equal = published_loss(old + ratio.log(), old, advantages, mask.bool(), clip_high=0.2).total.item()
    assert equal == pytest.approx(-(1.2 + 1.2 - 2 * 0.8) / 3)


@given(st.integers(1, 4), st.integers(1, 5), st.floats(0, 0.9), st.floats(0, 2), st.integers(0, 10**6))
def test_published_loss_against_the_formula(sequences, time, low, high, seed):
    old = -random(sequences, time, seed=seed).abs() - 1
    new = old + (0.5 * random(sequences, time, seed=seed + 1)).clamp(max=0.9)
    advantages = random(sequences, seed=seed + 2)
    mask = random(sequences, time, seed=seed + 3) > -0.3
    mask[:, 0] = True
    total = 0.0
    for i in range(sequences):
        for t in range(time):
            if mask[i, t]:
                rho, a = math.exp(new[i, t] - old[i, t]), advantages[i].item()
                total += min(rho * a, min(max(rho, 1 - low), 1 + high) * a)
    expected = -total / mask.sum().item()
    assert published_loss(new, old, advantages, mask, low, high).total.item() == pytest.approx(expected, abs=1e-12)
    beside = new.where(mask, -1e9)  # what is masked is not read
    assert published_loss(beside, old, advantages, mask, low, high).total.item() == pytest.approx(expected, abs=1e-12)


def test_every_token_weighs_the_same():
    """A long answer has as much say as it has tokens: at pi = pi_old, -sum of |o_i| A_i over all tokens."""
    old = -torch.ones(2, 5, dtype=torch.float64)
    mask = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    new = old.clone().requires_grad_()
    loss = published_loss(new, old, f64([1.0, -1.0]), mask).total
    assert loss.item() == pytest.approx(-(1 - 5) / 6)
    same(torch.autograd.grad(loss, new)[0], f64([[-1.0], [1.0]]) * mask / 6)


def test_gradient_of_the_published_loss():
    old, mask = -random(3, 4).abs() - 1, torch.ones(3, 4)
    new = (old + 0.3 * random(3, 4, seed=1)).requires_grad_()
    mask[1, 2:] = 0
    assert torch.autograd.gradcheck(lambda x: published_loss(x, old, random(3, seed=2), mask).total, (new,))


@pytest.mark.parametrize("kind", ["dapo", "bnpo"])  # the second is its name for the token mean of one batch
def test_published_loss_is_that_of_trl(kind):
    """Golden numbers made by tests/golden/make_policy.py; the cases without a KL term."""
    (case,) = [case for case in golden["trl"] if case["loss_type"] == kind and case["beta"] == 0]
    logprobs, old, advantages = (f64(case[name]) for name in ("logprobs", "old_logprobs", "advantages"))
    loss = published_loss(logprobs.requires_grad_(), old, advantages, torch.tensor(case["mask"]), *golden["clip"]).total
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    close(torch.autograd.grad(loss, logprobs)[0], f64(case["gradient"]), 1e-14)


# --- published: dynamic sampling --------------------------------------------------------------------------------------


def test_informative_groups():
    rewards = torch.tensor([[0.0, 1, 0], [1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.25]])
    assert informative_groups(rewards).tolist() == [True, False, False, True]


@given(st.floats(0.05, 0.95), st.integers(2, 6))
@settings(max_examples=20)
def test_how_many_groups_are_informative(p, group):
    """1 - p^G - (1 - p)^G, by enumeration of all groups of right and wrong answers."""
    groups = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * group)
    chance = (p**groups * (1 - p) ** (1 - groups)).prod(1)
    expected = 1 - p**group - (1 - p) ** group
    assert chance[informative_groups(groups)].sum().item() == pytest.approx(expected)


def drawing(chance, prompts=4, group=4, seed=0):
    """A `sample` whose groups carry (round, prompt), with right answers of a probability."""
    generator = torch.Generator().manual_seed(seed)

    def sample(number):
        rewards = (torch.rand(prompts, group, generator=generator) < chance).float()
        return [(number, prompt) for prompt in range(prompts)], rewards

    return sample


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_fill_batch(wanted, seed):
    """The first `wanted` informative groups in the order of drawing, each with its own rewards; no round too many."""
    batch = fill_batch(drawing(0.4, seed=seed), wanted, max_rounds=50)
    assert len(batch.groups) == wanted and batch.rewards.shape == (wanted, 4)
    assert informative_groups(batch.rewards).all()
    sample, every = drawing(0.4, seed=seed), []
    for number in range(batch.drawn // 4):
        groups, rewards = sample(number)
        every += [(g, r.tolist()) for g, r in zip(groups, rewards, strict=True) if 0 < r.sum() < 4]
    assert every[:wanted] == list(zip(batch.groups, batch.rewards.tolist(), strict=True))
    assert batch.groups[-1][0] == batch.drawn // 4 - 1


def test_a_batch_that_cannot_be_filled():
    with pytest.raises(BatchNotFilled, match="3 rounds of sampling gave 0 informative groups among 12, of 2 wanted"):
        fill_batch(drawing(1.0), 2, max_rounds=3)
    rewards = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    with pytest.raises(BatchNotFilled, match="gave 2 informative groups among 4") as caught:
        fill_batch(lambda number: (["mixed", "equal"], rewards), 3, max_rounds=2)
    assert caught.value.batch.groups == ["mixed", "mixed"] and caught.value.batch.drawn == 4
    assert caught.value.batch.rewards.tolist() == [[1, 0], [1, 0]]


# --- published: answers that are too long -----------------------------------------------------------------------------


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 16384, 18432, 20480, 20481, 99999])  # the paper's numbers
    assert overlong_penalty(lengths, 20480, 4096).tolist() == [0, 0, -0.5, -1, -1, -1]
    assert overlong_penalty(lengths.view(2, 3), 20480, 4096).shape == (2, 3)


def test_overlong_penalty_is_that_of_trl():
    for case in json.loads(GOLDEN.read_text())["cases"]:
        found = overlong_penalty(torch.tensor(case["lengths"]), case["max_length"], case["buffer"])
        assert found.tolist() == pytest.approx(case["penalties"])


@given(st.integers(1, 30), st.data())
def test_overlong_penalty_by_cases(max_length, data):
    buffer = data.draw(st.integers(1, max_length))
    for length in range(max_length + 3):
        expected = (max_length - buffer - length) / buffer if length <= max_length else -1
        found = overlong_penalty(f64([length]), max_length, buffer).item()
        assert found == pytest.approx(0 if length <= max_length - buffer else expected)


def test_finished():
    """Stop token 9, which is also the padding: only one that counts ends an answer."""
    completion = torch.tensor([[3, 9, 9], [3, 4, 5], [3, 4, 9], [9, 9, 9]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]])
    assert finished(completion, mask, 9).tolist() == [True, False, True, True]
    cut = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]])  # the answers as if cut before their stop
    assert finished(completion, cut.bool(), 9).tolist() == [False, False, False, True]
    # filtering: the rows that are left give the loss that a mask without the others would
    new, advantages, rows = -random(4, 3).abs() - 1, random(4, seed=1), finished(completion, mask, 9)
    loss = published_loss(new[rows], new[rows], advantages[rows], mask[rows]).total.item()
    assert loss == pytest.approx(-(2 * advantages[0] + 3 * advantages[2] + advantages[3]).item() / 6)


# --- bad input --------------------------------------------------------------------------------------------------------

X = torch.ones(3, dtype=torch.float64, requires_grad=True)
ONES, P = torch.ones(3), torch.tensor([0.5, 0.5])
LOGPROBS, MASK = -torch.ones(2, 3), torch.ones(2, 3)


def documented(**changes):
    given = {"loss": X.square().sum(), "parameters": [X], "thresholds": [1.0], "weights": P}
    return documented_loss(**{**given, "clip_penalty_weight": 0.1, "sampling_penalty_weight": 0.1, **changes})


def published(mask=MASK, **bounds):
    return published_loss(LOGPROBS, LOGPROBS, ONES[:2], mask, **bounds)


def sampler(**changes):
    return TypeSampler(**{"kinds": ["a", "b"], "temperature": 1.0, **changes})


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: clip_penalty([ONES], [1.0, 2.0]), ValueError, r"one number a gradient, 1.*got \[1.0, 2.0\]"),
        (lambda: clip_penalty([ONES], 1.0), TypeError, "thresholds must be several numbers.*got 1.0"),
        (lambda: clip_penalty([ONES], [-1.0]), ValueError, "thresholds.*at least 0; got -1"),
        (lambda: clip_penalty([ONES], [ONES]), ValueError, r"thresholds must be one number.*got \[tensor\(\[1"),
        (lambda: clip_penalty([ONES], [math.nan]), ValueError, "thresholds must be finite.*got nan"),
        (lambda: clip_penalty(ONES, [1.0]), TypeError, "gradients must be several tensors.*got one Tensor"),
        (lambda: clip_penalty([None], [1.0]), TypeError, r"gradients\[0\].*got NoneType"),
        (lambda: clip_penalty([], []), ValueError, "gradients must be at least one.*got 0"),
        (lambda: clip_to_thresholds([ONES, ONES / 0], [1, 1]), NonFiniteLoss, r"gradients\[1\].*3 of its 3 are NaN"),
        (lambda: AdaptiveThresholds(quantile=1.0), ValueError, "quantile.*less than 1; got 1.0"),
        (lambda: AdaptiveThresholds(decay=-0.1), ValueError, "decay.*at least 0.*got -0.1"),
        (lambda: AdaptiveThresholds().update([ONES * math.inf]), NonFiniteLoss, r"gradients\[0\].*NaN or infinite"),
        (lambda: sampling_weights(ONES, 0.0), ValueError, "temperature.*greater than 0; got 0"),
        (lambda: sampling_weights(ONES, 1.0, 0.4), ValueError, "floor.*less than 0.333333; got 0.4"),
        (lambda: sampling_weights(ONES * math.nan, 1.0), ValueError, "scores.*3 of its 3 are NaN"),
        (lambda: sampling_penalty(ONES), ValueError, "probabilities.*sum to 1"),
        (lambda: sampler(kinds=["a", "a"]), ValueError, "kinds must be several names that differ"),
        (lambda: sampler(kinds="ab"), ValueError, "kinds must be several names that differ.*got 'ab'"),
        (lambda: sampler(floor=0.5), ValueError, "floor.*less than 0.5; got 0.5"),
        (lambda: sampler(score="norm"), ValueError, "score must be one of 'loss', 'gradient norm'; got 'norm'"),
        (lambda: sampler(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: sampler().draw(0), ValueError, "count must be at least 1; got 0"),
        (lambda: sampler().update(["a", "z"], ONES[:2]), ValueError, r"kinds must be .*\['a', 'b'\]; got 2, of .*'z'"),
        (lambda: sampler().update(["a"], ONES), ValueError, "kinds must be one a loss, 3.*got 1, of"),
        (lambda: sampler().update(["a"], ONES[:1] / 0), NonFiniteLoss, "the loss of 'a' is inf"),
        (lambda: sampler(score="gradient norm").update(["a"], X[:1]), ValueError, "parameters must be.*got 0"),
        (lambda: documented(loss=LossTerms.of(a=X.sum())), TypeError, "loss must be a scalar tensor.*LossTerms.total"),
        (lambda: documented(loss=X.square()), ValueError, "loss must be a scalar with a graph"),
        (lambda: documented(loss=torch.tensor(1.0)), ValueError, r"loss must be .* a graph.*got tensor\(1.\)"),
        (lambda: documented(loss=X.square().sum() / 0), NonFiniteLoss, r"gradients\[0\]"),
        (lambda: documented(loss=X.sum() / 0, clip_penalty_weight=0).values(), NonFiniteLoss, "term 'basic'.* is inf"),
        (lambda: documented(parameters=[X, ONES]), ValueError, r"must require a gradient.* those at \[1\] do not"),
        (lambda: documented(parameters=[X.exp(), X]), ValueError, r"does not depend on the parameters at \[0\]"),
        (lambda: documented(weights=P[None]), ValueError, r"weights.*\[type\].*got shape \[1, 2\]"),
        (lambda: documented(weights=2 * P), ValueError, "probabilities.*sum to 1"),
        (lambda: documented(clip_penalty_weight=-1), ValueError, "clip_penalty_weight.*at least 0; got -1"),
        (lambda: informative_groups(torch.ones(2, 1)), ValueError, "rewards.*at least 2 answers a group"),
        (lambda: informative_groups(torch.ones(2, 2) / 0), ValueError, "rewards.*4 of its 4 are NaN or infinite"),
        (lambda: fill_batch(drawing(0.5), 1, 0), ValueError, "max_rounds must be at least 1; got 0"),
        (lambda: fill_batch(lambda number: ([1], MASK), 1), ValueError, "one group a row of rewards, 2; got 1"),
        (lambda: overlong_penalty(torch.tensor([1]), 5, 6), ValueError, "buffer must be at most 5"),
        (lambda: overlong_penalty(torch.tensor([-1]), 5, 1), ValueError, "lengths must be.*at least 0; got -1"),
        (lambda: overlong_penalty([1], 5, 1), TypeError, r"lengths must be a tensor.*got \[1\]"),
        (lambda: finished(LOGPROBS, MASK, 1), TypeError, "completion must be a tensor of token ids"),
        (lambda: finished(whole(7, 2, 3), MASK[:, 1:], 1), ValueError, "mask"),
        (lambda: finished(whole(7, 2, 3), 0 * MASK, 1), ValueError, "mask counts no token"),
        (lambda: finished(whole(7, 2, 3), MASK, -1), ValueError, "eos_token_id must be at least 0"),
        (lambda: published(mask=0 * MASK), ValueError, r"mask counts no token.*\[0, 1\]"),
        (lambda: published(clip_low=-0.1), ValueError, "clip_low.*at least 0"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_state_of_another_model_or_sampler():
    thresholds = AdaptiveThresholds()
    thresholds.update([ONES, ONES])
    with pytest.raises(ValueError, match="gradients must be 2, one a parameter; got 1"):
        thresholds.update([ONES])
    with pytest.raises(RuntimeError, match="size of tensor"):
        sampler().load_state_dict(sampler(kinds=["a", "b", "c"]).state_dict())


# --- numbers at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32])
def test_lengths_of_any_kind_mean_the_same(dtype):
    lengths = torch.tensor([2, 4, 5, 9], dtype=dtype)
    assert overlong_penalty(lengths, max_length=6, buffer=2).tolist() == [0, 0, -0.5, -1]
    assert overlong_penalty(lengths, max_length=300, buffer=np.uint8(2)).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_ids_of_any_kind_mean_the_same(dtype):
    completion, mask = torch.tensor([[7, 44], [44, 3]], dtype=dtype), torch.ones(2, 2, dtype=torch.bool)
    assert finished(completion, mask, 44).tolist() == [True, True]
    assert finished(completion, mask, 300).tolist() == [False, False]  # 44 in eight bits


def test_what_overflows_is_named():
    with pytest.raises(ValueError, match="scores / temperature must hold finite numbers"):
        sampling_weights(torch.tensor([1.0, 2.0]), 1e-40)
    with pytest.raises(NonFiniteLoss, match="the clip penalty must hold finite numbers"):
        clip_penalty([torch.full((3,), 1e30)], [1.0])
