"""Models that are kept: what is read is what was written, and the future comes in names, units and times."""

import functools
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

import mini_impl
from mini_impl.checkpoint import load_checkpoint, save_checkpoint
from mini_impl.forecasting import FORECASTERS, DLinear, Series, fit, forecast, load, prepare, unit_errors
from mini_impl.forecasting.baselines import repeat_last
from mini_impl.forecasting.patchtst import MaskedPatchTST, PatchTST, masked_loss, masked_score
from mini_impl.losses import LossTerms, NonFiniteLoss
from tests.tensors import random

HOURS = np.datetime64("2024-02-28", "s") + np.arange(200) * np.timedelta64(3600, "s")
NAMES = ("people", "流量", "c,d")


def series(rows=200, **changes):
    values = random(rows, 3, dtype=torch.float32) * torch.tensor([1.0, 100.0, 0.01]) + torch.tensor([0.0, 1e4, -3.0])
    return Series(values, NAMES, HOURS[:rows], "when")._replace(**changes)


def squared(output, target):
    return LossTerms.of(error=(output.prediction - target).square().mean())


def trained(name="dlinear", data=None, dtype=torch.float32):
    """A model after an epoch, in which its scaler and names reached it."""
    torch.manual_seed(0)
    data, kind, settings = series() if data is None else data, FORECASTERS[name], SMALL[name]
    data, endogenous = data._replace(values=data.values.to(dtype)), settings.get("endogenous")
    train, validation, *_ = prepare(data, (120, 40, 40), 24, 6, endogenous)
    model = kind(24, 6, **settings).to(dtype)
    fit(model, train, validation, squared, epochs=1, progress=False)
    return model


SMALL = {
    "dlinear": {"kernel_size": 5},
    "patchtst": {"patch_length": 8, "stride": 4, "width": 8, "layers": 2},
    "itransformer": {"width": 8, "heads": 2, "embedding": "linear"},
    "timesnet": {"variables": 3, "width": 4, "top_k": 2, "per_window": True},
    "timexer": {"variables": 3, "endogenous": (2, 0), "patch_length": 8, "width": 8, "heads": 2},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_read_is_what_was_written(tmp_path, name, dtype):
    model = trained(name, dtype=dtype)
    model.save(tmp_path / "deep" / "model")
    before = torch.get_rng_state()
    again = load(tmp_path / "deep" / "model")
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again) is type(model) and not again.training
    assert json.dumps(again.settings) == json.dumps(model.settings)
    assert again.origin.names == NAMES and again.origin.step == np.timedelta64(3600, "s")
    assert all(torch.equal(one, other) for one, other in zip(again.origin.scaler, model.origin.scaler, strict=True))
    assert {key: value.dtype for key, value in again.state_dict().items()} == {
        key: value.dtype for key, value in model.state_dict().items()
    }
    one, other = forecast(model, series()), forecast(again, series())
    assert torch.equal(one.values, other.values) and one.values.dtype == torch.float32


def test_every_forecaster_has_small_settings_here():
    assert set(SMALL) == set(FORECASTERS)


def test_a_pre_trained_model_is_kept_and_what_is_made_of_it_too(tmp_path):
    train, validation, *_ = prepare(series(), (120, 40, 40), 24, 6)
    sizes = {"patch_length": 8, "width": 8, "heads": 4, "layers": 2, "feed_forward_width": 6, "dropout": 0.0}
    masked = MaskedPatchTST(24, mask_ratio=0.4, **sizes)
    fit(masked, train, validation, masked_loss, score=masked_score, epochs=1, progress=False)
    masked.save(tmp_path / "masked")
    model = PatchTST.from_masked(load(tmp_path / "masked"), horizon=6)
    fit(model, train, validation, squared, epochs=1, progress=False)
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(forecast(again, series()).values, forecast(model, series()).values)


def test_the_future_by_hand():
    """A model that repeats its last z-score: so the last row again, six hours long."""
    model = trained()
    model.forward = lambda history: model_output(repeat_last(history, 6))
    future = forecast(model, series())
    assert torch.allclose(future.values, series().values[-1:].expand(6, 3), rtol=1e-6)
    assert future.names == NAMES and future.time_name == "when"
    assert [str(time) for time in future.times] == [f"2024-03-07T{hour:02}:00:00" for hour in range(8, 14)]


