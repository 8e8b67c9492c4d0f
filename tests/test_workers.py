"""Several workers take the steps of one; if one of them is killed, all end, and the same command goes on."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_impl import workers
from tests.tensors import random, same

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def accelerate() -> list[str]:
    """The same two workers, by Hugging Face's command."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    return [*launch, "--num_machines", "1", "--mixed_precision", "no", "--main_process_port", str(free_port())]


def run(*command, **how) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **how)


# --- who does what ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_of(monkeypatch):
    """Make this process one of several workers, as far as it knows."""

    def become(number: int, count: int) -> None:
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", str(number))
        monkeypatch.setenv("LOCAL_RANK", str(number))

    return become


@given(st.integers(1, 50), st.integers(1, 9))
def test_every_row_has_one_worker_and_the_shares_sum_to_1(total, count):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("WORLD_SIZE", str(count))
        parts, shares = [], []
        for number in range(count):
            monkeypatch.setenv("RANK", str(number))
            parts.append(list(range(total))[workers.rows(total)])
            shares.append(workers.share(total))
    assert sum(shares) == pytest.approx(1)
    if total >= count:
        assert [row for part in parts for row in part] == list(range(total))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    else:
        assert parts == [list(range(total))] * count


def test_each_worker_has_a_gpu_of_its_own(one_of):
    one_of(1, 3)
    assert workers.place("cuda") == torch.device("cuda:1")
    assert workers.place("cpu") == "cpu" and workers.place(None) is None


def test_alone_nothing_is_asked_of_others(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    value = random(3, 2)
    workers.begin(torch.nn.Linear(2, 2))
    assert (workers.count(), workers.number(), workers.share(5), workers.rows(5)) == (1, 0, 1.0, slice(0, 5))
    assert workers.add_up(value) is value and workers.whole(value, 3) is value
    assert workers.of_first(2.5) == 2.5 and workers.any_signal(None) is None


def test_without_accelerate_it_is_one_sentence(one_of, monkeypatch):
    one_of(0, 2)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'several workers need Accelerate: pip install "mini_impl\[scale\]"'):
        workers.begin(torch.nn.Linear(2, 2))


# --- two of them ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_take_the_steps_of_one(tmp_path):
    """Every forecaster with both losses, every method: the curves agree to 1e-5."""
    pytest.importorskip("accelerate", reason="the extra 'scale' is not installed")
    curves = {}
    for name, launch in (("one", [sys.executable]), ("torchrun", TORCHRUN), ("accelerate", accelerate())):
        done = run(*launch, "-m", "tests.trained_together", str(tmp_path / name))
        assert done.returncode == 0, done.stderr[-3000:]
        curves[name] = json.loads((tmp_path / name).read_text())
    assert len(curves["one"]) == 17
    for name in ("torchrun", "accelerate"):
        assert curves[name].keys() == curves["one"].keys()
        for training, terms in curves["one"].items():
            for term, curve in terms.items():
                assert curves[name][training][term] == pytest.approx(curve, rel=1e-5, abs=1e-5), (name, training, term)


FORECAST = "-m mini_impl.cli forecast dlinear --split 900,300,300 --history 24 --horizon 8 --set kernel_size=5"


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_worker_ends_all_and_the_same_command_goes_on(tmp_path, sent):
    """SIGKILL to one worker; SIGTERM to the command, which passes it on to all: they end after the same step."""
    pytest.importorskip("accelerate", reason="the extra 'scale' is not installed")
    options = ["--epochs", "25", "--patience", "25", "--batch-size", "64", "--learning-rate", "0.001"]
    files = ["--checkpoint", str(tmp_path / "run"), "--save-every", "5", "--json", str(tmp_path / "result.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [*TORCHRUN, *shlex.split(FORECAST), *options, *files]
    with (tmp_path / "said").open("w") as said:
        training = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)
        until(lambda: (tmp_path / "run").exists(), training)
        os.kill(worker_of(training.pid, number=1) if sent == signal.SIGKILL else training.pid, sent)
        assert training.wait(timeout=120) == 1
    text = (tmp_path / "said").read_text()
    if sent == signal.SIGKILL:
        assert re.search(r"Signal 9 \(SIGKILL\)", text), text[-3000:]
    else:
        assert "cannot add up" not in text and "SIGKILL" not in text  # which torchrun sends to those that do not end
    assert not (tmp_path / "result.json").exists() and not workers_of(training.pid)

    done = run(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads((tmp_path / "result.json").read_text())
    assert done.stdout.count("weights of epoch") == 1  # the first worker alone says it
    alone = run(sys.executable, *shlex.split(FORECAST), *options, "--json", str(tmp_path / "alone.json"))
    assert alone.returncode == 0, alone.stderr[-3000:]
    same_as = json.loads((tmp_path / "alone.json").read_text())
    for part in ("validation", "test"):
        same(flat(together[part]), flat(same_as[part]), 1e-4)


def flat(value) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in flat(part)]
    return [float(value)]


def until(there, process) -> None:
    for _ in range(600):
        if there():
            return
        assert process.poll() is None, "it ended too early"
        time.sleep(0.1)
    raise AssertionError("it took longer than a minute")


def workers_of(launcher: int) -> list[int]:
    """The processes that a launcher started, which know their number."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.search(r"PPid:\t(\d+)", (folder / "status").read_text())[1])
            if parent == launcher and b"RANK=" in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (OSError, TypeError):
            continue
    return found


def worker_of(launcher: int, number: int) -> int:
    (found,) = (
        process
        for process in workers_of(launcher)
        if f"\0RANK={number}\0".encode() in b"\0" + Path(f"/proc/{process}/environ").read_bytes()
    )
    return found
