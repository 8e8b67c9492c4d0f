"""Checkpoints: whole at any instant, read without pickle; both trainers, broken off or killed, end in the same bits."""

import functools
import itertools
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mini_impl.checkpoint import check_writable, describe, load_checkpoint, save_checkpoint, write_bytes
from mini_impl.finetuning import tasks
from mini_impl.finetuning.methods import METHODS
from mini_impl.finetuning.train import fine_tune
from mini_impl.forecasting.data import Windows
from mini_impl.forecasting.train import evaluate, fit
from mini_impl.losses import LossTerms
from tests.tensors import random

ROOT = Path(__file__).parents[1]

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


def test_every_flipped_bit_is_noticed(tmp_path):
    save_checkpoint(tmp_path / "good", {"weight": random(3, 5), "bias": random(2)}, {"settings": {"sha256": '"'}})
    content = bytearray((tmp_path / "good").read_bytes())
    for place in range(len(content)):
        content[place] ^= 1 << place % 8
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad is (damaged|not a whole|a safetensors file, but not one)"):
            load_checkpoint(tmp_path / "bad")
        content[place] ^= 1 << place % 8
    (tmp_path / "bad").write_bytes(content)
    assert load_checkpoint(tmp_path / "bad")[1] == {"settings": {"sha256": '"'}}


def test_files_are_written_beside_under_a_name_of_their_own(tmp_path, monkeypatch):
    """The mode stays; a link that was planted is not followed; threads do not tear one another's file."""
    path, planted = tmp_path / "run", tmp_path / "planted"
    write_bytes(path, b"old")
    path.chmod(0o600)
    planted.write_bytes(b"mine")
    monkeypatch.setattr("mini_impl.checkpoint.secrets.token_hex", lambda count: "known")
    (tmp_path / f".run.{os.getpid()}.known.part").symlink_to(planted)
    with pytest.raises(FileExistsError):
        write_bytes(path, b"new")
    assert planted.read_bytes() == b"mine" and path.read_bytes() == b"old"
    monkeypatch.undo()
    write_bytes(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o600 and path.read_bytes() == b"new"

    contents = [bytes([number]) * 100_000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_bytes(path, content), contents * 5))
    assert path.read_bytes() in contents
    assert sorted(file.name for file in tmp_path.iterdir()) == [f".run.{os.getpid()}.known.part", "planted", "run"]


def test_what_a_killed_process_left_is_swept(tmp_path):
    """By the next writing of the same file; what another process is at, or what belongs to another file, stays."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stays = [f".run.{os.getpid()}.0a.part", f".other.{gone.pid}.0b.part"]
    for name in (*stays, f".run.{gone.pid}.0c.part"):
        (tmp_path / name).touch()
    write_bytes(tmp_path / "run", b"new")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*stays, "run"])


def test_whether_a_file_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "new" / "deep", tmp_path / "file", os.devnull):
        check_writable("json", path)
    assert (tmp_path / "file").read_text() == "old" and not (tmp_path / "new" / "deep").exists()
    with pytest.raises(OSError, match=rf"json: {tmp_path} cannot be written \(it is a folder"):
        check_writable("json", tmp_path)
    with pytest.raises(OSError, match=r"json: .*x cannot be written"):
        check_writable("json", tmp_path / "file" / "x")


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


def moved():
    """Dropped with other first weights."""
    model = Dropped()
    nn.init.ones_(model.map.weight)
    return model


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


@pytest.mark.parametrize("after", [1, 4, 12, 25])
def test_it_goes_on_within_an_epoch(tmp_path, after):
    path = tmp_path / "run"
    with pytest.raises(Stop):
        forecasting(4, path, after, save_every=4)
    if after >= 4:
        state = load_checkpoint(path)[1]
        assert state["done"] * 9 + state["step"] == max(after // 4 * 4, after // 9 * 9)
        assert len(state["terms"]["error"]) == max(after // 4 * 4, after // 9 * 9)
    same(forecasting(4, path), forecasting(4))


@pytest.mark.parametrize("train", [forecasting, finetuning])
def test_without_steps_it_is_written_once_a_minute(tmp_path, monkeypatch, train):
    """Of a minute of no seconds every step is kept."""
    for seconds, kept in ((0, 3), (60, 2 if train is finetuning else 0)):
        monkeypatch.setattr("mini_impl.checkpoint.SECONDS", seconds)
        path = tmp_path / str(seconds)
        with pytest.raises(Stop):
            train(4, path, after=3)
        assert (len(next(iter(load_checkpoint(path)[1]["terms"].values()))) if path.exists() else 0) == kept


@pytest.mark.slow
def test_a_lock_is_held_by_one_alone(tmp_path):
    """Four processes that take and return it as often as they can, for three seconds."""
    script = """
