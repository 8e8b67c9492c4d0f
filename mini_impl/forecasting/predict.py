"""The command `mini-impl predict`: the future of a series, by a model that `mini-impl forecast --save` kept."""

import argparse

from mini_impl.forecasting.data import load_csv, save_csv
from mini_impl.forecasting.forecaster import forecast, load


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give a parser the options of `predict`."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="the file that mini-impl forecast --save wrote")
    add("--csv", metavar="FILE", required=True, help="the series up to now: at least the history that the model sees")
    add("--out", metavar="FILE", required=True, help="a CSV file of the horizon after the last row")


def run(options: argparse.Namespace) -> dict:
    """Forecast as the options say, and write the files; return what the command reports."""
    model, series = load(options.model), load_csv(options.csv)
    model.to(options.device)
    future = forecast(model, series)
    save_csv(future, options.out)
    forecasts = dict(zip(future.names, future.values.T.tolist(), strict=True))
    times = range(1, 1 + model.horizon) if future.times is None else future.times
    return {"rows": len(series.values), "forecast": forecasts, "times": list(map(str, times))}


def report(result: dict) -> None:
    """Print the first variables, from the first step of the horizon to the last."""
    rows, times = f"after {result['rows']} rows", result["times"]
    print(f"{rows:<24}{times[0]:>22}{times[-1]:>22}")
    for name, line in list(result["forecast"].items())[:10]:  # of all: --out
        print(f"{name[:23]:<24}{line[0]:22.6g}{line[-1]:22.6g}")
