"""Make tests/golden/dlinear.json: what neuralforecast's DLinear forecasts with given weights (make golden).

It is univariate, so every variable goes in as a series of its own.
"""

import json
from pathlib import Path

import neuralforecast
import torch
from neuralforecast.models import DLinear

from bench import weights


def case(history: int, horizon: int, kernel_size: int, batch: int, variables: int) -> dict:
    """Random weights and input, and the peer's forecast from them."""
    torch.manual_seed(history)
    peer = DLinear(h=horizon, input_size=history, moving_avg_window=kernel_size).eval()
    series = torch.randn(batch, history, variables)
    alone = series.mT.reshape(batch * variables, history, 1)
    with torch.no_grad():
        forecast = peer({"insample_y": alone, "hist_exog": None, "futr_exog": None, "stat_exog": None})
    return {
        "history": history,
        "horizon": horizon,
        "kernel_size": kernel_size,
        "weights": {name: value.tolist() for name, value in weights.dlinear(peer).items()},
        "input": series.tolist(),
        "prediction": forecast.view(batch, variables, horizon).mT.tolist(),
    }


if __name__ == "__main__":
    golden = {
        "made by": "tests/golden/make_dlinear.py",
        "versions": {"neuralforecast": neuralforecast.__version__, "torch": torch.__version__},
        "cases": [case(36, 12, 25, batch=2, variables=3), case(20, 5, 7, batch=3, variables=1)],
    }
    Path(__file__).with_name("dlinear.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