import os, sys, time, torch
from mini_impl.checkpoint import Run
optimizer, taken, end = torch.optim.Adam([torch.zeros(1)]), 0, time.monotonic() + 3
while time.monotonic() < end:
    try:
        with Run("run", optimizer, {}):
            os.close(os.open("held", os.O_CREAT | os.O_EXCL))  # fails if another one holds it
            os.unlink("held")
            taken += 1
    except BlockingIOError:
        pass
print(taken)
"""
    how = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    runs = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, **how) for _ in range(4)]
    taken = [int(run.communicate(timeout=120)[0] or 0) for run in runs]
    assert [run.returncode for run in runs] == [0] * 4 and sum(taken) > 100


HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)


@pytest.mark.parametrize(
    ("number", "ends"), [(signal.SIGTERM, SystemExit), (HANGUP, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
@pytest.mark.parametrize(("train", "step"), [(forecasting, 12), (finetuning, 3)])
def test_a_signal_lets_the_step_end_and_keeps_it(tmp_path, monkeypatch, number, ends, train, step):
    """At the call of the optimiser's step; the handlers are then as before."""
    before = signal.signal(number, signal.default_int_handler)
    calls, one = itertools.count(1), torch.optim.Adam.step

    def signalling(self):
        if next(calls) == step:
            signal.raise_signal(number)
        one(self)

    try:
        with monkeypatch.context() as patch, pytest.raises(ends) as ended:
            patch.setattr(torch.optim.Adam, "step", signalling)
            train(4, tmp_path / "run")
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert ends is KeyboardInterrupt or ended.value.code == 128 + number
    state = load_checkpoint(tmp_path / "run")[1]
    assert len(next(iter(state["terms"].values()))) == step
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    same(train(4, tmp_path / "run"), train(4))


def test_one_training_at_a_time_writes_a_file(tmp_path):
    path = tmp_path / "run"

    def score(model, windows):
        with pytest.raises(BlockingIOError, match="run is in use: another training writes it now"):
            forecasting(1, path)
        return 0.0

    forecasting(1, path, score=score)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


def test_what_may_change_the_last_bits_is_named(tmp_path, monkeypatch):
    forecasting(1, tmp_path / "run")
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    with pytest.warns(
        UserWarning, match=f"was written with threads {threads}, now it is {threads + 3}: the result may"
    ):
        forecasting(1, tmp_path / "run")


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
        (forecasting, {"model": moved}, "its first weights was"),
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


def test_more_steps_are_welcome_and_less_are_refused(tmp_path):
    finetuning(2, tmp_path / "run")
    same(finetuning(4, tmp_path / "run"), finetuning(4))
    with pytest.raises(ValueError, match=r"steps, some of which .*run has already, must be at least 4; got 3"):
        finetuning(3, tmp_path / "run")


def test_more_epochs_are_another_training_as_the_learning_rate_knows_their_number(tmp_path):
    forecasting(2, tmp_path / "run")
    with pytest.raises(ValueError, match="run is of another training: its epochs was 2, now it is 4"):
        forecasting(4, tmp_path / "run")


def test_a_file_of_another_kind_is_refused(tmp_path):
    save_checkpoint(tmp_path / "other", {"a": torch.zeros(1)}, {"other": 1})  # safetensors 0.4 reads none without
    with pytest.raises(ValueError, match="other holds no training to go on from"):
        forecasting(4, tmp_path / "other")


@pytest.mark.parametrize("train", [forecasting, finetuning])
def test_seconds_go_on_and_leave_breaks_out(tmp_path, train):
    _, first = train(2, tmp_path / "run")
    tensors, state = load_checkpoint(tmp_path / "run")
    assert 0 < state["seconds"] <= first.seconds
    save_checkpoint(tmp_path / "run", tensors, state | {"seconds": 1000.0})
    assert 1000 <= train(2, tmp_path / "run")[1].seconds < 1060


class Tied(nn.Module):
    """Two names for one weight, and a part that stays in eval mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.frozen = nn.Linear(24, 6), nn.Dropout(0.9).eval()
        self.two = self.one

    def forward(self, history):
        return (self.one(history.mT) + self.two(history.mT)).mT


def test_numbers_of_numpy_are_welcome_in_both(tmp_path):
    same(finetuning(np.int64(2), tmp_path / "run", seed=np.uint8(3)), finetuning(2, seed=3))


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
