"""Training: what it keeps, that it stops and restores, that a killed one goes on; scores over every window."""

import functools
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn

from mini_impl.checkpoint import load_checkpoint, save_checkpoint, write_bytes
from mini_impl.forecasting.data import Windows
from mini_impl.forecasting.dlinear import DLinear, Output, documented_loss, published_loss
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.losses import LossTerms, NonFiniteLoss

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()


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


def test_evaluate_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"the forecast and the target.*\[256, 24, 2\] and \[256, 6, 2\]"):
        evaluate(lambda history: history, windows())
    with pytest.raises(NonFiniteLoss, match="forecast holds NaN"):
        evaluate(lambda history: history[:, -6:] / 0, windows())
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(small(), windows(), batch_size=0)


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
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


def test_the_best_weights_come_back_and_it_stops_early():
    model = small()
    training = fit(model, windows(), windows(1), published_loss, epochs=50, learning_rate=0.3, decay=1.0, patience=2)
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


def test_a_non_finite_loss_stops_with_step_and_term():
    calls = []

    def breaks(output, target):
        calls.append(0)
        good = published_loss(output, target).total
        bad = good * float("nan") if len(calls) == 12 else good
        return LossTerms(good + bad, {"good": good, "bad": bad})

    with pytest.raises(NonFiniteLoss, match=r"step 12 \(epoch 2\): the term 'bad' of the loss is nan"):
        fit(small(), windows(), windows(1), breaks, epochs=3)
    with pytest.raises(NonFiniteLoss, match=r"step \d+.*term 'forecast' of the loss is (inf|nan)"):
        fit(small(), windows(), windows(1), published_loss, epochs=3, learning_rate=1e30)


class Level(nn.Module):
    """A model that makes no forecast: it learns the mean of the history."""

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.full((2,), 5.0))

    def forward(self, history):
        return (history.mean(1) - self.level).square().mean()


def far_from_two(model, windows, scale=1.0):
    assert not model.training and not torch.is_grad_enabled() and isinstance(windows, Windows)
    return scale * abs(model.level.mean().item() - 2.0)


def test_another_score_chooses_the_epoch(tmp_path):
    """The loss falls all the way to level 0; the score has its least value on the way there, at level 2."""

    def loss(output, target):
        return LossTerms.of(level=output)

    def train(score, **settings):
        model = Level()
        data = windows(), windows(1)
        return model, fit(
            model, *data, loss, score=score, epochs=9, learning_rate=0.1, decay=1.0, patience=3, **settings
        )

    model, training = train(far_from_two)
    best = abs(model.level.mean().item() - 2)
    assert training.validation[training.best_epoch - 1] == min(training.validation) == best < 0.5
    assert 1 < training.best_epoch < len(training.validation) < 9

    train(far_from_two, checkpoint=tmp_path / "run")
    for other in (functools.partial(far_from_two, scale=2.0), lambda model, windows: 0.0):
        with pytest.raises(ValueError, match="another training: its score was 'far_from_two', now"):
            train(other, checkpoint=tmp_path / "run")


def test_a_score_that_is_no_finite_number():
    def train(score):
        fit(small(), windows(), windows(1), published_loss, score=score)

    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteLoss, match=rf"stopped after epoch 1, on the validation part: the score is {bad}"):
            train(functools.partial(lambda model, windows, value: value, value=bad))
    with pytest.raises(TypeError, match="score must return a number; got Scores"):
        train(evaluate)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"epochs": 0}, ValueError),
        ({"epochs": 1.5}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"learning_rate": 0.0}, ValueError),
        ({"learning_rate": float("nan")}, ValueError),
        ({"decay": -1.0}, ValueError),
        ({"patience": 0}, ValueError),
        ({"seed": -1}, ValueError),
    ],
)
def test_bad_settings_are_named(wrong, error):
    with pytest.raises(error, match=next(iter(wrong))):
        fit(small(), windows(), windows(1), published_loss, **wrong)


def test_the_loss_must_return_loss_terms():
    with pytest.raises(TypeError, match="loss must return LossTerms; got Tensor"):
        fit(small(), windows(), windows(1), lambda output, target: output.prediction.mean())


# --- checkpoints ------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(after):
    """A loss that breaks off after so many steps, as a kill would."""
    calls = []

    def loss(output, target):
        calls.append(0)
        if len(calls) > after:
            raise Stop
        return published_loss(output, target)

    return loss


def named(loss):
    loss.__qualname__ = "loss"
    return loss


def without_time(training):
    return training._replace(seconds=0.0)


