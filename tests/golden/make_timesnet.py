"""Make tests/golden/timesnet.json: what neuralforecast's TimesNet computes with given weights (make golden).

It knows no scale of each window, so ours goes around it. It is univariate: for several variables its embedding and its
projection are made with more channels. Its kernels are square: for ours of one dimension all but their middle row or
column is set to 0. All in float64, but for its table of positions; weights and input have four digits.
"""

import json
from pathlib import Path

import neuralforecast
import torch
from neuralforecast.common._modules import DataEmbedding
from neuralforecast.models import TimesNet
from torch import Tensor, nn

from bench.weights import timesnet_name
from mini_impl.forecasting.layers import denormalise, normalise

HIDDEN = 4  # features between the two convolutions of a block


def random(*shape: int) -> Tensor:
    """Numbers of four digits, so that the file is short and holds them exactly."""
    return torch.randn(shape, dtype=torch.float64).round(decimals=4)


def fill(peer: TimesNet, convolution: str) -> dict[str, list]:
    """Give the peer random weights so large that every part of it matters; return them by our names, in our shapes."""
    peer.double().eval()
    ours = {}
    for name, parameter in peer.named_parameters():
        parameter.data = (0.4 * random(*parameter.shape)).round(decimals=4)
        if parameter.ndim == 4:  # the kernel of a convolution in the plane
            parameter.data, kernel = one_dimensional(parameter.data, convolution)
            ours[timesnet_name(name)] = kernel.tolist()
        else:
            ours[timesnet_name(name)] = parameter.tolist()
    return ours


def one_dimensional(kernel: Tensor, convolution: str) -> tuple[Tensor, Tensor]:
    """A square kernel that is 0 outside of its middle row or column, and that row or column; or all of it, twice."""
    axis = {"within": 2, "across": 3, "inception": None}[convolution]
    if axis is None:
        return kernel, kernel
    size = kernel.shape[axis]
    middle = kernel.narrow(axis, size // 2, 1)
    square = torch.zeros_like(kernel)
    square.narrow(axis, size // 2, 1).copy_(middle)
    return square, middle


def case(convolution: str, batch: int, **model: int) -> dict:
    """The peer's forecast, and its last block's branches over the horizon, the strongest period first."""
    history, horizon, variables, width = (model[name] for name in ("history", "horizon", "variables", "width"))
    torch.manual_seed(history)
    peer = TimesNet(
        h=horizon,
        input_size=history,
        hidden_size=width,
        conv_hidden_size=HIDDEN,
        top_k=model["periods"],
        num_kernels=model["kernels"],
        encoder_layers=model["layers"],
    )
    peer.enc_embedding = DataEmbedding(c_in=variables, exog_input_size=0, hidden_size=width)
    peer.projection = nn.Linear(width, variables)
    weights = fill(peer, convolution)
    series = 3 * random(batch, history, variables) + 5
    planes = []  # [batch, width, row, column] for each period
    peer.model[-1].conv.register_forward_hook(lambda module, given, returned: planes.append(returned))
    with torch.no_grad():
        scaled, mean, std = normalise(series)
        forecast = peer({"insample_y": scaled, "hist_exog": None, "futr_exog": None, "stat_exog": None})
    branches = [plane.permute(0, 2, 3, 1).flatten(1, 2)[:, history : history + horizon] for plane in planes]
    return {
        "model": {"convolution": convolution, "feed_forward_width": HIDDEN, **model},
        "weights": weights,
        "input": series.tolist(),
        "prediction": denormalise(forecast, mean, std).tolist(),
        "frequency_features": torch.stack(branches, dim=2).tolist(),
    }


if __name__ == "__main__":
    golden = {
        "made by": "tests/golden/make_timesnet.py",
        "versions": {"neuralforecast": neuralforecast.__version__, "torch": torch.__version__},
        "cases": [
            case("inception", 3, history=21, horizon=10, variables=1, periods=3, width=4, layers=2, kernels=3),
            case("inception", 2, history=8, horizon=19, variables=3, periods=4, width=6, layers=1, kernels=3),
            # every frequency there is, of which several have the same period
            case("inception", 2, history=14, horizon=6, variables=1, periods=10, width=4, layers=2, kernels=2),
            case("within", 2, history=24, horizon=9, variables=2, periods=3, width=8, layers=2, kernels=3),
            case("across", 1, history=20, horizon=12, variables=2, periods=4, width=6, layers=2, kernels=3),
        ],
    }
    Path(__file__).with_name("timesnet.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
