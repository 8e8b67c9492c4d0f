"""The command mini-impl, run as a user would."""

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys

import pytest
import torch

from mini_impl.checkpoint import load_checkpoint
from mini_impl.cli import main
from mini_impl.forecasting import FORECASTERS, data, forecast, load
from mini_impl.forecasting.baselines import repeat_last, repeat_season
from mini_impl.forecasting.data import load_csv, prepare
from mini_impl.forecasting.train import evaluate

SMALL = {  # each model with settings so small that an epoch takes a moment
    "dlinear": ["kernel_size=7"],
    "patchtst": ["patch_length=12", "stride=12", "pad_end=false", "width=8", "heads=2", "layers=1", "dropout=0"],
    "itransformer": ["width=8", "heads=2", "layers=1", "embedding=mlp", "feed_forward_width=8"],
    "timesnet": ["top_k=2", "width=4", "feed_forward_width=4", "layers=1", "kernels=2", "convolution=across"],
    "timexer": ["patch_length=12", "width=8", "heads=2", "feed_forward_width=8", "variable_token=learned"],
}
QUICK = ["--history", "48", "--horizon", "12", "--epochs", "2", "--set", "kernel_size=7"]


@pytest.fixture
def csv(tmp_path):
    """Three noisy daily waves with a time column."""
    noise = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    lines = ["date,a,b,c"]
    for hour, (one, two, three) in enumerate(noise.tolist()):
        wave = math.sin(2 * math.pi * hour / 24)
        values = f"{wave + 0.2 * one:.4f},{10 * wave + two:.4f},{three - wave:.4f}"
        lines.append(f"2024-03-{hour // 24 + 1:02} {hour % 24:02}:00,{values}")
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
    assert result["command"] == ["mini-impl", *arguments]
    assert result["settings"]["loss"] == loss and result["settings"]["split"] == [400, 100, 100]
    assert result["settings"]["weight"] == ({"trend_weight": 1.0} if loss == "documented" else {})
    assert result["settings"]["set"] == {"kernel_size": 7, "weights": None}
    assert result["windows"] == {"train": 341, "validation": 89, "test": 89}
    assert len(result["validation"]["mse of each epoch"]) == 2
    _, _, test, _ = prepare(load_csv(csv).values, (400, 100, 100), 48, 12)
    assert result["test"]["last value"] == evaluate(lambda h: repeat_last(h, 12), test)._asdict()
    assert result["test"]["last 24 steps again"] == evaluate(lambda h: repeat_season(h, 12, 24), test)._asdict()
    assert result["test"]["dlinear"]["mse"] < result["test"]["last value"]["mse"]
    assert f"{result['test']['dlinear']['mse']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["documented", "published"])
