"""PatchTST: cut each variable's past into patches, let the patches attend to one another, read the forecast off them.

Sources: the documented system "PatchTST"; Nie et al., "A Time Series is Worth 64 Words", 2023.
"""

import copy
import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks, workers
from mini_impl.forecasting.data import Windows
from mini_impl.forecasting.forecaster import Forecaster
from mini_impl.forecasting.layers import Dropout, EncoderBlock, denormalise, encode, normalise, patches
from mini_impl.losses import LossTerms, _kl_from_uniform


def pad_end(series: Tensor, patch_length: int, stride: int) -> Tensor:
    """Repeat the last value, at most `stride` times, until one patch more fits than without.

    series: [.., time]. Returns [.., time and 1 to stride steps more]. Source: the paper, section 3.1.
    """
    stride = checks.integer("stride", stride)
    extra = stride - (series.shape[-1] - patch_length) % stride
    return torch.cat([series, series[..., -1:].expand(*series.shape[:-1], extra)], dim=-1)


class BatchNorm(workers.BatchNorm1d):
    """For each feature one mean and one variance over all windows, variables and patches of the batch."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.flatten(0, 1)).view_as(tokens)  # rows [batch * variable * patch, width]


class Encoder(nn.Module):
    """Patches [window, patch, patch_length] -> tokens [window, patch, width], and the last layer's attention map.

    Each patch is embedded by one linear map, gets a learned position added, and goes through the transformer's blocks.
    A "window" is one variable of one window here. Source: documented steps 2 and 3.
    """

    def __init__(
        self,
        patch_count: int,
        patch_length: int,
        width: int,
        heads: int,
        layers: int,
        feed_forward_width: int,
        dropout: float,
    ):
        super().__init__()
        width, layers = checks.integers(width=width, layers=layers)
        self.embedding = nn.Linear(patch_length, width)
        self.position = nn.Parameter(torch.empty(patch_count, width).uniform_(-0.02, 0.02))
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, feed_forward_width, dropout, norm=BatchNorm) for _ in range(layers)
        )

    def forward(self, pieces: Tensor, return_map: bool = False) -> tuple[Tensor, Tensor | None]:
        tokens = self.dropout(self.embedding(pieces) + self.position)  # 2. [window, patch, width]
        return encode(self.blocks, tokens, return_map)  # 3. attention between patches


# --- supervised -------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """What PatchTST returns."""

    prediction: Tensor  # [batch, horizon, variable]
    attention: Tensor | None = None  # [batch * variable, head, query, key] of the last layer, if return_attention


class PatchTST(Forecaster):
    """Forecast every variable by itself with one shared transformer over its patches.

    history, horizon: how many steps it sees and forecasts (elsewhere: seq_len, pred_len).
    patch_length, stride: patches overlap where stride is less.
    pad_end: repeat the last value, so that one more patch fits; without it the patches end with the history, and the
        first steps, fewer than stride, may be in none.
    width, heads, layers, feed_forward_width, dropout: of the encoder (elsewhere: d_model, n_heads, e_layers, d_ff).
    return_attention: fill Output.attention.
    model(history [batch, history, variable]) -> Output. Raises TypeError, ValueError.
    Source: documented steps 1 to 4. What the text leaves out (each window on its own scale, positions, BatchNorm, the
    linear head) as in the paper. The public code, not the paper, also sums attention scores over layers, drops out
    twice after attention (here once), can drop out entries of attention maps and can give each variable a head of its
    own (`individual`); none of these is here.
    """

    documented_needs: ClassVar[dict] = {"return_attention": True}

    def __init__(
        self,
        history: int,
        horizon: int,
        patch_length: int = 16,
        stride: int = 8,
        pad_end: bool = True,
        width: int = 16,
        heads: int = 4,
        layers: int = 3,
        feed_forward_width: int = 128,
        dropout: float = 0.3,
        return_attention: bool = False,
    ):
        super().__init__()
        history, horizon = checks.integers(history=history, horizon=horizon)
        patch_length = checks.integer("patch_length", patch_length, most=history, why="the history")
        width, stride = checks.integers(width=width, stride=stride)
        checks.flags(pad_end=pad_end, return_attention=return_attention)
        self.history, self.horizon, self.patch_length, self.stride = history, horizon, patch_length, stride
        self.pad_end, self.return_attention = pad_end, return_attention
        patch_count = self.cut(torch.empty(1, history, 1)).shape[2]
        self.encoder = Encoder(patch_count, patch_length, width, heads, layers, feed_forward_width, dropout)
        self.head = nn.Linear(patch_count * width, horizon)

    def cut(self, scaled: Tensor) -> Tensor:
        """[batch, time, variable] -> patches [batch, variable, patch, patch_length]. Source: documented step 1."""
        series = pad_end(scaled.mT, self.patch_length, self.stride) if self.pad_end else scaled.mT  # [.., time]
        return patches(series, self.patch_length, self.stride)

    def forward(self, history: Tensor) -> Output:
        checks.history(history, self.history, self.head.weight)
        scaled, mean, std = normalise(history)  # [batch, time, variable]
        pieces = self.cut(scaled).flatten(0, 1)  # 1. [batch * variable, patch, patch_length]
        tokens, attention = self.encoder(pieces, self.return_attention)  # 2., 3. [batch * variable, patch, width]
        forecast = self.head(tokens.flatten(1))  # 4. [batch * variable, horizon]
        forecast = forecast.view(len(history), -1, self.horizon).mT  # [batch, horizon, variable]
        return Output(prediction=denormalise(forecast, mean, std), attention=attention)

    @classmethod
    def from_masked(
        cls, masked: "MaskedPatchTST", horizon: int, linear_probe: bool = False, return_attention: bool = False
    ) -> "PatchTST":
        """A forecaster with a copy of a pre-trained encoder and a new head.

        linear_probe: train the head alone; the encoder's weights then need no gradient (in train mode it still drops
        out, and its BatchNorm follows the data, as in public code). Otherwise all is trained on.
        Source: the paper, section 4.2.
        """
        checks.instance("masked", masked, MaskedPatchTST, "a MaskedPatchTST")
        checks.flags(linear_probe=linear_probe)
        sizes = {name: value for name, value in masked.settings.items() if name not in ("history", "mask_ratio")}
        how = {"stride": masked.patch_length, "pad_end": False, "return_attention": return_attention}
        model = cls(masked.history, horizon, **how, **sizes)
        model.encoder = copy.deepcopy(masked.encoder).train()  # in place of the one just made
        model.encoder.requires_grad_(not linear_probe)
        return model.to(masked.head.weight)


def documented_loss(
    output: Output, target: Tensor, uniformity_weight: float = 0.1, reading: str = "received"
) -> LossTerms:
    """L = mean |y - yhat| + gamma KL(p || uniform).

    output: of a PatchTST made with return_attention=True. target: y, [batch, horizon, variable].
    uniformity_weight: gamma, at least 0.
    reading: what p, "the attention distribution of the patch embedding", is. "received": how much attention each patch
    receives, the mean over heads and queries, for each window and variable; "rows": each row of the map.
    The KL lies between 0 and log(patches); its mean over all p counts.
    Terms: "forecast" and "uniformity". Raises TypeError, ValueError. Source: the documented loss.
    """
    checks.forecast(output, target, attention=(("window", "head", "query", "key"), "return_attention"))
    attention = output.attention
    checks.alike("output.attention[:, 0, 0, 0]", attention[:, 0, 0, 0], "target[:, 0]", target[:, 0].flatten())
    checks.not_negative(uniformity_weight=uniformity_weight)
    checks.choice("reading", reading, ("received", "rows"))
    p = attention if reading == "rows" else attention.mean((1, 2))  # [.., key]
    return LossTerms.of(
        forecast=F.l1_loss(output.prediction, target), uniformity=uniformity_weight * _kl_from_uniform(p)
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and variables.

    output: of PatchTST. target: y, [batch, horizon, variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper's public code; the paper sums over the horizon instead.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))


# --- self-supervised --------------------------------------------------------------------------------------------------


class MaskedOutput(NamedTuple):
    """What MaskedPatchTST returns, all on the scale of each window."""

    reconstruction: Tensor  # [batch, variable, patch, patch_length]
    patches: Tensor  # [batch, variable, patch, patch_length], as they were before masking
    mask: Tensor  # bool [batch, variable, patch], True where the patch was set to zero


def random_mask(shape: tuple[int, ...], visible: int, generator: torch.Generator | None = None) -> Tensor:
    """Which patches to hide: bool [.., patch] of the given shape, True for all but `visible` random ones of each row.

    generator: on the CPU; None: torch's own.
    """
    rank = torch.rand(shape, generator=generator).argsort(-1).argsort(-1)  # [.., patch], a random order of each row
    return rank >= visible


class MaskedPatchTST(Forecaster):
    """Learn without a target: set random patches to zero, and reconstruct them from the ones still visible.

    patch_length: the patches do not overlap, or a hidden one could be read off its neighbours. They end with the
    history; its first steps, fewer than patch_length, may be in none (the first 8 of the paper's 512).
    mask_ratio: r, the share of patches to hide; of n patches floor(n (1 - r)) stay visible, with n (1 - r) as the exact
    product of decimals: public code rounds down what floating point makes of it, at times one patch less.
    history, width and so on: as PatchTST's.
    model(history [batch, history, variable], generator=None) -> MaskedOutput; generator: where the masks come from.
    Raises TypeError, ValueError. Source: the documented self-supervised form; sizes as in the paper, section 4.2. Here
    nothing is dropped out before the head, and the blocks have GELU; public pre-training has a head dropout of 0.2 and
    ReLU.
    """

    def __init__(
        self,
        history: int,
        patch_length: int = 12,
        mask_ratio: float = 0.4,
        width: int = 128,
        heads: int = 16,
        layers: int = 3,
        feed_forward_width: int = 512,
        dropout: float = 0.2,
    ):
        super().__init__()
        (self.history,) = checks.integers(least=2, history=history)
        two = "so that of two patches one can be hidden"
        self.patch_length = checks.integer("patch_length", patch_length, most=self.history // 2, why=two)
        patch_count = self.history // self.patch_length
        hidden_share = checks.number("mask_ratio", mask_ratio, above=0, below=1)
        self.visible = math.floor(patch_count * (1 - hidden_share) + 1e-9)  # 5 (1 - 0.8) is 0.9999..
        if self.visible in (0, patch_count):
            raise ValueError(f"mask_ratio must hide some of {patch_count} patches, not all; {mask_ratio} does not")
        self.encoder = Encoder(patch_count, self.patch_length, width, heads, layers, feed_forward_width, dropout)
        self.head = nn.Linear(int(width), self.patch_length)

    def forward(self, history: Tensor, generator: torch.Generator | None = None) -> MaskedOutput:
        checks.history(history, self.history, self.head.weight)
        scaled, _, _ = normalise(history)
        whole = patches(scaled.mT, self.patch_length, self.patch_length)  # [batch, variable, patch, patch_length]
        mask = random_mask(whole.shape[:3], self.visible, generator).to(whole.device)  # [batch, variable, patch]
        visible = whole.masked_fill(mask[..., None], 0)
        tokens, _ = self.encoder(visible.flatten(0, 1))  # [batch * variable, patch, width]
        return MaskedOutput(reconstruction=self.head(tokens).view_as(whole), patches=whole, mask=mask)


def masked_loss(output: MaskedOutput, target: Tensor | None = None) -> LossTerms:
    """L = the mean over the masked patches of their mean squared error; the visible ones carry no loss.

    output: of MaskedPatchTST. target: not used; with it `fit` can call this like any other loss.
    Term: "reconstruction". Raises TypeError, ValueError. Source: the paper, section 3.2.
    """
    checks.instance("output", output, MaskedOutput, "what a MaskedPatchTST returned")
    checks.alike("output.reconstruction", output.reconstruction, "output.patches", output.patches)
    checks.bool_mask("output.mask", output.mask, "[batch, variable, patch]", output.patches.shape[:-1])
    error = (output.reconstruction - output.patches).square().mean(-1)  # [batch, variable, patch]
    return LossTerms.of(reconstruction=error.where(output.mask, 0).sum() / output.mask.sum())


def masked_score(model: MaskedPatchTST, windows: Windows, seed: int = 0, batch_size: int = 256) -> float:
    """The masked loss over all windows, in eval mode, with the same masks at every call: a score for `fit`.

    Raises TypeError, ValueError.
    """
    checks.instance("model", model, MaskedPatchTST, "a MaskedPatchTST")
    checks.instance("windows", windows, Windows, "Windows, as `prepare` returns them")
    model = copy.deepcopy(model).eval()  # the model itself stays in the mode that it is in
    batch_size = checks.integer("batch_size", batch_size)
    generator = torch.Generator().manual_seed(checks.integer("seed", seed, least=0))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(windows), batch_size):
            history, _ = windows[start : start + batch_size]
            history = history.to(model.head.weight)
            total += masked_loss(model(history, generator)).total.item() * len(history)  # as many masked in each window
    return total / len(windows)
