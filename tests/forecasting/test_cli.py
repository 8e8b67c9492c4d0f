"""The command mini-impl, run as a user would."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch

from mini_impl.cli import main
from mini_impl.forecasting.baselines import repeat_last, repeat_season
from mini_impl.forecasting.data import load_csv, prepare
from mini_impl.forecasting.train import evaluate

QUICK = ["--history", "48", "--horizon", "12", "--epochs", "2", "--set", "kernel_size=7"]


@pytest.fixture
def csv(tmp_path):
    """Two noisy daily waves with a time column."""
    noise = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    lines = ["date,a,b"]
    for hour, (one, two) in enumerate(noise.tolist()):
        wave = math.sin(2 * math.pi * hour / 24)
        lines.append(f"day {hour // 24} hour {hour % 24},{wave + 0.2 * one:.4f},{10 * wave + two:.4f}")
    path = tmp_path / "waves.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "mini_impl.cli", *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.parametrize("loss", ["documented", "published"])
def test_it_trains_tests_and_reports(csv, tmp_path, capsys, loss):
    out = tmp_path / "deep" / "out.json"
    arguments = ["forecast", "dlinear", "--csv", str(csv), "--split", "400,100,100", "--loss", loss, *QUICK]
    main([*arguments, "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["command"] == ["mini-impl", *arguments, "--json", str(out)]
    assert result["settings"]["loss"] == loss and result["settings"]["split"] == [400, 100, 100]
    assert result["settings"]["weight"] == ({"trend_weight": 1.0} if loss == "documented" else {})
    assert result["settings"]["set"] == {"kernel_size": 7}
    assert result["windows"] == {"train": 341, "validation": 89, "test": 89}
    assert len(result["validation"]["mse of each epoch"]) == 2
    _, _, test, _ = prepare(load_csv(csv).values, (400, 100, 100), 48, 12)
    assert result["test"]["last value"] == evaluate(lambda h: repeat_last(h, 12), test)._asdict()
    assert result["test"]["last 24 steps again"] == evaluate(lambda h: repeat_season(h, 12, 24), test)._asdict()
    assert result["test"]["dlinear"]["mse"] < result["test"]["last value"]["mse"]
    assert f"{result['test']['dlinear']['mse']:.4f}" in capsys.readouterr().out


def test_the_same_seed_gives_the_same_numbers_and_weights_matter(csv, tmp_path):
    def mse(*more):
        main(["forecast", "dlinear", "--csv", str(csv), *QUICK, *more, "--json", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())["test"]["dlinear"]["mse"]

    assert mse() == mse() == mse("--weight", "trend_weight=1")
    assert mse() != mse("--seed", "1")
    assert mse() != mse("--weight", "trend_weight=0")


def test_a_checkpoint_goes_on(csv, tmp_path):
    def weights_after(*more):
        arguments = ["forecast", "dlinear", "--csv", str(csv), *QUICK, "--json", str(tmp_path / "out.json"), *more]
        main(arguments)
        return json.loads((tmp_path / "out.json").read_text())["validation"]["mse of each epoch"]

    path = str(tmp_path / "run")
    first = weights_after("--checkpoint", path)
    further = weights_after("--checkpoint", path, "--epochs", "4")
    assert further[:2] == first and further == weights_after("--epochs", "4")


@pytest.mark.slow
def test_without_a_csv_it_takes_the_embedded_series(tmp_path):
    done = run("forecast", "dlinear", "--epochs", "1", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["settings"]["csv"] is None and result["settings"]["split"] == [12280, 1754, 3510]
    assert result["test"]["dlinear"]["mse"] < result["test"]["last 24 steps again"]["mse"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--csv", "none.csv"], "there is no file none.csv"),
        (["--csv", ""], "there is no file"),
        (["--csv", "CSV", "--split", "400,100,200"], "add up to 700 rows; the series has 600"),
        (["--csv", "CSV", "--split", "400,100"], "three whole numbers such as 8640,2880,2880; got '400,100'"),
        (["--csv", "CSV", "--weight", "smoothness=1"], "documented_loss has no 'smoothness'; it takes trend_weight"),
        (["--csv", "CSV", "--loss", "published", "--weight", "trend_weight=1"], "it takes none"),
        (["--csv", "CSV", "--weight", "trend_weight=-1"], "trend_weight must be .*at least 0; got -1"),
        (["--csv", "CSV", "--weight", "trend_weight"], "NAME=VALUE with a number"),
        (["--csv", "CSV", "--set", "kernel_size=4"], "kernel_size must be odd"),
        (["--csv", "CSV", "--set", "size=4"], "DLinear has no 'size'; it takes kernel_size"),
        (["--csv", "CSV", "--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["--csv", "CSV", "--horizon", "0"], "horizon must be at least 1; got 0"),
        (["--csv", "CSV", "--learning-rate", "0"], "learning_rate must be .*greater than 0"),
        (["--csv", "CSV", "--period", "0"], "period must be at least 1; got 0"),
        (["--csv", "CSV", "--period", "49"], "period must be at most the 48 time steps"),
        (["--csv", "CSV", "--split", "400,10,100", "--horizon", "24"], "the validation part has 58 rows.*needs 72"),
        (["--csv", "CSV", "--learning-rate", "1e300"], "mini-impl: "),
        (["--csv", "CSV", "--learning-rate", "1e30"], r"training stopped at step \d+.*'forecast'"),
    ],
)
def test_what_is_wrong_is_one_sentence(csv, capsys, arguments, says):
    filled = [str(csv) if argument == "CSV" else argument for argument in arguments]
    with pytest.raises(SystemExit) as stop:
        main(["forecast", "dlinear", "--history", "48", "--horizon", "12", "--epochs", "1", *filled])
    assert stop.value.code == 2
    last_line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(says, last_line), last_line


def test_unknown_models_and_help():
    assert "invalid choice: 'prophet'" in run("forecast", "prophet").stderr
    assert "--split" in run("forecast", "--help").stdout
