"""Make tests/golden/patchtst.json: what other people's PatchTST compute with given weights (make golden).

neuralforecast's forecaster: its public code's sum of attention scores over layers and its scaling by the last value are
switched off. It is univariate, so every variable goes in as a series of its own.
transformers' forecaster, which does not pad the end, and its masked form, which masks in eval mode too.
All in float64; weights and input have four digits, BatchNorm's statistics included.
"""

import json
from pathlib import Path

import neuralforecast
import torch
import transformers
from neuralforecast.models import PatchTST
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction, PatchTSTForPretraining

from bench import weights

ENCODER = {"width": 8, "heads": 2, "layers": 2, "feed_forward_width": 12}


def random(*shape: int) -> Tensor:
    """Numbers of four digits, so that the file is short and holds them exactly."""
    return torch.randn(shape, dtype=torch.float64).round(decimals=4)


def fill(peer: nn.Module) -> dict[str, Tensor]:
    """Give a peer random weights and statistics, large enough that every part of it matters; return them by name."""
    peer.double().eval()
    for name, value in peer.state_dict().items():
        if name.endswith(("running_var", "norm.weight", "norm_attn.1.weight", "norm_ffn.1.weight")):
            number = 0.5 + random(*value.shape).abs()
        elif value.ndim:
            number = 0.7 * random(*value.shape) / value.shape[-1] ** 0.5
        else:  # the count of batches, the scale of the attention scores
            continue
        value.copy_(number.round(decimals=4))
    return peer.state_dict()


def transformers_weights(theirs: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    """Our names; queries, keys and values stacked."""
    encoder = "model.encoder"
    ours = {
        "encoder.embedding": weights.part(theirs, f"{encoder}.embedder.input_embedding"),
        "encoder.position": theirs[f"{encoder}.positional_encoder.position_enc"],
        "head": weights.part(theirs, head),
    }
    for layer in range(ENCODER["layers"]):
        block, peer = f"encoder.blocks.{layer}", f"{encoder}.layers.{layer}"
        ours |= {
            f"{block}.attention.projection": weights.stack(
                theirs, *(f"{peer}.self_attn.{letter}_proj" for letter in "qkv")
            ),
            f"{block}.attention.output": weights.part(theirs, f"{peer}.self_attn.out_proj"),
            f"{block}.attention_norm": weights.part(theirs, f"{peer}.norm_sublayer1.batchnorm"),
            f"{block}.feed_forward.0": weights.part(theirs, f"{peer}.ff.0"),
            f"{block}.feed_forward.3": weights.part(theirs, f"{peer}.ff.3"),
            f"{block}.feed_forward_norm": weights.part(theirs, f"{peer}.norm_sublayer3.batchnorm"),
        }
    return weights.flatten(ours)


def lists(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: value.tolist() for name, value in tensors.items()}


def padded(history: int, horizon: int, patch_length: int, stride: int, batch: int, variables: int) -> dict:
    """neuralforecast's forecast."""
    torch.manual_seed(history)
    peer = PatchTST(
        h=horizon,
        input_size=history,
        patch_len=patch_length,
        stride=stride,
        hidden_size=ENCODER["width"],
        n_heads=ENCODER["heads"],
        encoder_layers=ENCODER["layers"],
        linear_hidden_size=ENCODER["feed_forward_width"],
        revin_subtract_last=False,
        res_attention=False,
        batch_normalization=False,  # where the norms stand: after the sums, as in the paper; they are BatchNorm anyway
        attn_dropout=0.0,  # it would drop in eval mode too
    )
    fill(peer)
    series = 3 * random(batch, history, variables) + 5
    alone = series.mT.reshape(batch * variables, history, 1)
    with torch.no_grad():
        forecast = peer({"insample_y": alone, "hist_exog": None, "futr_exog": None, "stat_exog": None})
    return {
        "peer": "neuralforecast",
        "model": {"history": history, "horizon": horizon, "patch_length": patch_length, "stride": stride, **ENCODER},
        "weights": lists(weights.patchtst(peer)),
        "input": series.tolist(),
        "prediction": forecast.view(batch, variables, horizon).mT.tolist(),
    }


def config(history: int, patch_length: int, stride: int, variables: int, **further) -> PatchTSTConfig:
    """transformers' settings for the paper's model; many of its defaults are another one's."""
    return PatchTSTConfig(
        context_length=history,
        patch_length=patch_length,
        patch_stride=stride,
        num_input_channels=variables,
        d_model=ENCODER["width"],
        num_attention_heads=ENCODER["heads"],
        num_hidden_layers=ENCODER["layers"],
        ffn_dim=ENCODER["feed_forward_width"],
        activation_function="gelu",
        pre_norm=False,
        positional_encoding_type="random",
        attn_implementation="eager",  # the one that returns the attention maps
        **further,
    )


def unpadded(history: int, horizon: int, patch_length: int, stride: int, batch: int, variables: int) -> dict:
    """transformers' forecast, and the attention of its last layer."""
    torch.manual_seed(history)
    settings = config(
        history, patch_length, stride, variables, prediction_length=horizon, scaling="std", pooling_type=None
    )
    peer = PatchTSTForPrediction(settings)
    ours = transformers_weights(fill(peer), head="head.projection")
    series = 3 * random(batch, history, variables) + 5
    with torch.no_grad():
        output = peer(series, output_attentions=True)
    sizes = {"history": history, "horizon": horizon, "patch_length": patch_length, "stride": stride}
    return {
        "peer": "transformers",
        "model": {**sizes, "pad_end": False, "return_attention": True, **ENCODER},
        "weights": lists(ours),
        "input": series.tolist(),
        "prediction": output.prediction_outputs.tolist(),
        "attention": output.attentions[-1].tolist(),
    }


def masked(history: int, patch_length: int, mask_ratio: float, batch: int, variables: int) -> dict:
    """transformers' reconstruction and loss, and the mask that it drew."""
    torch.manual_seed(history)
    settings = config(
        history, patch_length, patch_length, variables, random_mask_ratio=mask_ratio, scaling=None, do_mask_input=True
    )
    peer = PatchTSTForPretraining(settings)
    ours = transformers_weights(fill(peer), head="head.linear")
    series = 3 * random(batch, history, variables) + 5
    scaled = (series - series.mean(1, keepdim=True)) / (series.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    masks = []
    peer.model.masking.register_forward_hook(lambda module, given, returned: masks.append(returned[1]))
    with torch.no_grad():
        output = peer(scaled)
    return {
        "peer": "transformers",
        "model": {"history": history, "patch_length": patch_length, "mask_ratio": mask_ratio, **ENCODER},
        "weights": lists(ours),
        "input": series.tolist(),
        "mask": masks[0].tolist(),
        "reconstruction": output.prediction_output.tolist(),
        "loss": output.loss.item(),
    }


if __name__ == "__main__":
    golden = {
        "made by": "tests/golden/make_patchtst.py",
        "versions": {
            "neuralforecast": neuralforecast.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "forecasts": [
            padded(32, 6, patch_length=8, stride=3, batch=2, variables=3),
            padded(24, 5, patch_length=6, stride=6, batch=3, variables=1),
            unpadded(23, 7, patch_length=8, stride=5, batch=2, variables=2),
        ],
        "masked": [masked(30, patch_length=5, mask_ratio=0.4, batch=2, variables=3)],
    }
    Path(__file__).with_name("patchtst.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
