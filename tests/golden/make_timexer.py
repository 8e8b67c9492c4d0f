"""Make tests/golden/timexer.json: what neuralforecast's TimeXer forecasts with given weights (make golden).

Where it differs from the paper and its code it is changed here: GELU in place of the ReLU that it hard-wires; exogenous
series on a scale of their own; and with endogenous variables named, they are not exogenous to themselves.
Its variable token is a free parameter. It reads the tokens out feature by feature, ours token by token.
"""

import json
from pathlib import Path

import neuralforecast
import torch
import torch.nn.functional as F
from neuralforecast.models import TimeXer
from torch import Tensor

from bench import weights


def scaled(series: Tensor) -> Tensor:
    """[batch, time, variable], each variable of each window with mean 0 and standard deviation 1."""
    variance, mean = torch.var_mean(series, 1, correction=0, keepdim=True)
    return (series - mean) / (variance + 1e-5).sqrt()


def case(
    batch: int, history: int, horizon: int, variables: int, endogenous: list | None, beside: int, **sizes: int
) -> dict:
    """Random weights and input, the peer's forecast from them, and its cross-attention in every layer.

    endogenous: which of the variables are forecast, the others being exogenous; None: all are both. beside: how many
    more exogenous series there are.
    """
    forecast_ones = list(range(variables)) if endogenous is None else endogenous
    peer = TimeXer(
        h=horizon,
        input_size=history,
        n_series=len(forecast_ones),
        patch_len=sizes["patch_length"],
        hidden_size=sizes["width"],
        n_heads=sizes["heads"],
        e_layers=sizes["layers"],
        d_ff=sizes["feed_forward_width"],
    )
    peer.double().eval()
    torch.manual_seed(history)  # here, for the peer sets a seed of its own
    if endogenous is not None:
        embed = peer.ex_embedding
        peer.ex_embedding.forward = lambda _, others: embed.value_embedding(others.mT)
    maps = []
    with torch.no_grad():
        for parameter in peer.parameters():  # norms too: at their start two of them could be swapped unseen
            parameter.add_(0.3 * torch.randn_like(parameter)).copy_(parameter.round(decimals=3))
        for layer in peer.encoder.layers:
            layer.activation = F.gelu
            layer.cross_attention.inner_attention.output_attention = True
            layer.cross_attention.register_forward_hook(lambda module, given, returned: maps.append(returned[1]))
        series = torch.randn(batch, history, variables + beside, dtype=torch.float64).cumsum(1)
        series = (10 * series).round(decimals=2)
        others = [i for i in range(variables + beside) if i >= variables or i not in forecast_ones]
        marks = scaled(series[..., others]) if others else None
        forecast = peer.forecast(series[..., forecast_ones].clone(), marks)
    return {
        "model": {
            "history": history,
            "horizon": horizon,
            "variables": variables,
            "endogenous": endogenous,
            **sizes,
        },
        "weights": {name: value.tolist() for name, value in weights.timexer(peer).items()},
        "input": series[..., :variables].tolist(),
        "exogenous": series[..., variables:].tolist() if beside else None,
        "prediction": forecast.tolist(),
        "cross_attention": [map.tolist() for map in maps],
    }


if __name__ == "__main__":
    golden = {
        "made by": "tests/golden/make_timexer.py",
        "versions": {"neuralforecast": neuralforecast.__version__, "torch": torch.__version__},
        "cases": [
            case(2, 24, 6, 4, None, 0, patch_length=8, width=8, heads=2, layers=2, feed_forward_width=12),
            case(3, 16, 20, 1, None, 0, patch_length=4, width=12, heads=3, layers=3, feed_forward_width=8),
            case(2, 12, 5, 2, None, 3, patch_length=4, width=8, heads=2, layers=2, feed_forward_width=8),
            case(3, 20, 4, 4, [3], 0, patch_length=5, width=8, heads=4, layers=2, feed_forward_width=8),
            case(2, 18, 3, 4, [2, 0], 1, patch_length=9, width=8, heads=2, layers=2, feed_forward_width=8),
        ],
    }
    Path(__file__).with_name("timexer.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