@pytest.mark.parametrize("model", SMALL)
def test_every_model_trains_with_both_losses(csv, tmp_path, model, loss):
    settings = [part for setting in SMALL[model] for part in ("--set", setting)]
    size = ["--history", "48", "--horizon", "12", "--epochs", "1", "--batch-size", "128"]
    main(["forecast", model, "--csv", str(csv), *size, "--loss", loss, *settings, "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    for setting in SMALL[model]:
        name, value = setting.split("=")
        assert json.dumps(result["settings"]["set"][name]).strip('"') in (value, f"{value}.0")
    assert bool(result["settings"]["weight"]) == (loss == "documented")
    assert not any(name.startswith("return_") for name in result["settings"]["set"])
    assert 0 < result["test"][model]["mse"] < 10 and result["seconds"] >= 0
    assert set(result["test"]) == {model, "last value", "last 24 steps again"}


def test_every_model_of_the_command_has_small_settings_here():
    assert set(SMALL) == set(FORECASTERS)


@pytest.mark.parametrize(("given", "columns"), [("1", [1]), ("-3", [0]), ("2,0", [2, 0])])
def test_endogenous_variables_alone_are_forecast_and_compared(csv, tmp_path, given, columns):
    settings = [part for setting in [*SMALL["timexer"], f"endogenous={given}"] for part in ("--set", setting)]
    size = ["--history", "48", "--horizon", "12", "--epochs", "1", "--batch-size", "128"]
    main(["forecast", "timexer", "--csv", str(csv), *size, *settings, "--json", str(tmp_path / "out.json")])
    test = json.loads((tmp_path / "out.json").read_text())["test"]
    *_, whole, _ = prepare(load_csv(csv).values, (420, 60, 120), 48, 12)
    history, target = whole[:]
    error = (repeat_season(history, 12, 24) - target)[..., columns]
    assert test["last 24 steps again"]["mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
    assert test["last value"]["mae"] == pytest.approx(
        (repeat_last(history, 12) - target)[..., columns].abs().mean().item(), rel=1e-5
    )


@pytest.mark.parametrize(("model", "word"), [("patchtst", "reading=rows"), ("itransformer", "norm=spectral")])
def test_words_of_the_loss(csv, tmp_path, model, word):
    settings = [part for setting in SMALL[model] for part in ("--set", setting)]
    arguments = ["forecast", model, "--csv", str(csv), "--history", "48", "--horizon", "12", "--epochs", "1", *settings]
    results = []
    for more in ([], ["--weight", word]):
        main([*arguments, "--batch-size", "128", *more, "--json", str(tmp_path / "out.json")])
        results.append(json.loads((tmp_path / "out.json").read_text()))
    name, value = word.split("=")
    assert results[0]["settings"]["weight"][name] != results[1]["settings"]["weight"][name] == value
    assert results[0]["test"][model] != results[1]["test"][model]


def test_the_result_holds_no_path_of_this_machine_but_the_data(csv, tmp_path):
    out, checkpoint = tmp_path / "out.json", tmp_path / "run"
    arguments = ["forecast", "dlinear", f"--checkpoint={checkpoint}", "--csv", str(csv), *QUICK, "--json", str(out)]
    main(arguments)
    result = json.loads(out.read_text())
    assert result["command"] == ["mini-impl", "forecast", "dlinear", "--csv", str(csv), *QUICK]
    assert {"checkpoint", "json"}.isdisjoint(result["settings"])
    assert out.read_text().count(str(tmp_path)) == 2  # the series, in the command and in the settings


@pytest.fixture
def ett(tmp_path, monkeypatch):
    """A short file in the place of ETTh1, where MINI_IMPL_DATA says."""
    text = "date,HUFL,OT\n" + "".join(f"{hour},{hour % 24},{hour % 7}\n" for hour in range(700))
    (tmp_path / "ETTh1.csv").write_text(text)
    monkeypatch.setitem(data.ETT_SHA256, "ETTh1", hashlib.sha256(text.encode()).hexdigest())
    monkeypatch.setenv("MINI_IMPL_DATA", str(tmp_path))


def test_ett_by_name(ett, tmp_path, monkeypatch, capsys):
    arguments = ["forecast", "dlinear", "--ett", "ETTh1", *QUICK, "--json", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit):  # the file here is too short for the usual split
        main(arguments)
    assert "lengths (8640, 2880, 2880) add up to 14400 rows; the series has 700" in capsys.readouterr().err
    main([*arguments, "--split", "400,100,200"])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["settings"]["ett"] == "ETTh1" and result["settings"]["csv"] is None
    assert result["windows"] == {"train": 341, "validation": 89, "test": 189}
    monkeypatch.setenv("MINI_IMPL_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.fullmatch(r"mini-impl: MINI_IMPL_DATA is '.*', but there is no file .*\n", capsys.readouterr().err)


def test_the_same_seed_gives_the_same_numbers_and_weights_matter(csv, tmp_path):
    def mse(*more):
        main(["forecast", "dlinear", "--csv", str(csv), *QUICK, *more, "--json", str(tmp_path / "out.json")])
        return json.loads((tmp_path / "out.json").read_text())["test"]["dlinear"]["mse"]

    assert mse() == mse() == mse("--weight", "trend_weight=1")
    assert mse() != mse("--seed", "1")
    assert mse() != mse("--weight", "trend_weight=0")


def test_a_checkpoint_goes_on(csv, tmp_path, monkeypatch):
    def weights_after(*more):
        arguments = ["forecast", "dlinear", "--csv", str(csv), *QUICK, "--json", str(tmp_path / "out.json"), *more]
        main(arguments)
        return json.loads((tmp_path / "out.json").read_text())["validation"]["mse of each epoch"]

    path, step, calls = str(tmp_path / "run"), torch.optim.Adam.step, itertools.count(1)

    def stopping(optimizer):
        if next(calls) == 7:
            raise ValueError("stopped here")
        step(optimizer)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch.optim.Adam, "step", stopping)
        weights_after("--checkpoint", path, "--save-every", "4")
    assert load_checkpoint(path)[1]["step"] == 4
    assert weights_after("--checkpoint", path) == weights_after()


@pytest.mark.parametrize("model", SMALL)
def test_a_kept_model_predicts_next_week(csv, tmp_path, capsys, model):
    settings = [part for setting in SMALL[model] for part in ("--set", setting)]
    size = ["--history", "48", "--horizon", "12", "--epochs", "1", "--batch-size", "128"]
    kept, out = tmp_path / "model", tmp_path / "future.csv"
    main(["forecast", model, "--csv", str(csv), *size, *settings, "--save", str(kept)])
    said = capsys.readouterr().out
    assert re.search(r"test, MAE in its unit +\w+ +last value +last 24 steps again\na +\d", said)
    main(["predict", str(kept), "--csv", str(csv), "--out", str(out)])
    future, expected = load_csv(out), forecast(load(kept), load_csv(csv))
    assert torch.equal(future.values, expected.values) and future.names == ("a", "b", "c")
    assert (future.times == expected.times).all() and future.time_name == "date"
    assert out.read_text().startswith("date,a,b,c\n2024-03-26 00:00:00,")
    assert re.match(r"after 600 rows +2024-03-26T00:00:00 +2024-03-26T11:00:00\na +-?\d", capsys.readouterr().out)


def test_errors_are_in_units_too(csv, tmp_path):
    main(["forecast", "dlinear", "--csv", str(csv), *QUICK, "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    _, _, test, scaler = prepare(load_csv(csv), (420, 60, 120), 48, 12)
    history, target = test[:]
    by_hand = (repeat_last(history, 12) - target).abs().mean((0, 1)) * scaler.std
    assert result["mean absolute error"]["last value"] == pytest.approx(dict(zip("abc", by_hand.tolist(), strict=True)))
    z_scored = result["test"]["dlinear"]["mae"]
    found = [result["mean absolute error"]["dlinear"][name] for name in "abc"]
    assert z_scored == pytest.approx((torch.tensor(found) / scaler.std).mean().item(), rel=1e-5)


def test_what_does_not_fit_a_kept_model_is_said(csv, tmp_path, capsys):
    kept, other, out = tmp_path / "model", tmp_path / "other.csv", tmp_path / "future.csv"
    main(["forecast", "dlinear", "--csv", str(csv), *QUICK, "--save", str(kept)])
    other.write_text(csv.read_text().replace("date,a,b,c", "date,a,B,c"))
    for arguments, says in [
        ([kept, "--csv", other, "--out", out], "'b' is missing: it has 'a', 'B', 'c'"),
        ([csv, "--csv", csv, "--out", out], "is not a whole safetensors file"),
        ([kept, "--csv", csv, "--out", csv], "--csv and --out must be two files"),
        ([kept, "--csv", csv, "--out", tmp_path], "--out: .* cannot be written"),
        ([kept, "--csv", csv], "the following arguments are required: --out"),
        ([tmp_path / "none", "--csv", csv, "--out", out], "No such file or directory"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(["predict", *map(str, arguments)])
        assert ended.value.code == 2 and re.search(says, capsys.readouterr().err)
    assert not out.exists()


def test_patchtst_is_pre_trained_by_filling_in(csv, tmp_path, capsys):
    settings = ["patch_length=8", "width=8", "heads=2", "layers=1", "feed_forward_width=8", "mask_ratio=0.5"]
    arguments = ["forecast", "patchtst", "--csv", str(csv), "--history", "50", "--horizon", "12", "--epochs", "1"]
    arguments += [part for setting in settings for part in ("--set", setting)]
    for _ in range(2):  # the second time there is nothing left to do
        main([*arguments, "--pretrain", "2", "--checkpoint", str(tmp_path / "run"), "--save", str(tmp_path / "model")])
    masked = load_checkpoint(tmp_path / "run.pretrain")[1]
    assert len(masked["validation"]) == 2 and list(masked["terms"]) == ["reconstruction"]
    assert load_checkpoint(tmp_path / "run")[1]["terms"].keys() == {"forecast", "uniformity"}
    assert load(tmp_path / "model").settings["pad_end"] is False
    with pytest.raises(SystemExit):
        main(["forecast", "dlinear", "--csv", str(csv), *QUICK, "--pretrain", "2"])
    assert "--pretrain is for patchtst alone; got dlinear" in capsys.readouterr().err


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
        (["--csv", "none.csv"], "No such file or directory: 'none.csv'"),
        (["--csv", "CSV", "--split", "400,100,200"], "add up to 700 rows; the series has 600"),
        (["--csv", "CSV", "--split", "400,100"], "three whole numbers such as 8640,2880,2880; got '400,100'"),
        (["--csv", "CSV", "--weight", "smoothness=1"], "documented_loss has no 'smoothness'; it takes trend_weight"),
        (["--csv", "CSV", "--loss", "published", "--weight", "trend_weight=1"], "it takes none"),
        (["--csv", "CSV", "--weight", "trend_weight"], "NAME=VALUE such as trend_weight=0.5; got 'trend_weight'"),
        (["--csv", "CSV", "--weight", "trend_weight=much"], "--weight: trend_weight must be a number; got 'much'"),
        (["--csv", "CSV", "--weight", "trend_weight=true"], "--weight: trend_weight must be a number; got True"),
        (["--csv", "CSV", "--set", "kernel_size=7.5"], "--set: kernel_size must be a whole number; got 7.5"),
        (["--csv", "CSV", "--set", "kernel_size=a!b"], "NAME=VALUE such as trend_weight=0.5; got 'kernel_size=a!b'"),
        (["--csv", "CSV", "--set", "endogenous=0"], "DLinear has no 'endogenous'; it takes kernel_size"),
        (["--csv", "CSV", "--ett", "ETTh1"], "argument --ett: not allowed with argument --csv"),
        (["--ett", "ETTm1"], "invalid choice: 'ETTm1'"),
        (["--csv", "CSV", "--chec", "run"], "unrecognized arguments: --chec run"),
        (["--csv", "CSV", "--set", "size=4"], "DLinear has no 'size'; it takes kernel_size"),
        (["--csv", "CSV", "--device", "abacus"], "device: 'abacus' cannot be used here"),
        (["--csv", "CSV", "--period", "49"], "period must be at most 48"),
        (
            ["--csv", "CSV", "--split", "400,10,100", "--horizon", "24"],
            "the validation part of .*at least 24; got 10",
        ),
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


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        ("patchtst", ["--set", "pad_end=3"], "--set: pad_end must be true or false; got 3"),
        ("patchtst", ["--set", "return_attention=true"], "PatchTST has no 'return_attention'; it takes patch_length"),
        ("patchtst", ["--weight", "reading=2"], "--weight: reading must be a word; got 2"),
        ("itransformer", ["--set", "width=9"], "width must be a multiple of heads; got 9 and 8"),
        ("timesnet", ["--set", "variables=3"], "TimesNet has no 'variables'; it takes top_k"),
        ("timesnet", ["--set", "convolution=2d"], "convolution must be one of .*; got '2d'"),
        ("timexer", ["--set", "endogenous=3"], "endogenous must be an index from -3 to 2, or several that differ; got"),
        ("timexer", ["--set", "endogenous=true"], "endogenous must be an index .*; got True"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_sentence(csv, capsys, model, more, says):
    with pytest.raises(SystemExit) as stop:
        main(["forecast", model, "--csv", str(csv), "--history", "48", "--horizon", "12", "--epochs", "1", *more])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"mini-impl: .*{says}.*\n", said), said


def test_unknown_models_and_help():
    assert "invalid choice: 'prophet'" in run("forecast", "prophet").stderr
    assert "--split" in run("forecast", "--help").stdout
