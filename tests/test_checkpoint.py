"""Checkpoints: whole at any instant, read without pickle; both trainers, broken off or killed, end in the same bits."""

import functools
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mini_impl.checkpoint import describe, load_checkpoint, save_checkpoint, write_bytes
from mini_impl.finetuning import tasks
from mini_impl.finetuning.methods import METHODS
from mini_impl.finetuning.train import fine_tune
from mini_impl.forecasting.data import Windows
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.losses import LossTerms
from tests.tensors import random

# --- files ------------------------------------------------------------------------------------------------------------


def test_checkpoints_hold_no_pickle_and_are_never_half_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "run"
    tensors = {"a": torch.arange(3.0), "b": random(2, 2)}
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
    with pytest.raises(FileNotFoundError, match="none"):
        load_checkpoint(tmp_path / "none")
    with pytest.raises(OSError, match=str(tmp_path)):  # a folder
        load_checkpoint(tmp_path)
    (tmp_path / "text").write_text("hello")
    save_checkpoint(tmp_path / "good", {"a": torch.zeros(1000)}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "good").read_bytes()[:-100])
    for name in ("text", "cut"):
        with pytest.raises(ValueError, match=f"{name} is not a whole safetensors file"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="JSON"):
        save_checkpoint(tmp_path / "nan", {}, {"loss": float("nan")})


