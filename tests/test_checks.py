"""What callers get wrong is said clearly: each check lets the right through and names the wrong."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl import checks
from mini_impl.losses import NonFiniteLoss

# --- tensors --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), max_size=4), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_a_tensor_with_the_axes_passes_unchanged(shape, dtype):
    value = torch.zeros(shape, dtype=dtype)
    if shape:
        assert checks.tensor("x", value, *"abcd"[: len(shape)]) is value
        assert checks.tensor("x", value, ..., "d") is value
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor \[.*\], no axis empty; got shape"):
        checks.tensor("x", value, *"abcde"[: len(shape) + 1])


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ([[1.0]], TypeError, r"x must be a floating-point tensor \[time, variable\]; got list"),
        (np.zeros((1, 1)), TypeError, "got ndarray"),
        (None, TypeError, "got NoneType"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, r"got dtype torch\.int64"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, r"got dtype torch\.complex64"),
        (torch.zeros(2), ValueError, r"no axis empty; got shape \[2\]"),
        (torch.zeros(0, 2), ValueError, r"no axis empty; got shape \[0, 2\]"),
    ],
)
def test_what_is_no_such_tensor_is_named(value, error, words):
    with pytest.raises(error, match=words):
        checks.tensor("x", value, "time", "variable")


def test_leading_axes():
    assert checks.tensor("x", torch.tensor([math.nan]), ..., "time").isnan()  # its numbers are not looked at
    with pytest.raises(ValueError, match=r"x must be .* \[\.\., variable\], no axis empty; got shape \[\]"):
        checks.tensor("x", torch.tensor(1.0), ..., "variable")


def test_alike():
    one = torch.zeros(2, 3)
    checks.alike("a", one, "b", torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"a and b must have one shape; got \[2, 3\] and \[3, 2\]"):
        checks.alike("a", one, "b", one.T)
    with pytest.raises(TypeError, match=r"a and b must have one dtype; got torch.float32 and torch.float64"):
        checks.alike("a", one, "b", one.double())
    with pytest.raises(ValueError, match="a and b must be on one device; got cpu and meta"):
        checks.alike("a", one, "b", one.to("meta"))


# --- the numbers in tensors -----------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1, max_size=4), st.sampled_from([torch.float32, torch.float64]))
def test_finite(numbers, dtype):
    value = torch.tensor(numbers, dtype=dtype)
    bad = sum(not math.isfinite(number) for number in numbers)
    if not bad:
        checks.look(checks.finite("x", value))
    else:
        with pytest.raises(FloatingPointError, match=f"x must hold finite .*; {bad} of its {len(numbers)} are NaN or"):
            checks.look(checks.finite("x", value, NonFiniteLoss))


@given(st.lists(st.floats(-5, 0), min_size=1, max_size=4), st.sampled_from([0.01, math.nan, math.inf, -math.inf]))
def test_logprobs(numbers, bad):
    kept = torch.ones(len(numbers) + 1, dtype=torch.bool).index_fill(0, torch.tensor([0]), False)
    checks.look(checks.logprobs("l", torch.tensor(numbers)))
    checks.look(checks.logprobs("l", torch.tensor([bad, *numbers]), kept))  # beside the mask anything may stand
    with pytest.raises(ValueError, match="l must be logarithms.*got 0.01" if bad == 0.01 else "l must hold finite"):
        checks.look(checks.logprobs("l", torch.tensor([*numbers, bad]), kept))


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_counted(rows):
    empty = [row for row, mask in enumerate(rows) if not any(mask)]
    for dtype in (torch.bool, torch.int64, torch.float32):
        if not empty:
            checks.look(*checks.counted(torch.tensor(rows, dtype=dtype)))
        else:
            with pytest.raises(ValueError, match=re.escape(f"mask counts no token of the rows {empty}; leave")):
                checks.look(*checks.counted(torch.tensor(rows, dtype=dtype)))
    with pytest.raises(ValueError, match="mask must be a tensor of bool, or of 0 and 1; got other numbers"):
        checks.look(*checks.counted(torch.tensor(rows) + 2))


@given(st.lists(st.integers(-3, 8), min_size=1, max_size=5), st.integers(1, 6))
def test_known_ids(ids, vocab_size):
    if all(0 <= token < vocab_size for token in ids):
        checks.look(checks.known_ids("tokens", torch.tensor(ids), vocab_size))
    else:
        wrong = f"tokens must hold .* from 0 to {vocab_size - 1}; got ids from {min(ids)} to {max(ids)}"
        with pytest.raises(ValueError, match=wrong):
            checks.look(checks.known_ids("tokens", torch.tensor(ids), vocab_size))


def test_all_that_is_looked_at_is_judged():
    fine, bad = torch.zeros(2), torch.tensor([math.nan, 1])
    for order in ((fine, bad), (bad, fine)):
        with pytest.raises(ValueError, match=r"x. must hold finite numbers only; 1 of its 2"):
            checks.look(*(checks.finite(f"x{place}", value) for place, value in enumerate(order)))


# --- numbers --------------------------------------------------------------------------------------------------------


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_integer(value, least):
    for same in (value, np.int64(value)):
        if value >= least:
            assert checks.integer("n", same, least) == value and type(checks.integer("n", same, least)) is int
        else:
            with pytest.raises(ValueError, match=f"n must be at least {least}; got {value}"):
                checks.integer("n", same, least)


@pytest.mark.parametrize("value", [1.0, True, "1", None, torch.tensor(1), math.nan])
def test_what_is_no_integer(value):
    with pytest.raises(TypeError, match="n must be a whole number of at least 1; got"):
        checks.integer("n", value)


@given(st.floats(), st.floats(-10, 10))
def test_number(value, bound):
    finite = math.isfinite(value)
    for limits, inside in (({}, finite), ({"least": bound}, finite and value >= bound)):
        if inside:
            assert checks.number("x", value, **limits) == value
        else:
            with pytest.raises(ValueError, match="x must be a finite number"):
                checks.number("x", value, **limits)
    if finite and value > bound:
        assert checks.number("x", np.float64(value), above=bound) == value
    else:
        with pytest.raises(ValueError, match=f"x must be a finite number greater than {bound:g}".replace("+", r"\+")):
            checks.number("x", value, above=bound)


@pytest.mark.parametrize("value", ["1", True, None, 1j, torch.tensor(1.0)])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="x must be a finite number of at least 0; got"):
        checks.number("x", value, least=0)


def test_choice():
    checks.choice("norm", "fro", ("fro", "spectral"))
    with pytest.raises(ValueError, match="norm must be one of 'fro', 'spectral'; got 'max'"):
        checks.choice("norm", "max", ("fro", "spectral"))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (4, ValueError, "kernel_size must be odd, .*; got 4"),
        (9, ValueError, "kernel_size must be odd, .* at most 5, as there are 5 time steps; got 9"),
        (7, ValueError, "kernel_size must be odd, .* at most 5, as there are 5 time steps; got 7"),
        (-1, ValueError, "kernel_size must be at least 1"),
        (3.0, TypeError, "kernel_size must be a whole number"),
    ],
)
def test_odd(value, error, words):
    assert checks.odd("kernel_size", 5, most=5) == 5
    with pytest.raises(error, match=words):
        checks.odd("kernel_size", value, most=5)


@given(st.integers(1, 5), st.data())
def test_indices(size, draw):
    whole = draw.draw(st.permutations(range(size)))
    some = whole[: draw.draw(st.integers(1, size))]
    from_end = [index - size for index in some]
    assert checks.indices("place", some, size) == checks.indices("place", tuple(from_end), size) == tuple(some)
    assert checks.indices("place", np.int64(some[0]), size) == (some[0],)


@pytest.mark.parametrize("value", [1.0, True, None, "01", (0, 1.0), [0, True], torch.tensor([0])])
def test_what_is_no_index(value):
    with pytest.raises(TypeError, match="place must be an index from -3 to 2, or several that differ; got"):
        checks.indices("place", value, 3)


@pytest.mark.parametrize("value", [3, -4, (), (0, 3), (1, 1), [2, -1]])
def test_indices_that_name_no_place_or_one_twice(value):
    with pytest.raises(ValueError, match="place must be an index from -3 to 2, or several that differ; got"):
        checks.indices("place", value, 3)


# --- what forecasters take and give ---------------------------------------------------------------------------------


class Output:
    def __init__(self, prediction):
        self.prediction = prediction


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (
            torch.zeros(4, 8, 2),
            ValueError,
            r"history must have 9 time steps, as the model was made for; got \[4, 8, 2\]",
        ),
        (torch.zeros(4, 9), ValueError, r"history must be .*\[batch, time, variable\].*\[4, 9\]"),
        (torch.zeros(4, 9, 2).double(), TypeError, r"history must have the dtype of the model, torch\.float32; got"),
        (torch.zeros(4, 9, 2, device="meta"), ValueError, "history must be on the device of the model, cpu; got meta"),
        (torch.full((4, 9, 2), math.inf), ValueError, "history .*72 of its 72 are NaN or infinite"),
    ],
)
def test_history(value, error, words):
    checks.history(torch.zeros(4, 9, 2), 9, torch.zeros(1))
    with pytest.raises(error, match=words):
        checks.history(value, 9, torch.zeros(1))


@pytest.mark.parametrize(
    ("output", "target", "error", "words"),
    [
        (torch.zeros(4, 3, 2), torch.zeros(4, 3, 2), TypeError, "output must be what .*got torch.Tensor"),
        (
            Output(torch.zeros(4, 3, 2)),
            torch.zeros(4, 3, 1),
            ValueError,
            "output.prediction and target must have one shape",
        ),
        (Output(torch.zeros(4, 3, 2)), torch.zeros(4, 3), ValueError, r"target must be .*\[batch, horizon, variable\]"),
        (Output(torch.zeros(4, 3, 2)), torch.zeros(4, 3, 2).double(), TypeError, "one dtype"),
    ],
)
def test_forecast(output, target, error, words):
    checks.forecast(Output(torch.zeros(4, 3, 2)), torch.zeros(4, 3, 2))
    with pytest.raises(error, match=words):
        checks.forecast(output, target)
