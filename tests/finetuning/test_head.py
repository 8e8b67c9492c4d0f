"""The head a chunk at a time: against the plain head, against Liger, and what it holds in memory."""

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from mini_impl.finetuning import head
from mini_impl.finetuning.head import head_logprobs, head_loss
from mini_impl.finetuning.policy import reduce, token_logprobs, token_loss, token_weights
from mini_impl.losses import NonFiniteLoss
from tests.finetuning.test_policy import GOLDEN, f64, loss_like
from tests.tensors import random, same, whole


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


@st.composite
def heads(draw):
    """(hidden, weight, tokens), temperature, chunk, seed; with a gradient by hidden, by weight, or by both."""
    shape, seed = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)), draw(st.integers(0, 10**6))
    width, vocabulary = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    trained = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    hidden, weight = 2 * random(*shape, width, seed=seed), random(vocabulary, width, seed=seed + 1)
    hidden.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
    given = hidden, weight, whole(vocabulary, *shape, seed=seed)
    return given, draw(st.floats(0.1, 5)), draw(st.integers(1, 30)), seed


def example(*shape, vocabulary, width=4):
    """(hidden, weight, tokens), with a gradient by both."""
    hidden, weight = random(*shape, width), random(vocabulary, width, seed=1)
    return hidden.requires_grad_(), weight.requires_grad_(), whole(vocabulary, *shape)


def slopes(value, inputs, upstream=None):
    return torch.autograd.grad(value, [value for value in inputs if value.requires_grad], upstream)


@given(heads())
@settings(max_examples=60)
def test_head_logprobs_against_the_plain_head(case):
    inputs, temperature, chunk, seed = case
    ours, theirs = head_logprobs(*inputs, temperature, chunk), plain(*inputs, temperature)
    same(ours, theirs)
    assert ours.max() <= 0
    upstream = random(*ours.shape, seed=seed + 2)
    same(slopes(ours, inputs, upstream), slopes(theirs, inputs, upstream), 1e-10)


@given(heads())
@settings(max_examples=60)
def test_head_loss_against_the_plain_head(case):
    """With a loss that bends: the clipped one, every token with a weight of its own; scaled after, as a total is."""
    inputs, temperature, chunk, seed = case
    theirs = plain(*inputs, temperature)
    old = theirs.detach() + 0.3 * random(*theirs.shape, seed=seed + 2)
    advantage, weights = random(2, *theirs.shape, seed=seed + 3)

    def loss(logprobs, part):
        ratio = (logprobs - old[part]).exp()
        clipped = ratio.clamp(0.8, 1.28)
        return -weights[part] * torch.minimum(ratio * advantage[part], clipped * advantage[part])

    ours, theirs = 3 * head_loss(*inputs, loss, temperature, chunk), 3 * loss(theirs, slice(None)).sum()
    same(ours, theirs)
    same(slopes(ours, inputs), slopes(theirs, inputs), 1e-10)


def test_the_example_of_head_loss_is_the_published_loss():
    hidden, weight, tokens = example(3, 5, vocabulary=7)
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
    same(slopes(ours, (hidden, weight)), slopes(theirs, (hidden, weight)))


def test_heads_gradcheck():
    hidden, weight, tokens = example(2, 3, vocabulary=5)
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


