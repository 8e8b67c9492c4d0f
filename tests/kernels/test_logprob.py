"""Log-probabilities of chosen tokens and their gradient by the kernel: against float64 arithmetic and torch."""

import math

import numpy as np
import pytest
import torch

from mini_impl.finetuning import policy
from mini_impl.kernels import logprob
from mini_impl.kernels.logprob import token_logprobs, token_logprobs_torch
from tests.kernels.proof import DTYPES, close, layouts, moved, results, upstreams
from tests.tensors import random, same, whole

SIZES = [(1, 1), (3, 1), (1, 2), (5, 3), (4, 17), (3, 1000), (2, 4096), (2, 4097), (1, 32003)]


def scored(*shape: int, dtype=torch.float32, device="cpu", seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [.., vocabulary], some of them large, and tokens [..]."""
    logits = 4 * random(*shape, seed=seed)
    return logits.to(device, dtype), whole(shape[-1], *shape[:-1], seed=seed + 1).to(device)


def exact(logits, tokens, temperature=1.0, upstream=None):
    """Log-probabilities [..] and the gradient [.., vocabulary], in float64, with numpy."""
    x = logits.detach().cpu().double().numpy() / temperature
    largest = x.max(-1, keepdims=True)
    logprobs = x - largest - np.log(np.exp(x - largest).sum(-1, keepdims=True))
    chosen = tokens.cpu().long().numpy()[..., None]
    slopes = -np.exp(logprobs)
    np.put_along_axis(slopes, chosen, np.take_along_axis(slopes, chosen, -1) + 1, -1)
    behind = 1 if upstream is None else upstream.cpu().double().numpy()[..., None]
    gradient = behind * slopes / temperature
    return torch.from_numpy(np.take_along_axis(logprobs, chosen, -1)[..., 0]), torch.from_numpy(gradient)


def check(logits, tokens, temperature=1.0, upstream=None, tolerance=1e-5) -> None:
    """Kernel and torch function give the exact numbers, in the dtypes that they promise."""
    expected, gradient = exact(logits, tokens, temperature, upstream)
    for function in (token_logprobs, token_logprobs_torch):
        behind = None if upstream is None else [upstream]
        (logprobs,), slopes = results(function, logits, tokens, temperature, upstream=behind)
        close([logprobs, slopes], [expected, gradient], tolerance)
        assert logprobs.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
        assert slopes.dtype == logits.dtype and slopes.shape == logits.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_and_torch_compute_the_formula(kernels, size, dtype):
    check(*scored(*size, dtype=dtype, device=kernels), tolerance=DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.7, 1, 3.5])
def test_a_temperature_divides_the_logits(kernels, temperature, dtype):
    check(*scored(3, 50, dtype=dtype, device=kernels), temperature, tolerance=DTYPES[dtype])


@pytest.mark.parametrize("size", [(5,), (4, 5), (2, 3, 5), (2, 2, 3, 5)])
def test_any_leading_axes_and_strides(kernels, size, poisoned):
    """The places that are beside the logits in memory hold other numbers, and are not read for them."""
    logits, tokens = scored(*size, device=kernels)
    for these in layouts(logits).values():
        for ids in layouts(tokens).values() if tokens.ndim else [tokens]:
            check(these, ids)


def test_an_expanded_row_of_logits_gets_the_gradient_of_all_its_tokens(kernels):
    row, tokens = scored(6, 40, device=kernels)[0][0], whole(40, 6, seed=3).to(kernels)
    (logprobs,), gradient = results(lambda row: token_logprobs(row.expand(6, 40), tokens), row)
    expected, slopes = exact(row.expand(6, 40), tokens)
    close([logprobs, gradient], [expected, slopes.sum(0)], 1e-5)


def test_every_entry_is_written(kernels, poisoned):
    check(*scored(3, 5000, device=kernels))
    check(*scored(2, 3, 7, device=kernels))


@pytest.mark.parametrize("size", [(), (4,), (2, 3)])
def test_whatever_comes_from_behind_scales_the_gradient(kernels, size):
    logits, tokens = scored(*size, 33, device=kernels)
    for upstream in upstreams(tokens.float()).values():
        check(logits, tokens, 0.7, upstream)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_tokens_of_any_integer_dtype(kernels, dtype):
    logits, tokens = scored(4, 20, device=kernels)
    check(logits, tokens.to(dtype))


def test_large_logits_lose_no_more_than_their_own_digits(kernels):
    """Log-sum-exp as one number near 1e4 would have three digits behind the point."""
    logits, tokens = scored(4, 300, device=kernels)
    check(logits + 1e4, tokens)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("size", [7, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_as_torch_has_them(kernels, size, dtype):
    logits, _ = scored(10, size, dtype=dtype, device=kernels)
    tokens = torch.tensor([0, size - 1] * 5, device=kernels)
    logits[0, 0] = -math.inf  # the chosen one, cut by top-k
    logits[1, :-1] = -math.inf  # the chosen one is left alone; where there are several blocks, in the last of them
    logits[2, 1:] = -math.inf
    logits[3] = -math.inf
    logits[4, 0] = math.inf
    logits[5, 0] = math.inf
    logits[6, 2] = math.nan
    logits[7, 2:] = math.nan
    logits[8, 1:-1] = -math.inf
    logits[9, : size // 2] = -math.inf
    (ours,), our_slopes = results(token_logprobs, logits, tokens)
    (theirs,), their_slopes = results(token_logprobs_torch, logits, tokens)
    assert ours[0] == -math.inf and ours[1] == ours[2] == 0 and ours[3:8].isnan().all() and ours[8:].isfinite().all()
    close([ours[1:], our_slopes], [theirs[1:], their_slopes], DTYPES[dtype])
    assert theirs[0] == -math.inf


def test_an_id_that_is_none_gives_nan_and_reads_nothing_beside_the_logits(interpreter):
    logits, _ = scored(4, 9)
    with moved() as counts, torch.no_grad():
        logprobs = token_logprobs(logits, torch.tensor([-1, 9, 12, 3]))
    assert logprobs.isnan().tolist() == [True, True, True, False]
    assert counts.read == logprob.traffic(4, 9)[0].read - 3 * 4


@pytest.mark.parametrize("size", [(0, 5), (2, 0, 5), (0, 1)])
def test_without_places_the_result_is_empty(kernels, size):
    logits, tokens = scored(*size, device=kernels)
    (logprobs,), gradient = results(token_logprobs, logits, tokens)
    assert logprobs.shape == size[:-1] and gradient.shape == size


def test_without_a_gradient_the_value_is_the_same(kernels):
    logits, tokens = scored(4, 30, device=kernels)
    logprobs = token_logprobs(logits.requires_grad_(), tokens)
    with torch.no_grad():
        alone = token_logprobs(logits, tokens)
    with torch.inference_mode():
        inferred = token_logprobs(logits, tokens)
    assert torch.equal(alone, logprobs) and torch.equal(inferred, logprobs) and not alone.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_gradient_is_that_of_the_value(kernels, temperature):
    logits, tokens = scored(2, 2, 5, dtype=torch.float64, device=kernels)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, temperature), logits.requires_grad_())
    turned = logits.detach().mT.contiguous().mT.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, temperature), turned)


def test_a_second_backward_pass_gives_the_same(kernels):
    logits, tokens = scored(3, 30, device=kernels)
    logprobs = token_logprobs(logits.requires_grad_(), tokens)
    first, second = (torch.autograd.grad(logprobs.sum(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused(kernels):
    logits, tokens = scored(3, 30, device=kernels)
    with pytest.raises(RuntimeError, match="token_logprobs has no second derivative"):
        torch.autograd.grad(token_logprobs(logits.requires_grad_(), tokens).sum(), logits, create_graph=True)


# --- what it moves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1), (3, 17), (2, 4100)])
def test_it_moves_the_bytes_of_the_formula(interpreter, size, dtype):
    logits, tokens = scored(*size, dtype=dtype)
    forward, backward = logprob.traffic(*size, dtype)
    with moved() as counts:
        logprobs = token_logprobs(logits.requires_grad_(), tokens)
    assert (counts.read, counts.written) == (forward.read, forward.written)
    assert counts.once_written == counts.written
    with moved() as counts:
        logprobs.sum().backward()
    assert (counts.read, counts.written) == (backward.read, backward.written)
    assert counts.once_written == counts.written


def test_a_part_of_the_places_is_read_where_it_lies(interpreter):
    """Of the logits [batch, time, vocabulary] all but the last of each row: no copy."""
    logits, tokens = scored(2, 6, 10)
    part = logits[:, :-1]
    with moved() as counts, torch.no_grad():
        token_logprobs(part, tokens[:, :-1])
    places = {
        logits.data_ptr() + 4 * ((row * 6 + step) * 10 + v) for row in range(2) for step in range(5) for v in range(10)
    }
    assert places <= counts.places_read
    assert counts.read == logprob.traffic(10, 10)[0].read


# --- in the package ---------------------------------------------------------------------------------------------------


def test_the_policys_log_probabilities_are_made_by_the_kernel_where_it_is_wanted(interpreter):
    logits, tokens = scored(2, 3, 20)
    with moved() as counts:
        ours = results(policy.token_logprobs, logits, tokens)
    assert counts.read and counts.written
    close([*ours[0], ours[1]], exact(logits, tokens), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_policys_log_probabilities_keep_their_dtype(kernels, monkeypatch, dtype):
    logits, tokens = scored(3, 20, dtype=dtype, device=kernels)
    for how in (torch.autocast(kernels, torch.bfloat16), torch.no_grad()):
        with how:
            ours = policy.token_logprobs(logits, tokens)
            with monkeypatch.context() as without:
                without.setenv("MINI_IMPL_KERNELS", "0")
                same(ours, policy.token_logprobs(logits, tokens), DTYPES[dtype])


LOGITS, TOKENS = scored(3, 5)


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor; got list"),
        ({"logits": torch.ones(3, 5, dtype=torch.long)}, TypeError, "logits must be of .*; got torch.int64"),
        ({"logits": torch.ones(())}, ValueError, r"logits must be \[.., vocabulary\], .*got shape \[\]"),
        ({"logits": torch.ones(3, 0)}, ValueError, r"with a vocabulary; got shape \[3, 0\]"),
        ({"tokens": None}, TypeError, "tokens must be a tensor; got NoneType"),
        ({"tokens": TOKENS.float()}, TypeError, "tokens must be ids, whole numbers; got torch.float32"),
        ({"tokens": TOKENS > 0}, TypeError, "tokens must be ids, whole numbers; got torch.bool"),
        ({"tokens": TOKENS[:2]}, ValueError, r"the leading axes of logits, \[3\]; got \[2\]"),
        ({"tokens": TOKENS.to("meta")}, ValueError, "on the device of logits, cpu; got meta"),
        ({"temperature": "1"}, TypeError, "temperature must be a finite number greater than 0; got '1'"),
        ({"temperature": True}, TypeError, "temperature must be a finite number greater than 0; got True"),
        ({"temperature": 0}, ValueError, "temperature must be a finite number greater than 0; got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be a finite number greater than 0; got nan"),
    ],
)
def test_what_is_wrong_is_said(wrong, error, words):
    with pytest.raises(error, match=words):
        token_logprobs(**{"logits": LOGITS, "tokens": TOKENS, **wrong})
