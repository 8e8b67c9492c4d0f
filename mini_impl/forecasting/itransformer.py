"""iTransformer: each variable is one token; attention mixes variables, the feed-forward network reads their time.

Sources: the documented system "iTransformer"; Liu et al., "iTransformer: Inverted Transformers Are Effective for Time
Series Forecasting", 2024.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.forecasting.layers import Dropout, EncoderBlock, denormalise, normalise
from mini_impl.losses import LossTerms, orthogonality


class Output(NamedTuple):
    """What ITransformer returns."""

    prediction: Tensor  # [batch, horizon, variable]
    embedding: Tensor  # [batch, variable, width]: E of the documented loss, each variable's token before any mixing
    attention: Tensor | None = None  # [batch, head, query, key] of the last layer, if return_attention


class ITransformer(nn.Module):
    """Forecast all variables together: their whole pasts are the tokens of a transformer.

    history, horizon: how many steps it sees and forecasts. width, heads, layers, feed_forward_width, dropout: of the
    transformer. embedding: "linear", one linear map history -> width, as in the public code; "mlp", two with GELU
    between them, as the text has it. return_attention: fill Output.attention, the multivariate correlation map.
    model(history [batch, history, variable]) -> Output; any number of variables, in any order.
    Raises TypeError, ValueError. Source: documented steps 1 to 5; each window on its own scale as in the paper.
    """

    def __init__(
        self,
        history: int,
        horizon: int,
        width: int = 256,
        heads: int = 8,
        layers: int = 2,
        feed_forward_width: int = 256,
        dropout: float = 0.1,
        embedding: str = "linear",
        return_attention: bool = False,
    ):
        super().__init__()
        self.history = checks.integer("history", history)
        self.horizon = checks.integer("horizon", horizon)
        self.return_attention = return_attention
        self.embedding = nn.Linear(history, checks.integer("width", width))
        checks.choice("embedding", embedding, ("linear", "mlp"))
        if embedding == "mlp":
            self.embedding = nn.Sequential(self.embedding, nn.GELU(), nn.Linear(width, width))
        self.dropout = Dropout(dropout)
        checks.integer("feed_forward_width", feed_forward_width)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, heads, feed_forward_width, dropout) for _ in range(checks.integer("layers", layers))
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, horizon)

    def forward(self, history: Tensor) -> Output:
        checks.history(history, self.history, self.projection.weight)
        scaled, mean, std = normalise(history)
        embedding = self.embedding(scaled.mT)  # [batch, variable, width]
        tokens = self.dropout(embedding)
        for block in self.blocks:
            tokens, attention = block(tokens, return_map=self.return_attention and block is self.blocks[-1])
        forecast = self.projection(self.norm(tokens))  # [batch, variable, horizon]
        return Output(
            prediction=denormalise(forecast.mT, mean, std),
            embedding=embedding,
            attention=attention,
        )


def documented_loss(output: Output, target: Tensor, orthogonality_weight: float = 1e-4, norm: str = "fro") -> LossTerms:
    """L = SmoothL1(y, yhat) + mu ||E'E - I||^2, the second term's mean over the batch.

    SmoothL1 of an error e is e^2/2 where |e| < 1, else |e| - 1/2; its mean over windows, horizon and variables.
    output: of ITransformer; E is output.embedding [batch, variable, width]. target: y, [batch, horizon, variable].
    orthogonality_weight: mu, at least 0. norm: "fro" or "spectral", as losses.orthogonality.
    With fewer variables than features the second term is at least mu (width - variables) in the Frobenius norm.
    Terms: "forecast" and "orthogonality". Raises TypeError, ValueError. Source: the documented loss.
    """
    checks.forecast(output, target)
    checks.number("orthogonality_weight", orthogonality_weight, least=0)
    return LossTerms.of(
        forecast=F.smooth_l1_loss(output.prediction, target),
        orthogonality=orthogonality_weight * orthogonality(output.embedding, norm),
    )


def published_loss(output: Output, target: Tensor) -> LossTerms:
    """L = mean of (y - yhat)^2 over windows, horizon and variables.

    output: of ITransformer. target: y, [batch, horizon, variable]. Term: "forecast".
    Raises TypeError, ValueError. Source: the paper, implementation details.
    """
    checks.forecast(output, target)
    return LossTerms.of(forecast=F.mse_loss(output.prediction, target))