def test_logits_that_fit_into_one_chunk_are_made_at_once(monkeypatch):
    """There is nothing to save then: the numbers, and the second derivative, are those of the plain head."""
    hidden, weight, tokens = example(2, 3, vocabulary=5)
    at_once = head_logprobs(hidden, weight, tokens)
    assert torch.equal(at_once, token_logprobs(hidden @ weight.T, tokens))
    torch.autograd.grad(torch.autograd.grad(at_once.sum(), hidden, create_graph=True)[0].sum(), weight)
    monkeypatch.setattr(head, "CHUNK", 10)  # two tokens' logits
    with Largest() as seen:
        same(head_logprobs(hidden, weight, tokens), at_once)
        head_loss(hidden, weight, tokens, lambda logprobs, part: logprobs).backward()
    assert seen.numbers < 6 * 5


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
    hidden, weight, tokens = example(2, 3, vocabulary=5)
    logprobs = head_logprobs(hidden, weight, tokens, chunk=4)
    first = torch.autograd.grad(logprobs.sum(), (hidden, weight), retain_graph=True)
    same(first, slopes(logprobs.sum(), (hidden, weight)), 0)  # two backward passes are all right
    loss = head_loss(hidden, weight, tokens, lambda logprobs, part: -logprobs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="head_loss has one backward pass"):
        loss.backward()
    chunked = head_logprobs(hidden, weight, tokens, chunk=4).sum()
    for once in (chunked, head_loss(hidden, weight, tokens, lambda logprobs, part: -logprobs)):
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


@pytest.mark.parametrize("case", json.loads(GOLDEN.read_text())["liger"], ids=lambda case: case["loss_type"])
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
    same(slopes(loss, (hidden, weight)), (f64(case["hidden_gradient"]), f64(case["weight_gradient"])), 1e-6)


# --- devices, bad input -----------------------------------------------------------------------------------------------


def everything(device, dtype=torch.float32):
    hidden, weight, tokens = random(4, 5, 6).to(dtype), random(9, 6, seed=1).to(dtype), whole(9, 4, 5)
    hidden, weight, tokens = (value.to(device) for value in (hidden, weight, tokens))
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs = head_logprobs(hidden, weight, tokens, 0.8, chunk=6)
    same(logprobs, token_logprobs(hidden @ weight.T / 0.8, tokens), 1e-5)
    loss = logprobs.sum() + head_loss(hidden, weight, tokens, lambda logprobs, part: -2 * logprobs, chunk=6)
    loss.backward()
    return loss.detach(), hidden.grad, weight.grad


def test_devices_and_dtypes(device):
    exact = everything("cpu", torch.float64)
    for ours, theirs in zip(everything(device), exact, strict=True):
        assert ours.device.type == device and ours.dtype == torch.float32
        same(ours.cpu().double(), theirs, 1e-4)


HEAD = (torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: head_logprobs(HEAD[0], HEAD[1][:, :3], HEAD[2]), ValueError, r"one width.*\[2, 3, 4\] and \[5, 3\]"),
        (lambda: head_logprobs(HEAD[0], HEAD[1], HEAD[2] + 5), ValueError, "from 0 to 4; got ids from 5 to 5"),
        (lambda: head_logprobs(HEAD[0], HEAD[1], HEAD[2][0]), ValueError, r"leading axes of hidden, \[2, 3\]"),
        (lambda: head_logprobs(HEAD[0].double(), *HEAD[1:]), TypeError, "hidden must have the dtype"),
        (lambda: head_logprobs(*HEAD, temperature=0), ValueError, "temperature.*greater than 0; got 0"),
        (lambda: head_logprobs(*HEAD, chunk=0), ValueError, "chunk must be at least 1; got 0"),
        (lambda: head_logprobs(HEAD[0] / 0, *HEAD[1:]), NonFiniteLoss, "hidden states, head, or both.*6 of its 6"),
        (lambda: head_loss(*HEAD, lambda x, part: 0.0), TypeError, "per_token returns must be a tensor; got float"),
        (lambda: head_loss(*HEAD, lambda x, part: x.sum()), ValueError, r"per_token returned.*one shape; got \[\] and"),
        (lambda: head_loss(*HEAD, lambda x, part: x.detach()), ValueError, "must return a function of its logprobs"),
        (lambda: head_loss(*HEAD, lambda x, part: x / 0), NonFiniteLoss, "the loss per token.*6 of its 6"),
        (lambda: head_loss(*HEAD, lambda x, part: x, temperature=-1), ValueError, "temperature.*got -1"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