def model_output(prediction):
    return type("Output", (), {"prediction": prediction})()


def test_variables_go_by_their_names_and_the_mode_stays():
    model = trained().train()
    expected = forecast(model, series())
    values = series().values
    more = torch.cat([values[:, [2, 0, 1]], values[:, :1] * 7], dim=1)
    mixed = series(values=more, names=("c,d", "people", "流量", "new"))
    assert torch.equal(forecast(model, mixed).values, expected.values) and model.training
    longest = series(24 + 80)._replace(values=values[-104:])
    assert torch.equal(forecast(model, longest).values, expected.values)


def test_endogenous_variables_alone_come_back():
    model = trained("timexer")
    model.forward = lambda history: model_output(repeat_last(history, 6)[..., [2, 0]])
    future = forecast(model, series())
    assert future.names == ("c,d", "people")
    assert torch.allclose(future.values, series().values[-1:, [2, 0]].expand(6, 2), rtol=1e-5)


def test_without_times_the_future_has_none():
    model = trained(data=series(times=None))
    assert model.origin.step is None
    assert forecast(model, series()).times is not None and forecast(model, series(times=None)).times is None


def months(count):
    return (np.datetime64("2001-01", "M") + np.arange(count)).astype("M8[s]")


@pytest.mark.parametrize(
    ("then", "now", "says"),
    [
        (months(200), HOURS, "rows 1 months apart, as the model was trained on; got 3600 seconds"),
        (np.arange(200.0), HOURS, "rows 1, in numbers, apart, as the model was trained on; got 3600 seconds"),
        (np.arange(200.0), np.arange(200.0) / 2, "rows 1, in numbers, apart, .*; got 0.5, in numbers"),
        (months(200), np.concatenate([months(1), months(400)[2::2]]), "rows 1 months apart, .*; got 2 months"),
    ],
)
def test_another_step_is_named(then, now, says):
    model = trained(data=series(times=then))
    with pytest.raises(ValueError, match=says):
        forecast(model, series(times=now))


def test_numbers_that_count_time_may_begin_elsewhere():
    """Neither 0.1 nor what lies between 43.7 and 63.6 is a fraction of two."""
    model = trained(data=series(times=np.arange(200) / 10))
    future = forecast(model, series(times=43.7 + np.arange(200) / 10))
    assert future.times.tolist() == [63.7, 63.8, 63.9, 64.0, 64.1, 64.2]


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"names": ("people", "Flow", "c,d")}, ValueError, "'流量' is missing: it has 'people', 'Flow', 'c,d'"),
        ({"times": HOURS[0] + 24 * (HOURS - HOURS[0])}, ValueError, "rows 3600 seconds apart.*got 86400 seconds"),
        ({"times": months(200)}, ValueError, "rows 3600 seconds apart.*got 1 months"),
        ({"times": np.arange(200.0)}, ValueError, "rows 3600 seconds apart.*got 1, in numbers,"),
        ({"times": HOURS[::-1]}, ValueError, "series.times must be in order and equally far apart"),
        ({"times": list(HOURS)}, ValueError, "series.times must be an array of datetime64.*got list"),
        ({"values": torch.ones(23, 3), "times": None}, ValueError, "rows of series.* must be at least 24; got 23"),
        ({"values": torch.full((200, 3), 1e38)}, (ValueError, NonFiniteLoss), "finite"),
    ],
)
def test_what_does_not_fit_is_named(wrong, error, says):
    with pytest.raises(error, match=says):
        forecast(trained(), series(**wrong))


def test_what_is_no_kept_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"does not know names and units: fit it to windows of prepare\(series"):
        DLinear(24, 6, kernel_size=5).save(tmp_path / "model")
    with pytest.raises(ValueError, match="does not know names and units"):
        forecast(DLinear(24, 6, kernel_size=5), series())
    with pytest.raises(TypeError, match="model must be one of the package's forecasters; got Linear"):
        forecast(torch.nn.Linear(2, 2), series())
    with pytest.raises(TypeError, match="series must be a Series"):
        forecast(trained(), series().values)
    save_checkpoint(tmp_path / "other", {"a": torch.zeros(1)}, {"language model": {}})
    with pytest.raises(ValueError, match=r"other holds none of the models DLinear, .*`model.save` writes such a file"):
        load(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="none"):
        load(tmp_path / "none")