def same_weights(one, other):
    """Fail unless two models have the same bits."""
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize("after", [0, 3, 9, 10, 25])
def test_a_broken_off_training_ends_in_the_same_bits(tmp_path, after):
    settings = {"epochs": 4, "learning_rate": 1e-2, "patience": 2}
    whole = Dropout()
    expected = fit(whole, windows(), windows(1), named(stopping(1000)), **settings)

    path = tmp_path / "run"
    with pytest.raises(Stop):
        fit(Dropout(), windows(), windows(1), named(stopping(after)), checkpoint=path, **settings)
    model = Dropout()
    with torch.no_grad():
        model.inner.trend.weight.add_(0 if after < 9 else 1)  # after an epoch the file decides, not the model given
    got = fit(model, windows(), windows(1), named(stopping(1000)), checkpoint=path, **settings)
    assert without_time(got) == without_time(expected)
    same_weights(model, whole)
    again = Dropout()
    nothing_to_do = fit(again, windows(), windows(1), named(stopping(0)), checkpoint=path, **settings)
    assert without_time(nothing_to_do) == without_time(expected)
    same_weights(again, whole)


@pytest.mark.parametrize("after", [3, 9, 12])
def test_frozen_parameters_stay_and_a_broken_off_probe_ends_in_the_same_bits(tmp_path, after):
    """As under a linear probe: one part trains, the other needs no gradient, but holds one from an earlier training."""

    def probe():
        model = Dropout()
        model.inner.seasonal.weight.grad = torch.ones_like(model.inner.seasonal.weight)
        model.inner.seasonal.requires_grad_(False)
        return model

    whole, broken = probe(), probe()
    start = small().state_dict()
    expected = fit(whole, windows(), windows(1), named(stopping(1000)), epochs=3)
    assert torch.equal(whole.inner.seasonal.weight, start["seasonal.weight"])
    assert not torch.equal(whole.inner.trend.weight, start["trend.weight"])
    with pytest.raises(Stop):
        fit(broken, windows(), windows(1), named(stopping(after)), epochs=3, checkpoint=tmp_path / "run")
    again = probe()
    got = fit(again, windows(), windows(1), named(stopping(1000)), epochs=3, checkpoint=tmp_path / "run")
    assert without_time(got) == without_time(expected)
    same_weights(again, whole)
    if after >= 9:  # there is a file: what is frozen may not change
        with pytest.raises(ValueError, match=r"its frozen was \['inner.seasonal.weight', .*now it is \[\]"):
            fit(Dropout(), windows(), windows(1), named(stopping(0)), epochs=3, checkpoint=tmp_path / "run")


def test_seconds_go_on_and_leave_breaks_out(tmp_path):
    first = fit(small(), windows(), windows(1), published_loss, epochs=1, checkpoint=tmp_path / "run").seconds
    tensors, state = load_checkpoint(tmp_path / "run")
    assert 0 < state["seconds"] <= first
    save_checkpoint(tmp_path / "run", tensors, state | {"seconds": 1000.0})
    assert (
        1000 < fit(small(), windows(), windows(1), published_loss, epochs=2, checkpoint=tmp_path / "run").seconds < 1060
    )


SCRIPT = textwrap.dedent("""
    import sys, torch
    from mini_impl.forecasting.data import Windows
    from mini_impl.forecasting.dlinear import DLinear, published_loss
    from mini_impl.forecasting.train import fit

    torch.set_num_threads(1)
    torch.manual_seed(0)
    values = torch.randn(400, 2)
    model = DLinear(history=24, horizon=6, kernel_size=5)
    data = Windows(values[:300], 24, 6), Windows(values[300:], 24, 6)
    print("ready", flush=True)
    fit(model, *data, published_loss, epochs=40, patience=40, batch_size=8, checkpoint=sys.argv[1])
    torch.save(model.state_dict(), sys.argv[1] + ".end")
    print("done", flush=True)
""")