def test_links_are_followed_and_devices_stay(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    write_bytes(real, b"one")
    link.symlink_to(real)
    write_bytes(link, b"two")
    assert link.is_symlink() and real.read_bytes() == b"two"
    write_bytes(os.devnull, b"gone")
    assert not os.path.isfile(os.devnull)


# --- settings in words ------------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """A linear map over time behind dropout, which draws random numbers in training."""

    def __init__(self, rate=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.drop, self.map, self.masked = nn.Dropout(rate), nn.Linear(24, 6), float("-inf")

    def forward(self, history):
        return self.map(self.drop(history).mT).mT  # [batch, horizon, variable]


def test_two_settings_are_described_alike_if_they_do_the_same():
    def loss(weight, norm):
        pass

    one = functools.partial(loss, 0.5, norm=functools.partial(max, 1))
    assert describe(one) == "test_two_settings_are_described_alike_if_they_do_the_same.<locals>.loss(0.5, norm=max(1))"
    assert describe(one) != describe(functools.partial(loss, 0.5, norm=functools.partial(max, 2)))
    assert describe(Dropped()) == describe(Dropped().eval()) != describe(Dropped(0.4))
    values = random(4, 2)
    assert describe(values) == describe(values.clone()) != describe(values.float()) != describe(values.view(2, 4))
    assert describe({"a": values}.values()) == describe({"b": values.clone()}.values())
    assert describe(np.int64(3)) == 3 and type(describe(np.int64(3))) is int


# --- both trainers ----------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def forecasting(passes, checkpoint=None, after=1000, model=Dropped, shift=0.0, **settings):
    """Epochs of nine steps; `after` so many steps in all it breaks off, as at Ctrl-C. Returns (model, training)."""
    calls = itertools.count(1)

    def loss(output, target):
        if next(calls) > after:
            raise Stop
        return LossTerms.of(error=(output - target).square().mean())

    values = random(300, 2, dtype=torch.float32) + shift
    model = model()
    data = Windows(values, 24, 6), Windows(values[:100], 24, 6)
    settings = {"learning_rate": 1e-2, "patience": 9, **settings}
    return model, fit(model, *data, loss, epochs=passes, checkpoint=checkpoint, **settings)


def finetuning(passes, checkpoint=None, after=1000, method=("dapo", "documented"), kinds=None, shift=0.0, **settings):
    """Steps, of which every second is kept: the tiny model, and a method with a sampler and thresholds of its own."""
    calls = itertools.count(1)
    model, task = tasks.sums()
    method = METHODS[method](task._replace(trained_kinds=kinds or task.trained_kinds), sequences=8)
    updates = method.updates

    def stopping(*arguments):
        if next(calls) > after:
            raise Stop
        yield from updates(*arguments)

    method.updates = stopping
    with torch.no_grad():
        model.norm.weight.add_(shift)
    settings = {"measure_every": 2, "questions": 2, **settings}
    return model, fine_tune(model, method, steps=passes, checkpoint=checkpoint, **settings)


def same(one, other):
    """Fail unless two trained models have the same bits, and their trainings said the same."""
    (model, training), (other_model, other_training) = one, other
    assert training._replace(seconds=0.0) == other_training._replace(seconds=0.0)
    for name, value in model.state_dict().items():
        assert torch.equal(other_model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("train", "after"),
    [*((forecasting, after) for after in (0, 3, 9, 10, 25)), *((finetuning, after) for after in (0, 1, 2, 3))],
)
def test_a_broken_off_training_ends_in_the_same_bits(tmp_path, train, after):
    path = tmp_path / "run"
    with pytest.raises(Stop):
        train(4, path, after)
    expected = train(4)
    same(train(4, path), expected)
    same(train(4, path, after=0), expected)  # nothing is left to do


def test_what_is_in_the_file_decides_and_not_the_weights_of_the_model_given(tmp_path):
    expected = forecasting(3)
    forecasting(1, tmp_path / "run")

    def moved():
        model = Dropped()
        nn.init.ones_(model.map.weight)
        return model

    same(forecasting(3, tmp_path / "run", model=moved), expected)


@pytest.mark.parametrize("after", [3, 9, 12])
def test_frozen_parameters_stay_and_a_broken_off_probe_ends_in_the_same_bits(tmp_path, after):
    """As under a linear probe: one part trains, the other needs no gradient, but holds one from an earlier training."""

    def probe():
        model = Dropped()
        model.map.bias.grad = torch.ones_like(model.map.bias)
        model.map.bias.requires_grad_(False)
        return model

    expected, path = forecasting(3, model=probe), tmp_path / "run"
    assert torch.equal(expected[0].map.bias, Dropped().map.bias)
    assert not torch.equal(expected[0].map.weight, Dropped().map.weight)
    with pytest.raises(Stop):
        forecasting(3, path, after, probe)
    same(forecasting(3, path, model=probe), expected)
    with pytest.raises(ValueError, match=r"its frozen was \['map.bias'\], now it is \[\]"):  # this may not change
        forecasting(3, path)


KILLED = """
import sys, torch
from tests import test_checkpoint
torch.set_num_threads(1)
print("ready", flush=True)
model, _ = test_checkpoint.{name}({passes}, sys.argv[1])
torch.save(model.state_dict(), sys.argv[1] + ".end")
print("done", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("train", "passes"), [(forecasting, 60), (finetuning, 30)])
def test_killed_at_any_instant_it_goes_on(tmp_path, train, passes):
    code = KILLED.format(name=train.__name__, passes=passes)
    root = Path(__file__).parents[1]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}

    def start(path):
        command = [sys.executable, "-c", code, str(path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=one_thread, cwd=root)

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


@pytest.mark.parametrize(
    ("train", "change", "words"),
    [
        (forecasting, {"seed": 1}, "its seed was 0, now it is 1"),
        (forecasting, {"patience": 1}, "its patience was 9, now it is 1"),
        (forecasting, {"shift": 0.5}, "its data was"),
        (forecasting, {"model": functools.partial(Dropped, 0.4)}, "its model was"),
        (forecasting, {"score": lambda model, windows: 0.0}, "its score was 'forecast_mse', now it is '<lambda>'"),
        (finetuning, {"seed": 1}, "its seed was 0, now it is 1"),
        (finetuning, {"learning_rate": 0.5}, "its learning_rate was 0.001, now it is 0.5"),
        (finetuning, {"shift": 0.5}, "its model was"),
        (finetuning, {"kinds": ("both carry",)}, "its task was"),
        (finetuning, {"method": ("sft", "published")}, "its method was"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, train, change, words):
    train(2, tmp_path / "run")
    with pytest.raises(ValueError, match=f"run is of another training: {words}.*; delete it, or give another file"):
        train(2, tmp_path / "run", **change)


@pytest.mark.parametrize(("train", "what"), [(forecasting, "epochs"), (finetuning, "steps")])
def test_more_is_welcome_and_less_is_refused(tmp_path, train, what):
    train(2, tmp_path / "run")
    same(train(4, tmp_path / "run"), train(4))
    with pytest.raises(ValueError, match=rf"{what}, some of which .*run has already, must be at least 4; got 3"):
        train(3, tmp_path / "run")
    save_checkpoint(tmp_path / "other", {"a": torch.zeros(1)}, {"other": 1})  # safetensors 0.4 reads none without
    with pytest.raises(ValueError, match="other is of another training"):
        train(4, tmp_path / "other")


@pytest.mark.parametrize("train", [forecasting, finetuning])
def test_seconds_go_on_and_leave_breaks_out(tmp_path, train):
    _, first = train(2, tmp_path / "run")
    tensors, state = load_checkpoint(tmp_path / "run")
    assert 0 < state["seconds"] <= first.seconds
    save_checkpoint(tmp_path / "run", tensors, state | {"seconds": 1000.0})
    assert 1000 < train(4, tmp_path / "run")[1].seconds < 1060


class Tied(nn.Module):
    """Two names for one weight, and a part that stays in eval mode."""

    def __init__(self):
        super().__init__()
        self.one, self.frozen = nn.Linear(24, 6), nn.Dropout(0.9).eval()
        self.two = self.one

    def forward(self, history):
        return (self.one(history.mT) + self.two(history.mT)).mT


def test_unusual_models_and_numbers_are_welcome(tmp_path):
    numpy = {"batch_size": np.int64(16), "seed": np.int64(3), "learning_rate": np.float32(1e-3)}
    forecasting(np.int64(2), tmp_path / "run", model=Tied, **numpy)
    plain = {"batch_size": 16, "seed": 3, "learning_rate": float(np.float32(1e-3))}
    forecasting(2, tmp_path / "run", model=Tied, **plain)
    model = Tied().train()
    model.frozen.eval()
    windows = Windows(random(60, 2, dtype=torch.float32), 24, 6)
    evaluate(model, windows)
    assert model.training and not model.frozen.training
    assert evaluate(nn.Identity(), Windows(windows.values, 6, 6)).mse > 0  # a module without parameters
