"""iTransformer: each variable is one token; attention mixes variables, the feed-forward network reads their time.

Sources: the documented system "iTransformer"; Liu et al., "iTransformer: Inverted Transformers Are Effective for Time
Series Forecasting", 2024.
"""

from typing import ClassVar, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.forecasting.forecaster import Forecaster
from mini_impl.forecasting.layers import Dropout, EncoderBlock, denormalise, encode, normalise
from mini_impl.losses import LossTerms, _orthogonality, orthogonality


class Output(NamedTuple):
    """What ITransformer returns."""

    prediction: Tensor  # [batch, horizon, variable]
    embedding: Tensor  # [batch, variable, width]: E of the documented loss, each variable's token before any mixing
    attention: Tensor | None = None  # [batch, head, query, key] of the last layer, if return_attention


class ITransformer(Forecaster):
    """Forecast all variables together: their whole pasts are the tokens of a transformer.

    history, horizon: how many steps it sees and forecasts (elsewhere: seq_len, pred_len). width, heads, layers,
    feed_forward_width, dropout: of the transformer (elsewhere: d_model, n_heads, e_layers, d_ff).
    embedding: "mlp", two linear maps history -> width -> width with GELU between them, as documented; "linear", one, as
    in the public code. return_attention: fill Output.attention, the multivariate correlation map.
    model(history [batch, history, variable]) -> Output; any number of variables, in any order.
    Raises TypeError, ValueError. Source: documented steps 1 to 5; each window on its own scale as in the paper, a last
    LayerNorm as in its public code, which also drops out entries of attention maps.
    """

    documented_needs: ClassVar[dict] = {}

    def __init__(
        self,
        history: int,
        horizon: int,
        width: int = 256,
        heads: int = 8,
        layers: int = 2,
        feed_forward_width: int = 256,
        dropout: float = 0.1,
        embedding: str = "mlp",
        return_attention: bool = False,
    ):
        super().__init__()
        history, horizon, width, layers = checks.integers(history=history, horizon=horizon, width=width, layers=layers)
        checks.flags(return_attention=return_attention)
        checks.choice("embedding", embedding, ("mlp", "linear"))
        self.history, self.horizon, self.return_attention = history, horizon, return_attention
        first = nn.Linear(history, width)
        self.embedding = first if embedding == "linear" else nn.Sequential(first, nn.GELU(), nn.Linear(width, width))
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, feed_forward_width, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, horizon)

    def forward(self, history: Tensor) -> Output:
        checks.history(history, self.history, self.projection.weight)
        scaled, mean, std = normalise(history)  # [batch, time, variable]
        embedding = self.embedding(scaled.mT)  # 1. [batch, variable, width]
        # 2. to 4., in each block: attention between variables, LayerNorm of each, feed-forward on each
        tokens, attention = encode(self.blocks, self.dropout(embedding), self.return_attention)  # as the embedding
        forecast = self.projection(self.norm(tokens))  # 5. [batch, variable, horizon]
        return Output(prediction=denormalise(forecast.mT, mean, std), embedding=embedding, attention=attention)


def documented_loss(output: Output, target: Tensor, orthogonality_weight: float = 1e-4, norm: str = "fro") -> LossTerms:
    """L = SmoothL1(y, yhat) + mu ||E'E - I||^2, the second term's mean over the batch.

    SmoothL1 of an error e is e^2/2 where |e| < 1, else |e| - 1/2; its mean over windows, horizon and variables.
    output: of ITransformer; E is output.embedding [batch, variable, width]. target: y, [batch, horizon, variable].
    orthogonality_weight: mu, at least 0. norm: "fro" or "spectral", as losses.orthogonality.
    With fewer variables than features the second term is at least mu (width - variables) in the Frobenius norm.
    Terms: "forecast" and "orthogonality". Raises TypeError, ValueError. Source: the documented loss.
    """
    checks.forecast(output, target, embedding=(("batch", "variable", "width"), None))
    checks.alike("output.embedding[:, 0, 0]", output.embedding[:, 0, 0], "target[:, 0, 0]", target[:, 0, 0])
    checks.not_negative(orthogonality_weight=orthogonality_weight)
    # W'W of NaN has a Frobenius norm, which is NaN; looking for its eigenvalues would crash.
    penalty = _orthogonality if norm == "fro" else orthogonality
    return LossTerms.of(
        forecast=F.smooth_l1_loss(output.prediction, target),
        orthogonality=orthogonality_weight * penalty(output.embedding, norm),
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and variables.

    output: of ITransformer. target: y, [batch, horizon, variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper, implementation details.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))