def test_killed_at_any_instant_it_goes_on(tmp_path):
    def start(path):
        command = [sys.executable, "-c", SCRIPT, str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start(tmp_path / "whole").communicate(timeout=120)[0].endswith("done\n")
    path, kills = tmp_path / "killed", 0
    for delay in [0.1, 0.3, 120]:
        run = start(path)
        assert run.stdout.readline() == "ready\n"
        try:
            run.wait(timeout=delay)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            kills += 1
        if path.exists():
            load_checkpoint(path)  # whole, at any instant
    assert kills
    whole, killed = (torch.load(f"{tmp_path / name}.end", weights_only=True) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "run"
    loss = functools.partial(documented_loss, trend_weight=0.5)
    fit(small(), windows(), windows(1), loss, epochs=1, checkpoint=path)
    for what, call in {
        "seed": lambda: fit(small(), windows(), windows(1), loss, epochs=1, seed=1, checkpoint=path),
        "data": lambda: fit(small(), windows(2), windows(1), loss, epochs=1, checkpoint=path),
        "data was .*, now": lambda: fit(small(), all_named(windows()), all_named(windows(1)), loss, checkpoint=path),
        "loss": lambda: fit(
            small(), windows(), windows(1), functools.partial(loss, trend_weight=1.0), epochs=1, checkpoint=path
        ),
        "model": lambda: fit(DLinear(24, 6, kernel_size=7), windows(), windows(1), loss, epochs=1, checkpoint=path),
    }.items():
        with pytest.raises(ValueError, match=f"another training: its {what}"):
            call()
    with pytest.raises(ValueError, match="its patience was"):
        fit(small(), windows(), windows(1), loss, epochs=1, patience=1, checkpoint=path)
    same = functools.partial(documented_loss, trend_weight=0.5)
    fit(small(), windows(), windows(1), same, epochs=2, checkpoint=path)  # more epochs are welcome
    with pytest.raises(ValueError, match=r"epochs must be at least 2, which .* has already; got 1"):
        fit(small(), windows(), windows(1), loss, epochs=1, checkpoint=path)
    save_checkpoint(path, {}, {"other": 1})
    with pytest.raises(ValueError, match="was not written by a training"):
        fit(small(), windows(), windows(1), loss, epochs=1, checkpoint=path)


def test_checkpoints_hold_no_pickle_and_are_never_half_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run"
    tensors = {"a": torch.arange(3.0), "b": torch.randn(2, 2, dtype=torch.float64)}
    save_checkpoint(path, tensors, {"epoch": 3, "名": "值"})
    got, state = load_checkpoint(path)
    assert state == {"epoch": 3, "名": "值"}
    assert all(torch.equal(got[name], value) for name, value in tensors.items())
    assert b"PK\x03\x04" not in path.read_bytes() and b"\x80\x02" not in path.read_bytes()[:2]

    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"a": torch.zeros(1)}, {})
    assert load_checkpoint(path)[1]["epoch"] == 3
    assert [file.name for file in path.parent.iterdir()] == ["run"]


def test_other_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is not a whole safetensors file"):
        load_checkpoint(tmp_path / "text")
    save_checkpoint(tmp_path / "good", {"a": torch.zeros(1000)}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut is not a whole safetensors file"):
        load_checkpoint(tmp_path / "cut")
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path / "nan", {}, {"loss": float("nan")})


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


class Tied(nn.Module):
    """Two names for one weight, a mask of minus infinity, and a part that stays in eval mode."""

    def __init__(self):
        super().__init__()
        self.one, self.masked = nn.Linear(24, 6), float("-inf")
        self.two, self.frozen = self.one, nn.Dropout(0.9).eval()

    def forward(self, history):
        forecast = (self.one(history.mT) + self.two(history.mT)).mT
        return Output(forecast, forecast)


def test_unusual_models_and_numbers_are_welcome(tmp_path):
    settings = {
        "epochs": np.int64(2),
        "batch_size": np.int64(16),
        "seed": np.int64(3),
        "learning_rate": np.float32(1e-3),
    }
    fit(Tied(), windows(), windows(1), published_loss, checkpoint=tmp_path / "run", **settings)
    fit(Tied(), windows(), windows(1), published_loss, checkpoint=tmp_path / "run", **settings)
    model = Tied()
    model.train()
    model.frozen.eval()
    evaluate(model, windows())
    assert model.training and not model.frozen.training
    assert evaluate(nn.Flatten(2), Windows(waves(), 6, 6)).mse > 0  # a module without parameters


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: fit(small(), windows()[:], windows(), published_loss), TypeError, "train must be Windows.*got tuple"),
        (lambda: fit(small(), windows(), None, published_loss), TypeError, "validation must be Windows.*got NoneType"),
        (lambda: evaluate(small(), None), TypeError, "windows must be Windows"),
        (lambda: evaluate(lambda history: None, windows()), TypeError, "forecast must return a tensor.*got NoneType"),
        (
            lambda: fit(small(), windows(), Windows(waves(), 24, 5), published_loss),
            ValueError,
            "one history and one horizon; got 24 -> 6 and 24 -> 5",
        ),
        (
            lambda: fit(small(), windows(), all_named(windows()), published_loss),
            ValueError,
            r"the same endogenous variables; got None and \(1, 0\)",
        ),
        (lambda: fit(nn.Identity(), windows(), windows(), published_loss), ValueError, "no parameter to train"),
        (lambda: fit(small(), windows(), windows(), published_loss, device="meta"), ValueError, "device: 'meta'"),
    ],
)
def test_wrong_arguments_are_named_before_the_training(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_links_are_followed_and_devices_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    write_bytes(real, b"one")
    link.symlink_to(real)
    write_bytes(link, b"two")
    assert link.is_symlink() and real.read_bytes() == b"two"
    write_bytes(os.devnull, b"gone")
    assert not os.path.isfile(os.devnull)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        load_checkpoint(tmp_path)
