"""TimeXer: patches of the series to forecast attend to one another; one token of it asks the other series for help.

Sources: the documented system "TimeXer"; Wang et al., "TimeXer: Empowering Transformers for Time Series Forecasting
with Exogenous Variables", 2024.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.forecasting.layers import Attention, Dropout, denormalise, feed_forward, normalise, patches, sinusoids
from mini_impl.losses import LossTerms, orthogonality


class Layer(nn.Module):
    """One layer: among the tokens of each endogenous variable, from its variable token to the exogenous ones, fusion.

    tokens: [batch, endogenous, patch + 1, width], the variable token last. exogenous: [batch, exogenous, width].
    present: bool [batch, exogenous], False for variables without a single value. Returns (tokens, as before; the
    cross-attention's map [batch, head, endogenous, exogenous], or None unless asked for).
    Source: documented steps 2 to 4.
    """

    def __init__(self, width: int, heads: int, feed_forward_width: int, dropout: float):
        super().__init__()
        self.self_attention = Attention(width, heads)
        self.self_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward = feed_forward(width, feed_forward_width, dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = Dropout(dropout)

    def forward(
        self, tokens: Tensor, exogenous: Tensor, present: Tensor | None, return_map: bool
    ) -> tuple[Tensor, Tensor | None]:
        # 2. (patch + 1) x (patch + 1): every token of a variable attends to every other one of it
        mixed, _ = self.self_attention(tokens.flatten(0, 1))
        tokens = self.self_norm(tokens + self.dropout(mixed.view_as(tokens)))
        # 3. 1 x C: the variable token attends to the exogenous variables
        variable = tokens[:, :, -1]  # [batch, endogenous, width]
        helped, attention = self.cross_attention(variable, exogenous, present, return_map)
        variable = self.cross_norm(variable + self.dropout(helped))
        # 4. fusion: what the variable token learnt goes back among the patches
        tokens = torch.cat([tokens[:, :, :-1], variable[:, :, None]], dim=2)
        tokens = self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))
        return tokens, attention


class Output(NamedTuple):
    """What TimeXer returns."""

    prediction: Tensor  # [batch, horizon, endogenous variable]
    # one matrix [.., row, column] a layer, if return_attention: W_l of the documented loss
    cross_attention: tuple[Tensor, ...] | None = None


class TimeXer(nn.Module):
    """Forecast the endogenous variables; the exogenous ones help, and are not forecast.

    history, horizon: how many steps it sees and forecasts. variables: how many series the history holds.
    endogenous: the index or indices of those to forecast (negative: from the end); the others are exogenous. None: all
    are endogenous, and each of them is exogenous to all, itself too, as where the public code is multivariate.
    patch_length: divides history. width, heads, layers, feed_forward_width, dropout: of the transformer.
    variable_token: "series", an embedding of the variable's whole past, as documented; "learned", one free parameter
    for each endogenous variable, the same for every window, as published.
    return_attention: fill Output.cross_attention. attention_form: what it holds. "maps": the attention of each head,
    [batch, head, endogenous, exogenous]; "projections": the matrices of the cross-attention's query, key and value,
    [3, width, width].

    model(history [batch, history, variable], exogenous=None, exogenous_mask=None) -> Output.
    exogenous: more exogenous series, [batch, time, variable]; time at most history: those that begin later are aligned
    at the end. exogenous_mask: bool, same shape; False where a value is missing (NaN is allowed there). A series
    without a single value in a window gets no attention there; each window needs one exogenous series with a value.
    Raises TypeError, ValueError. Source: documented steps 1 to 4. What the text leaves out (each window on its own
    scale, positions of patches, a last LayerNorm) as in the paper's public code.
    """

    def __init__(
        self,
        history: int,
        horizon: int,
        variables: int,
        endogenous: int | Sequence[int] | None = None,
        patch_length: int = 16,
        width: int = 256,
        heads: int = 8,
        layers: int = 1,
        feed_forward_width: int = 2048,
        dropout: float = 0.1,
        variable_token: str = "series",
        return_attention: bool = False,
        attention_form: str = "maps",
    ):
        super().__init__()
        self.history = checks.integer("history", history)
        self.horizon = checks.integer("horizon", horizon)
        self.variables = checks.integer("variables", variables)
        every = range(variables)
        self.endogenous = list(every if endogenous is None else checks.indices("endogenous", endogenous, variables))
        self.exogenous = [i for i in every if endogenous is None or i not in self.endogenous]
        self.patch_length = checks.divides("patch_length", patch_length, "history", history)
        checks.choice("variable_token", variable_token, ("series", "learned"))
        checks.choice("attention_form", attention_form, ("maps", "projections"))
        self.return_attention = checks.flag("return_attention", return_attention)
        self.attention_form = attention_form

        self.patch_embedding = nn.Linear(patch_length, checks.integer("width", width), bias=False)
        series = variable_token == "series"
        self.variable_embedding = nn.Linear(history, width) if series else None
        self.learned_token = None if series else nn.Parameter(torch.randn(len(self.endogenous), 1, width))
        self.exogenous_embedding = nn.Linear(history, width)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(width, heads, feed_forward_width, dropout) for _ in range(checks.integer("layers", layers))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear((history // patch_length + 1) * width, horizon)

    def embed(self, scaled: Tensor) -> Tensor:
        """[batch, history, endogenous] -> tokens [batch, endogenous, patch + 1, width]. Source: documented step 1."""
        series = scaled.mT  # [batch, endogenous, time]
        local = self.patch_embedding(patches(series, self.patch_length, self.patch_length))
        local = local + sinusoids(*local.shape[2:], local.dtype, local.device)
        if self.learned_token is None:
            whole = self.variable_embedding(series)[:, :, None]
        else:
            whole = self.learned_token.expand(len(series), -1, -1, -1)
        return self.dropout(torch.cat([local, whole], dim=2))

    def embed_exogenous(
        self, scaled: Tensor, exogenous: Tensor | None, observed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Every exogenous series as one token: [batch, exogenous, width]; and which have a value, or None for all.

        scaled: [batch, history, exogenous], those that stand in the history. Source: documented step 3.
        """
        present = None
        if exogenous is not None:
            more, _, _ = normalise(exogenous, observed)
            more = F.pad(more, (0, 0, self.history - exogenous.shape[1], 0))  # 0 is the mean
            if observed is not None:
                there = observed.new_ones(len(scaled), scaled.shape[2])
                present = torch.cat([there, observed.any(1)], dim=1)
            scaled = torch.cat([scaled, more], dim=2)
        return self.dropout(self.exogenous_embedding(scaled.mT)), present

    def forward(self, history: Tensor, exogenous: Tensor | None = None, exogenous_mask: Tensor | None = None) -> Output:
        checks.history(history, self.history, self.head.weight, variables=self.variables)
        checks.exogenous(history, exogenous, exogenous_mask, len(self.exogenous))
        scaled, mean, std = normalise(history)
        tokens = self.embed(scaled[..., self.endogenous])  # 1. [batch, endogenous, patch + 1, width]
        others, present = self.embed_exogenous(scaled[..., self.exogenous], exogenous, exogenous_mask)
        return_maps = self.return_attention and self.attention_form == "maps"
        maps = []
        for layer in self.layers:
            tokens, attention = layer(tokens, others, present, return_maps)
            maps.append(attention)
        forecast = self.head(self.norm(tokens).flatten(2))  # 4., decoding: [batch, endogenous, horizon]
        matrices = maps if self.attention_form == "maps" else self.projections()
        return Output(
            prediction=denormalise(forecast.mT, mean[..., self.endogenous], std[..., self.endogenous]),
            cross_attention=tuple(matrices) if self.return_attention else None,
        )

    def projections(self) -> list[Tensor]:
        """Each layer's matrices of query, key and value in the cross-attention: [3, width, width]."""
        return [layer.cross_attention.projection.weight.unflatten(0, (3, -1)) for layer in self.layers]


def documented_loss(output: Output, target: Tensor, orthogonality_weight: float = 0.01) -> LossTerms:
    """L = mean of (y - yhat)^2 + lambda sum_l ||W_l'W_l - I||_F^2, the latter's mean over the leading axes of W_l.

    output: of a TimeXer made with return_attention=True; W_l is output.cross_attention[l].
    target: y, [batch, horizon, endogenous variable]. orthogonality_weight: lambda, at least 0.
    For attention maps of one endogenous and C exogenous variables each layer's norm is at least C - 1.
    Terms: "forecast" and "orthogonality". Raises TypeError, ValueError. Source: the documented loss.
    """
    checks.forecast(output, target, "cross_attention")
    checks.matrices("output.cross_attention", output.cross_attention, "return_attention=True")
    checks.number("orthogonality_weight", orthogonality_weight, least=0)
    return LossTerms.of(
        forecast=F.mse_loss(output.prediction, target),
        orthogonality=orthogonality_weight * sum(orthogonality(matrix) for matrix in output.cross_attention),
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and endogenous variables.

    output: of TimeXer. target: y, [batch, horizon, endogenous variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper's public code.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))