def test_a_model_that_only_fills_in_makes_no_forecast():
    train, validation, *_ = prepare(series(), (120, 40, 40), 24, 6)
    masked = MaskedPatchTST(24, patch_length=8, width=8, heads=4, layers=1, feed_forward_width=6)
    fit(masked, train, validation, masked_loss, score=masked_score, epochs=1, progress=False)
    with pytest.raises(
        ValueError, match=r"a MaskedPatchTST has no horizon to forecast; PatchTST.from_masked\(model, h"
    ):
        forecast(masked, series())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"settings": None}, "AttributeError"),
        ({"settings": {"history": 24, "horizon": 6, "kernel": 5}}, "unexpected keyword argument 'kernel'"),
        ({"names": ["a"]}, r"names \('a',\), 3 means, 3 deviations"),
        ({"step": "week"}, "step 'week'"),
        ({"step": [1, "xx"]}, "TypeError"),
        ({"mean": None}, "KeyError: 'mean'"),
        ({"step": ...}, "KeyError: 'step'"),
        ({"names": ...}, "KeyError: 'names'"),
    ],
)
def test_a_file_of_another_version_is_named(tmp_path, changes, says):
    trained().save(tmp_path / "model")
    tensors, state = load_checkpoint(tmp_path / "model")
    assert state["mini_impl"] == mini_impl.__version__
    state |= {**changes, "mini_impl": "9.9"}
    if "mean" in changes:
        tensors.pop("mean")
    save_checkpoint(tmp_path / "other", tensors, {name: value for name, value in state.items() if value is not ...})
    words = (
        f"other does not describe a model as mini_impl {mini_impl.__version__} does; mini_impl 9.9 wrote it .*{says}"
    )
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "other")


def test_sizes_of_numpy_are_kept_too(tmp_path):
    train, validation, *_ = prepare(series(), (120, 40, 40), 24, 6)
    model = DLinear(np.uint8(24), np.int64(6), kernel_size=np.int16(5))
    fit(model, train, validation, squared, epochs=1, progress=False)
    model.save(tmp_path / "model")
    assert load(tmp_path / "model").settings == {"history": 24, "horizon": 6, "kernel_size": 5, "weights": None}


def test_a_small_file_of_a_huge_model_takes_no_memory(tmp_path):
    trained().save(tmp_path / "model")
    tensors, state = load_checkpoint(tmp_path / "model")
    state["settings"]["horizon"] = 10**9
    save_checkpoint(tmp_path / "huge", tensors, state)
    with pytest.raises(ValueError, match="huge holds other weights than those of a DLinear as it describes it"):
        load(tmp_path / "huge")
    trained("patchtst").save(tmp_path / "model")
    tensors, state = load_checkpoint(tmp_path / "model")
    state["settings"]["layers"] = 10**9
    save_checkpoint(tmp_path / "huge", tensors, state)
    with pytest.raises(ValueError, match=r"huge holds [0-9]+ weights, too few for the 1000000000 layers that it descr"):
        load(tmp_path / "huge")


def test_the_file_holds_no_code(tmp_path):
    trained().save(tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as file:
        assert sorted(file.keys())[:2] == ["mean", "model/seasonal.bias"]
    assert b"pickle" not in (tmp_path / "model").read_bytes()


def test_errors_in_units_are_the_z_scores_times_the_deviation():
    _, _, test, scaler = prepare(series(), (120, 40, 40), 24, 6, endogenous=(1, 0))
    found = unit_errors(lambda history: repeat_last(history, 6)[..., [1, 0]], test)
    history, target = test[:]
    error = (repeat_last(history, 6)[..., [1, 0]] - target).abs().mean((0, 1)) * scaler.std[[1, 0]]
    assert list(found) == ["流量", "people"] and list(found.values()) == pytest.approx(error.tolist(), rel=1e-5)
    *_, plain, _ = prepare(series().values, (120, 40, 40), 24, 6)
    with pytest.raises(ValueError, match="windows must come from prepare"):
        unit_errors(functools.partial(repeat_last, horizon=6), plain)
