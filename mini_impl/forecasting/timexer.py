"""TimeXer: patches of the series to forecast attend to one another; one token of it asks the other series for help.

Sources: the documented system "TimeXer"; Wang et al., "TimeXer: Empowering Transformers for Time Series Forecasting
with Exogenous Variables", 2024.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.forecasting.forecaster import Forecaster
from mini_impl.forecasting.layers import Attention, Dropout, denormalise, feed_forward, normalise, patches, sinusoids
from mini_impl.losses import LossTerms, _orthogonality


class Layer(nn.Module):
    """One layer: among the tokens of each endogenous variable, from its variable token to the exogenous ones, fusion.

    tokens: [batch, endogenous, patch + 1, width], the variable token last. exogenous: [batch, exogenous, width].
    attention_mask: bool [batch, exogenous], False for variables without a single value. Returns (tokens, as before; the
    cross-attention's map [batch, head, endogenous, exogenous] and the self-attention's [batch * endogenous, head,
    patch + 1, patch + 1], each None unless asked for).
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
        self, tokens: Tensor, exogenous: Tensor, attention_mask: Tensor | None, return_map: bool, return_self_map: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # 2. (patch + 1) x (patch + 1): every token of a variable attends to every other one of it
        flat = tokens.flatten(0, 1)  # [batch * endogenous, patch + 1, width]
        mixed, self_attention = self.self_attention(flat, return_map=return_self_map)
        tokens = self.self_norm(tokens + self.dropout(mixed.view_as(tokens)))
        # 3. 1 x C: the variable token attends to the exogenous variables
        variable = tokens[:, :, -1]  # [batch, endogenous, width]
        helped, attention = self.cross_attention(variable, exogenous, attention_mask, return_map)
        variable = self.cross_norm(variable + self.dropout(helped))
        # 4. fusion: what the variable token learnt goes back among the patches
        tokens = torch.cat([tokens[:, :, :-1], variable[:, :, None]], dim=2)  # [batch, endogenous, patch + 1, width]
        tokens = self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))
        return tokens, attention, self_attention


class Output(NamedTuple):
    """What TimeXer returns."""

    prediction: Tensor  # [batch, horizon, endogenous variable]
    # one matrix [.., row, column] a layer, if return_attention: W_l of the documented loss
    cross_attention: tuple[Tensor, ...] | None = None
    # one map [batch, endogenous, head, patch + 1, patch + 1] a layer, the variable token last, if return_self_attention
    self_attention: tuple[Tensor, ...] | None = None


