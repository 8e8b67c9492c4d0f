"""Forecasters: a model is a function from history [batch, time, variable] to an Output with .prediction.

    from mini_impl import forecasting
    from mini_impl.forecasting.dlinear import documented_loss

    series = forecasting.load_auckland()          # or load_csv(FILE), or load_csv(download_ett("ETTh1"))
    train, validation, test, scaler = forecasting.prepare(series, (2400, 400, 400), history=48, horizon=24)
    model = forecasting.DLinear(history=48, horizon=24)
    forecasting.fit(model, train, validation, documented_loss, epochs=2)
    forecasting.evaluate(model, test)             # Scores(mse=.., mae=..) of the z-scored series
    forecasting.evaluate(lambda history: forecasting.repeat_season(history, horizon=24, period=24), test)
    model.save("auckland.safetensors")            # load(FILE) reads it
    forecasting.forecast(model, series)           # the 24 hours after the last, in people an hour

Each model is a module of its own, with its documented_loss(output, target, ..) and published_loss(output, target); the
command `mini-impl forecast NAME`, the speed measurements and the tests that hold for every forecaster find all of them
in FORECASTERS. A new model is one module and one line of that table.
"""

import inspect
from collections.abc import Callable

from torch import nn

from mini_impl import checks
from mini_impl.forecasting.baselines import repeat_last, repeat_season
from mini_impl.forecasting.data import Scaler, Series, Windows, download_ett, load_auckland, load_csv, prepare, save_csv
from mini_impl.forecasting.dlinear import DLinear
from mini_impl.forecasting.forecaster import Forecaster, forecast, load, unit_errors
from mini_impl.forecasting.itransformer import ITransformer
from mini_impl.forecasting.patchtst import MaskedPatchTST, PatchTST
from mini_impl.forecasting.timesnet import TimesNet
from mini_impl.forecasting.timexer import TimeXer
from mini_impl.forecasting.train import Scores, Training, evaluate, fit
from mini_impl.losses import LossTerms

__all__ = [
    "FORECASTERS",
    "DLinear",
    "Forecaster",
    "ITransformer",
    "MaskedPatchTST",
    "PatchTST",
    "Scaler",
    "Scores",
    "Series",
    "TimeXer",
    "TimesNet",
    "Training",
    "Windows",
    "download_ett",
    "evaluate",
    "fit",
    "forecast",
    "load",
    "load_auckland",
    "load_csv",
    "loss_of",
    "prepare",
    "repeat_last",
    "repeat_season",
    "save_csv",
    "unit_errors",
]

# A model's first arguments are `history` and `horizon`; one that must know how many series there are takes `variables`
# too. `documented_needs` says with which further ones it returns what its documented loss is made of.
FORECASTERS: dict[str, type[Forecaster]] = {
    "dlinear": DLinear,
    "patchtst": PatchTST,
    "itransformer": ITransformer,
    "timesnet": TimesNet,
    "timexer": TimeXer,
}


def loss_of(model: type[nn.Module], form: str) -> Callable[..., LossTerms]:
    """The "documented" or the "published" loss of a model: that of the module where its class is written.

    loss_of(DLinear, "documented") is mini_impl.forecasting.dlinear.documented_loss. Raises ValueError for another form.
    """
    checks.choice("model", model, tuple(FORECASTERS.values()))
    checks.choice("form", form, ("documented", "published"))
    return getattr(inspect.getmodule(model), f"{form}_loss")
