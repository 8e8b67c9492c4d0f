"""Make tests/golden/itransformer.json: what neuralforecast's iTransformer forecasts with given weights (make golden).

Its query, key and value are three maps where ours are one; its feed-forward network is two convolutions over one step
where ours is two linear maps. Its embedding is linear: for the documented one the script puts an MLP in its place.
"""

import json
from pathlib import Path

import neuralforecast
import torch
from neuralforecast.models import iTransformer
from torch import nn

from bench import weights


def case(batch: int, history: int, horizon: int, variables: int, embedding: str, **sizes: int) -> dict:
    """Random weights and input, the peer's forecast from them, and the attention of its last layer."""
    peer = iTransformer(
        h=horizon,
        input_size=history,
        n_series=variables,
        hidden_size=sizes["width"],
        n_heads=sizes["heads"],
        e_layers=sizes["layers"],
        d_ff=sizes["feed_forward_width"],
    )
    if embedding == "mlp":
        first, width = peer.enc_embedding.value_embedding, sizes["width"]
        peer.enc_embedding.value_embedding = nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
    peer.double().eval()
    torch.manual_seed(history)  # here, for the peer sets a seed of its own
    with torch.no_grad():
        for parameter in peer.parameters():  # norms too: at their start two of them could be swapped unseen
            parameter.add_(0.3 * torch.randn_like(parameter)).copy_(parameter.round(decimals=3))
        for layer in peer.encoder.attn_layers:
            layer.attention.inner_attention.output_attention = True
        maps = []
        peer.encoder.register_forward_hook(lambda module, given, returned: maps.extend(returned[1]))
        series = (10 * torch.randn(batch, history, variables, dtype=torch.float64).cumsum(1)).round(decimals=2)
        forecast = peer({"insample_y": series.clone()})
    return {
        "model": {"history": history, "horizon": horizon, "embedding": embedding, **sizes},
        "weights": {name: value.tolist() for name, value in weights.itransformer(peer).items()},
        "input": series.tolist(),
        "prediction": forecast.tolist(),
        "attention": maps[-1].tolist(),
    }


if __name__ == "__main__":
    golden = {
        "made by": "tests/golden/make_itransformer.py",
        "versions": {"neuralforecast": neuralforecast.__version__, "torch": torch.__version__},
        "cases": [
            case(3, 24, 6, 5, "linear", width=8, heads=2, layers=2, feed_forward_width=12),
            case(2, 12, 16, 3, "mlp", width=12, heads=3, layers=3, feed_forward_width=8),
            case(3, 16, 4, 1, "linear", width=8, heads=1, layers=2, feed_forward_width=16),
        ],
    }
    Path(__file__).with_name("itransformer.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
