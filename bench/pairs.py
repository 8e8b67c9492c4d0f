"""Each forecaster beside neuralforecast's, with the same weights: the same numbers in, the same numbers out.

Sizes as in the public scripts for ETTh1: 96 -> 96, batch 32. Where the peer departs from the paper, or does more than
ours, it is changed here: PatchTST without the sum of attention scores over layers, TimeXer with GELU, TimesNet with the
normalisation that it leaves to its caller, and no dropout of attention maps.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from neuralforecast import models as peers
from torch import Tensor, nn

from bench import weights
from mini_impl import forecasting
from mini_impl.forecasting.layers import denormalise, normalise

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # each peer would name its seed
HISTORY = HORIZON = 96
WINDOWS = 32


class Pair(NamedTuple):
    """Two models that compute the same."""

    ours: nn.Module
    peer: nn.Module
    univariate: bool  # the peer takes every variable as a series of its own
    variables: int


def dlinear_pair() -> Pair:
    ours = forecasting.DLinear(HISTORY, HORIZON)
    peer = peers.DLinear(h=HORIZON, input_size=HISTORY, moving_avg_window=25)
    ours.load_state_dict(weights.dlinear(peer))
    return Pair(ours, peer, True, 7)


def patchtst_pair() -> Pair:
    ours = forecasting.PatchTST(HISTORY, HORIZON)
    peer = peers.PatchTST(
        h=HORIZON,
        input_size=HISTORY,
        patch_len=16,
        stride=8,
        hidden_size=16,
        n_heads=4,
        encoder_layers=3,
        linear_hidden_size=128,
        dropout=0.3,
        fc_dropout=0.3,
        revin_subtract_last=False,
        batch_normalization=False,
        res_attention=False,
    )
    ours.load_state_dict(weights.patchtst(peer))
    return Pair(ours, peer, True, 7)


def itransformer_pair() -> Pair:
    ours = forecasting.ITransformer(HISTORY, HORIZON, embedding="linear")
    peer = peers.iTransformer(
        h=HORIZON, input_size=HISTORY, n_series=7, hidden_size=256, n_heads=8, e_layers=2, d_ff=256, dropout=0.1
    )
    ours.load_state_dict(weights.itransformer(peer))
    return Pair(ours, without_map_dropout(peer), False, 7)


def timesnet_pair() -> Pair:
    ours = forecasting.TimesNet(HISTORY, HORIZON, 1, convolution="inception")
    peer = peers.TimesNet(
        h=HORIZON,
        input_size=HISTORY,
        hidden_size=16,
        conv_hidden_size=32,
        top_k=5,
        num_kernels=6,
        encoder_layers=2,
        dropout=0.1,
    )
    ours.load_state_dict(weights.timesnet(peer))
    return Pair(ours, Normalised(peer), True, 1)


def timexer_pair() -> Pair:
    ours = forecasting.TimeXer(HISTORY, HORIZON, 7, variable_token="learned")
    peer = peers.TimeXer(
        h=HORIZON,
        input_size=HISTORY,
        n_series=7,
        patch_len=16,
        hidden_size=256,
        n_heads=8,
        e_layers=1,
        d_ff=2048,
        dropout=0.1,
    )
    ours.load_state_dict(weights.timexer(peer))
    for layer in peer.encoder.layers:
        layer.activation = F.gelu
    return Pair(ours, without_map_dropout(peer), False, 7)


PAIRS: dict[str, Callable[[], Pair]] = {
    "DLinear": dlinear_pair,
    "PatchTST": patchtst_pair,
    "iTransformer": itransformer_pair,
    "TimesNet": timesnet_pair,
    "TimeXer": timexer_pair,
}


class Normalised(nn.Module):
    """A peer that leaves it to its caller to give each window a scale of its own."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, batch: dict) -> Tensor:
        scaled, mean, std = normalise(batch["insample_y"])
        return denormalise(self.peer({**batch, "insample_y": scaled}), mean, std)


def without_map_dropout(peer: nn.Module) -> nn.Module:
    """The peer, but for dropout on the attention maps, which ours does without."""
    for part in peer.modules():
        if type(part).__name__ == "FullAttention":
            part.dropout.p = 0.0
    return peer
