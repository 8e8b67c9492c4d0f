"""Training: what it keeps, that it stops early and restores; scores over every window."""

import functools
import os
import struct
import sys

import pytest
import torch
from torch import nn

from mini_impl.forecasting.data import Origin, Scaler, Windows
from mini_impl.forecasting.dlinear import DLinear, Output, documented_loss, published_loss
from mini_impl.forecasting.train import absolute_errors, evaluate, fit, learning_rate_at
from mini_impl.losses import LossTerms, NonFiniteLoss


def waves(rows=300, seed=0):
    """Two noisy daily waves, [time, variable]."""
    noise = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    hours = torch.arange(rows)[:, None] + torch.tensor([0, 6])
    return torch.sin(2 * torch.pi * hours / 24) + 0.3 * noise


def windows(seed=0):
    return Windows(waves(seed=seed), history=24, horizon=6)


def all_named(windows):
    """The same histories; the target asks for both variables by name, the other way round."""
    return Windows(windows.values, windows.history, windows.horizon, endogenous=(1, 0))


def small(seed=0):
    torch.manual_seed(seed)
    return DLinear(history=24, horizon=6, kernel_size=5)


def test_a_terminal_shows_how_far_it_is(monkeypatch):
    """A bar of a hundred columns; where nobody looks, there is none (the other tests print nothing)."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")  # Windows has no such terminals
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    with open(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        fit(small(), windows(), windows(1), published_loss, epochs=2)
        terminal.flush()
        said = os.read(leader, 10**5).decode()
    os.close(leader)
    assert "epoch 1 of 2:   0%|" in said and "epoch 2 of 2:   0%|" in said


class Dropout(nn.Module):
    """A model with random numbers of its own in training."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = small(), nn.Dropout(0.5)

    def forward(self, history):
        return self.inner(self.drop(history))


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 64, 10_000])
def test_every_window_counts_once(batch_size):
    model, test = small().double(), Windows(waves().double(), 24, 6)
    history, target = test[:]
    error = model(history).prediction - target
    scores = evaluate(model, test, batch_size=batch_size)
    assert scores.mse == pytest.approx(error.square().mean().item(), rel=1e-12)
    assert scores.mae == pytest.approx(error.abs().mean().item(), rel=1e-12)


def test_evaluate_takes_functions_and_leaves_the_mode():
    model = Dropout().train()
    assert evaluate(model, windows()) == evaluate(model, windows())  # no dropout
    assert model.training
    assert evaluate(lambda history: history[:, -6:], windows()).mse > 0


@pytest.mark.parametrize(
    ("forecast", "settings", "error", "says"),
    [
        (lambda history: history, {}, ValueError, r"the forecast and the target.*\[256, 24, 2\] and \[256, 6, 2\]"),
        (lambda history: None, {}, TypeError, "the forecast must be a floating-point tensor .*; got NoneType"),
        (lambda history: history[:, -6:] / 0, {}, NonFiniteLoss, "forecast holds NaN"),
        (small(), {"batch_size": 0}, ValueError, "batch_size must be at least 1; got 0"),
        (small(), {"windows": None}, TypeError, "windows must be Windows, as `prepare` returns them; got NoneType"),
    ],
)
def test_evaluate_names_what_is_wrong(forecast, settings, error, says):
    with pytest.raises(error, match=says):
        evaluate(forecast, **{"windows": windows(), **settings})


# --- fit --------------------------------------------------------------------------------------------------------------