class TimeXer(Forecaster):
    """Forecast the endogenous variables; the exogenous ones help, and are not forecast.

    history, horizon: how many steps it sees and forecasts (elsewhere: seq_len, pred_len). variables: how many series
    the history holds.
    endogenous: the index or indices of those to forecast (negative: from the end); the others are exogenous. None: all
    are endogenous, and each of them is exogenous to all, itself too, as where the public code is multivariate.
    patch_length: of the patches, which end with the history; its first steps, fewer than that, may be in none.
    width, heads, layers, feed_forward_width, dropout: of the transformer (elsewhere: d_model, n_heads, e_layers, d_ff).
    variable_token: "series", an embedding of the variable's whole past, as documented; "learned", one free parameter
    for each endogenous variable, the same for every window, as published.
    return_attention: fill Output.cross_attention. attention_form: what it holds. "maps": the attention of each head,
    [batch, head, endogenous, exogenous]; "projections": the matrices of the cross-attention's query, key and value,
    [3, width, width]. return_self_attention: fill Output.self_attention.

    model(history [batch, history, variable], exogenous=None, exogenous_mask=None) -> Output.
    exogenous: more exogenous series, [batch, time, variable]; time at most history: those that begin later are aligned
    at the end. They are put on a scale of their own, so marks of the calendar, whose level is what they say, do not
    belong here. exogenous_mask: bool, same shape; False where a value is missing (NaN is allowed there). A series
    without a single value in a window gets no attention there; each window needs one exogenous series with a value.
    Raises TypeError, ValueError. Source: documented steps 1 to 4. What the text leaves out (each window on its own
    scale, positions of patches, a last LayerNorm) as in the paper's public code, which also drops out entries of
    attention maps and of the forecast.
    """

    documented_needs: ClassVar[dict] = {"return_attention": True}

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
        return_self_attention: bool = False,
    ):
        super().__init__()
        history, horizon, variables = checks.integers(history=history, horizon=horizon, variables=variables)
        width, layers = checks.integers(width=width, layers=layers)
        patch_length = checks.integer("patch_length", patch_length, most=history, why="the history")
        checks.choice("variable_token", variable_token, ("series", "learned"))
        checks.choice("attention_form", attention_form, ("maps", "projections"))
        checks.flags(return_attention=return_attention, return_self_attention=return_self_attention)
        self.return_self_attention = return_self_attention
        self.history, self.horizon, self.variables, self.patch_length = history, horizon, variables, patch_length
        self.return_attention, self.attention_form = return_attention, attention_form
        every = range(variables)
        self.endogenous = list(every if endogenous is None else checks.indices("endogenous", endogenous, variables))
        self.exogenous = [i for i in every if endogenous is None or i not in self.endogenous]
        # The same on the device; no part of the weights.
        self.register_buffer("endogenous_index", torch.tensor(self.endogenous), persistent=False)
        self.register_buffer("exogenous_index", torch.tensor(self.exogenous, dtype=torch.long), persistent=False)

        self.patch_embedding = nn.Linear(patch_length, width, bias=False)
        series = variable_token == "series"
        self.variable_embedding = nn.Linear(history, width) if series else None
        self.learned_token = None if series else nn.Parameter(torch.randn(len(self.endogenous), 1, width))
        self.exogenous_embedding = nn.Linear(history, width)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(Layer(width, heads, feed_forward_width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear((history // patch_length + 1) * width, horizon)

    def embed(self, scaled: Tensor) -> Tensor:
        """[batch, history, endogenous] -> tokens [batch, endogenous, patch + 1, width]. Source: documented step 1."""
        series = scaled.mT  # [batch, endogenous, time]
        local = self.patch_embedding(patches(series, self.patch_length, self.patch_length))  # [.., patch, width]
        local = local + sinusoids(*local.shape[2:], local.dtype, local.device)
        if self.learned_token is None:
            whole = self.variable_embedding(series)[:, :, None]  # [batch, endogenous, 1, width]
        else:
            whole = self.learned_token.expand(len(series), -1, -1, -1)
        return self.dropout(torch.cat([local, whole], dim=2))

    def embed_exogenous(
        self, scaled: Tensor, exogenous: Tensor | None, observed: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Every exogenous series as one token: [batch, exogenous, width]; and which have a value, or None for all.

        scaled: [batch, history, exogenous], those that stand in the history. Source: documented step 3.
        """
        attention_mask = None
        if exogenous is not None:
            more, _, _ = normalise(exogenous, observed)  # [batch, time, more]
            more = F.pad(more, (0, 0, self.history - exogenous.shape[1], 0))  # 0 is the mean
            if observed is not None:
                there = observed.new_ones(len(scaled), scaled.shape[2])
                attention_mask = torch.cat([there, observed.any(1)], dim=1)  # [batch, exogenous + more]
            scaled = torch.cat([scaled, more], dim=2)  # [batch, history, exogenous + more]
        return self.dropout(self.exogenous_embedding(scaled.mT)), attention_mask

    def forward(self, history: Tensor, exogenous: Tensor | None = None, exogenous_mask: Tensor | None = None) -> Output:
        checks.history(history, self.history, self.head.weight, variables=self.variables)
        self._check_exogenous(history, exogenous, exogenous_mask)
        scaled, mean, std = normalise(history)  # [batch, history, variable]
        tokens = self.embed(scaled.index_select(2, self.endogenous_index))  # 1. [batch, endogenous, patch + 1, width]
        inside = scaled.index_select(2, self.exogenous_index)  # [batch, history, exogenous]
        others, attention_mask = self.embed_exogenous(inside, exogenous, exogenous_mask)  # [batch, exogenous, width]
        return_maps = self.return_attention and self.attention_form == "maps"
        maps, self_maps = [], []
        for layer in self.layers:  # 2. to 4., encoding
            tokens, attention, own = layer(tokens, others, attention_mask, return_maps, self.return_self_attention)
            maps.append(attention)
            if own is not None:
                self_maps.append(own.unflatten(0, tokens.shape[:2]))
        forecast = self.head(self.norm(tokens).flatten(2))  # 4., decoding: [batch, endogenous, horizon]
        matrices = maps if self.attention_form == "maps" else self.projections()
        mean, std = (level.index_select(2, self.endogenous_index) for level in (mean, std))  # [batch, 1, endogenous]
        return Output(
            prediction=denormalise(forecast.mT, mean, std),
            cross_attention=tuple(matrices) if self.return_attention else None,
            self_attention=tuple(self_maps) if self.return_self_attention else None,
        )

    def _check_exogenous(self, history: Tensor, exogenous, mask) -> None:
        """Raise unless there is an exogenous variable, and those given beside the history fit it, with their mask."""
        if exogenous is None and mask is not None:
            raise ValueError("exogenous_mask needs the exogenous series that it speaks of; got exogenous=None")
        if exogenous is None and not self.exogenous:
            raise ValueError("the history holds no exogenous series: give some, or make the model with endogenous=None")
        if exogenous is None:
            return
        checks.tensor("exogenous", exogenous, "batch", "time", "variable")
        checks.alike("exogenous[:, 0, 0]", exogenous[:, 0, 0], "history[:, 0, 0]", history[:, 0, 0])
        checks.integer("the time steps of exogenous", exogenous.shape[1], most=self.history, why="those of history")
        if mask is not None:
            checks.bool_mask("exogenous_mask", mask, "as exogenous,", exogenous.shape)
            checks.alike("exogenous_mask", mask, "exogenous", exogenous.bool())  # of one device too
            exogenous = exogenous.where(mask, 0)
        some = [] if mask is None or self.exogenous else checks.counted(mask.flatten(1), "exogenous_mask")
        checks.look(checks.finite("exogenous", exogenous), *some)

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
    checks.forecast(output, target, cross_attention=((), "return_attention"))
    checks.instance("output.cross_attention", output.cross_attention, tuple, "a tuple of one matrix a layer")
    for layer, matrix in enumerate(output.cross_attention):
        checks.tensor(f"output.cross_attention[{layer}]", matrix, ..., "row", "column")
    checks.not_negative(orthogonality_weight=orthogonality_weight)
    return LossTerms.of(
        forecast=F.mse_loss(output.prediction, target),
        orthogonality=orthogonality_weight * sum(_orthogonality(matrix) for matrix in output.cross_attention),
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and endogenous variables.

    output: of TimeXer. target: y, [batch, horizon, endogenous variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper's public code.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))