def test_training_learns_and_keeps_every_term(device):
    model = small().to(device)
    before = evaluate(model, windows(1)).mse
    loss = functools.partial(documented_loss, trend_weight=0.5)
    training = fit(model, windows(), windows(1), loss, epochs=4, learning_rate=1e-2)
    steps = len(training.validation) * -(-len(windows()) // 32)
    assert set(training.terms) == {"forecast", "trend"}
    assert all(len(values) == steps for values in training.terms.values())
    assert evaluate(model, windows(1)).mse < before / 2
    assert next(model.parameters()).device.type == device


def test_one_step_is_one_step_of_adam():
    """The same arithmetic, written apart, in float64: one batch of all windows, one epoch."""
    ours, theirs = small().double(), small().double()
    data = Windows(waves().double(), 24, 6)
    fit(ours, data, data, published_loss, epochs=1, batch_size=len(data), learning_rate=1e-2)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    history, target = data[:]
    nn.functional.mse_loss(theirs(history).prediction, target).backward()
    optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_learning_rate_falls_by_the_share_of_steps_done(monkeypatch):
    """By hand: 4 steps in 2 epochs are at the shares 0, 1/4, 1/2, 3/4; the same for 4 epochs of one step.

    From 0.8 down to a hundredth of it: a tenth of it at the half.
    """
    rates = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    half = (len(windows()) + 1) // 2
    fit(small(), windows(), windows(1), published_loss, epochs=2, batch_size=half, learning_rate=0.8)
    fit(small(), windows(), windows(1), published_loss, epochs=4, batch_size=2 * half, learning_rate=0.8, patience=4)
    by_hand = [0.8, 0.8 / 10**0.5, 0.08, 0.08 / 10**0.5]
    assert rates == pytest.approx([*by_hand, *by_hand])
    assert learning_rate_at(0.8, 1.0) == pytest.approx(0.008)


def test_a_short_series_gets_its_steps(monkeypatch):
    """Ten epochs, or as many as 1000 steps take; and it waits for three of ten of them."""
    passes = []
    monkeypatch.setattr("mini_impl.forecasting.train.LEAST_STEPS", 40)

    def worse(model, windows):
        passes.append(model)
        return float(len(passes))

    for batch_size, waited in ((len(windows()), 40 * 3 // 10), (1, 3)):
        passes.clear()
        training = fit(small(), windows(), windows(1), published_loss, batch_size=batch_size, score=worse)
        assert len(training.validation) == 1 + waited


def test_a_fitted_model_knows_its_series():
    origin = Origin(("a", "b"), Scaler.fit(waves()), None)
    data = Windows(waves(), 24, 6, origin=origin)
    model = small()
    assert model.origin is None
    fit(model, data, data, published_loss, epochs=1)
    assert model.origin is origin
    fit(model, windows(), windows(1), published_loss, epochs=1)
    assert model.origin is origin


def test_errors_of_each_variable_by_hand():
    data = Windows(torch.tensor([[0.0, 10.0], [1.0, 30.0], [3.0, 60.0]]), 1, 1)
    errors = absolute_errors(lambda history: history, data)  # the steps 1, 2 and 20, 30
    assert errors.tolist() == [1.5, 25.0] and errors.dtype == torch.float64


def test_the_best_weights_come_back_and_it_stops_early():
    model = small()
    training = fit(model, windows(), windows(1), published_loss, epochs=50, learning_rate=0.3, patience=2)
    best = min(training.validation)
    assert evaluate(model, windows(1)).mse == best
    assert not model.training
    assert training.validation[training.best_epoch - 1] == best
    assert len(training.validation) == training.best_epoch + 2 < 50


def test_seeds_decide():
    def weights(seed):
        model = Dropout()
        fit(model, windows(), windows(1), published_loss, epochs=2, seed=seed)
        return model.inner.trend.weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_a_non_finite_loss_stops_with_step_and_term_before_it_reaches_the_weights():
    calls, model = [], small()

    def breaks(output, target):
        calls.append(0)
        good = published_loss(output, target).total
        bad = good * float("nan") if len(calls) == 12 else good
        return LossTerms(good + bad, {"good": good, "bad": bad})

    with pytest.raises(NonFiniteLoss, match=r"stopped at step 12 \(epoch 2\): the term 'bad' of the loss is nan"):
        fit(model, windows(), windows(1), breaks, epochs=3)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with pytest.raises(NonFiniteLoss, match=r"step \d+.*term 'forecast' of the loss is (inf|nan)"):
        fit(small(), windows(), windows(1), published_loss, epochs=3, learning_rate=1e30)


class Level(nn.Module):
    """A model that makes no forecast: it learns the mean of the history."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.full((2,), 5.0))

    def forward(self, history):
        return (history.mean(1) - self.level).square().mean()


def far_from_two(model, windows):
    assert not model.training and not torch.is_grad_enabled() and isinstance(windows, Windows)
    return abs(model.level.mean().item() - 2.0)


def test_another_score_chooses_the_epoch():
    """The loss falls all the way to level 0; the score has its least value on the way there, at level 2."""

    def loss(output, target):
        return LossTerms.of(level=output)

    model = Level()
    how = {"epochs": 9, "learning_rate": 0.2, "patience": 3}
    training = fit(model, windows(), windows(1), loss, score=far_from_two, **how)
    best = abs(model.level.mean().item() - 2)
    assert training.validation[training.best_epoch - 1] == min(training.validation) == best < 0.5
    assert 1 < training.best_epoch < len(training.validation) < 9


def test_a_score_that_is_no_finite_number():
    def train(score):
        fit(small(), windows(), windows(1), published_loss, score=score)

    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteLoss, match=rf"stopped after epoch 1, on the validation part: the score is {bad}"):
            train(functools.partial(lambda model, windows, value: value, value=bad))
    with pytest.raises(TypeError, match="what score returns must be a number; got Scores"):
        train(evaluate)


def test_output_without_validation_gain_still_returns_a_model():
    """A model that cannot learn: the best epoch is the first."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.zeros(1))

        def forward(self, history):
            flat = history[:, -6:] * 0 + 0 * self.level
            return Output(flat, flat)

    training = fit(Fixed(), windows(), windows(1), published_loss, epochs=9, patience=2)
    assert training.best_epoch == 1 and len(training.validation) == 3


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1; got 0"),
        ({"epochs": 1.5}, TypeError, "epochs must be a whole number"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be a finite number greater than 0"),
        ({"save_every": 0}, ValueError, "save_every must be at least 1"),
        ({"seed": 2**70}, ValueError, "seed must be at most"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"device": "meta"}, ValueError, "device: 'meta' cannot be used here"),
        ({"train": (1, 2)}, TypeError, "train must be Windows, as `prepare` returns them; got tuple"),
        ({"validation": None}, TypeError, "validation must be Windows.*got NoneType"),
        (
            {"validation": Windows(waves(), 24, 5)},
            ValueError,
            r"one history, one horizon and the same endogenous variables; got \(24, 6, None\) and \(24, 5, None\)",
        ),
        ({"validation": all_named(windows())}, ValueError, r"; got \(24, 6, None\) and \(24, 6, \(1, 0\)\)"),
        ({"model": nn.Identity()}, ValueError, "model has no parameter to train"),
        ({"loss": lambda output, target: output[0].mean()}, TypeError, "loss returns must be LossTerms; got Tensor"),
    ],
)
def test_wrong_arguments_are_named(wrong, error, says):
    given = {"model": small(), "train": windows(), "validation": windows(1), "loss": published_loss, **wrong}
    with pytest.raises(error, match=says):
        fit(**given)


def test_a_model_of_other_variables_than_the_targets_is_refused():
    model = small()
    model.endogenous = (0,)
    with pytest.raises(
        ValueError, match=r"model forecasts the variables \(0,\), but the windows' targets are \(0, 1\)"
    ):
        fit(model, windows(), windows(1), published_loss)
