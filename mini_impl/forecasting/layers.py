"""Parts that several forecasters share."""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks

# --- averages over time -----------------------------------------------------------------------------------------------


def moving_average(series: Tensor, kernel_size: int) -> Tensor:
    """The average of the k values around each time step; beyond the edges the first and the last value are repeated.

    series: [batch, time, variable]. kernel_size: k, odd, at most time. Returns [batch, time, variable].
    t_t = 1/k sum of x_i from i = t - (k-1)/2 to t + (k-1)/2. Raises TypeError, ValueError.
    Source: the filter of the documented DLinear; its edges, which the text leaves out, as in the paper's public code.
    """
    longer = _repeat_edges(series, "kernel_size", kernel_size)  # [batch, variable, time + k - 1]
    return F.avg_pool1d(longer, kernel_size, stride=1).mT  # [batch, time, variable]


@lru_cache(maxsize=16)
def averaging_matrix(time: int, kernel: int | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A of moving_average(x) = A x: [time, time]. For short series one product with it is faster than averaging.

    kernel: kernel_size, or the weights of weighted_average.

    Every call with the same arguments returns the same tensor: do not write into it.
    """
    with torch.inference_mode(False):  # the matrix outlives the call, and must then serve in training too
        waves = torch.eye(time, dtype=dtype, device=device)[None]
        if isinstance(kernel, int):
            return moving_average(waves, kernel)[0]
        return weighted_average(waves, torch.tensor(kernel, dtype=torch.float64))[0]


def weighted_average(series: Tensor, weights: Tensor) -> Tensor:
    """As moving_average, but t_t = sum_j w_j x_{t+j-m}, j from 0, m the middle offset.

    weights: [offset], an odd number of them, at most as many as there are time steps. Raises TypeError, ValueError.
    """
    checks.look(checks.finite("weights", checks.tensor("weights", weights, "offset")))
    longer = _repeat_edges(series, "the number of weights", len(weights))  # [batch, variable, time + offset - 1]
    alone = longer.flatten(0, 1)[:, None]  # [batch * variable, 1, time + offset - 1]
    averages = F.conv1d(alone, weights.to(series)[None, None])  # [batch * variable, 1, time]
    checks.look(checks.finite("the averages", averages))
    return averages.view(len(series), -1, series.shape[1]).mT  # [batch, time, variable]


def half_weighted(period: int) -> Tensor:
    """Weights of the centred average over one even period: 1/p each, the two ends 1/(2p). Returns [p + 1].

    It removes every wave that repeats after `period` steps; for an even period no plain average of odd length does.
    Raises TypeError, ValueError for an odd period. Source: the "2 x p" average of classical decomposition.
    """
    checks.divides("2", 2, "period", period)
    period = int(period)
    weights = torch.full((period + 1,), 1 / period, dtype=torch.float64)
    weights[0] = weights[-1] = 1 / (2 * period)
    return weights


def _repeat_edges(series: Tensor, size_name: str, size: int) -> Tensor:
    """[batch, time, variable] -> [batch, variable, time + size - 1]: each time step is the middle of `size` steps."""
    checks.look(checks.finite("series", checks.tensor("series", series, "batch", "time", "variable")))
    steps = checks.odd(size_name, size, most=series.shape[1]) // 2
    return F.pad(series.mT, (steps, steps), mode="replicate")


# --- every window on a scale of its own -------------------------------------------------------------------------------


def normalise(series: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Take each variable's mean over the window away and divide by its standard deviation; denormalise undoes it.

    series: [batch, time, variable]. observed: bool, same shape: False where a value is missing; such values count
    neither in mean nor deviation and become 0. A variable without a single value counts as constant.
    Returns (scaled [batch, time, variable], mean [batch, 1, variable], std [batch, 1, variable]):
    scaled = (x - mean) / std, std = sqrt(variance + 1e-5), so that a constant window becomes 0.
    Source: Kim et al., "Reversible Instance Normalization", 2022, without its learned scale; Liu et al.,
    "Non-stationary Transformers", 2022.
    """
    if observed is None:
        variance, mean = torch.var_mean(series, dim=1, correction=0, keepdim=True)  # [batch, 1, variable]
        std = (variance + 1e-5).sqrt()
        return (series - mean) / std, mean, std
    count = observed.sum(1, keepdim=True).clamp(min=1)  # [batch, 1, variable]
    mean = series.where(observed, 0).sum(1, keepdim=True) / count
    mean = mean + (series - mean).where(observed, 0).sum(1, keepdim=True) / count  # rounding: a constant becomes 0
    centred = (series - mean).where(observed, 0)  # [batch, time, variable]
    std = (centred.square().sum(1, keepdim=True) / count + 1e-5).sqrt()
    return centred / std, mean, std


def denormalise(scaled: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """scaled * std + mean: [batch, any time, variable], with the mean and std [batch, 1, variable] of normalise."""
    return scaled * std + mean


# --- tokens -----------------------------------------------------------------------------------------------------------


def patches(series: Tensor, patch_length: int, stride: int) -> Tensor:
    """Cut the last axis into pieces of `patch_length` steps, each beginning `stride` steps after the one before.

    series: [.., time]. Returns [.., patch, patch_length], a view; patch = floor((time - patch_length) / stride) + 1.
    The last patch ends with the series; the first steps, fewer than stride, are left out where they fill no patch.
    Raises TypeError; ValueError, also if the patches would leave out steps between them.
    """
    time = checks.tensor("series", series, ..., "time").shape[-1]
    patch_length = checks.integer("patch_length", patch_length, most=time, why="as there are no more time steps")
    stride = checks.integer("stride", stride, most=patch_length, why="the patch_length, or steps would be skipped")
    return series[..., (time - patch_length) % stride :].unfold(-1, patch_length, stride)


@lru_cache(maxsize=16)
def sinusoids(length: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Fixed positions [length, width]: sin(t / 10000^(2i/width)) in feature 2i, cos of the same in feature 2i + 1.

    Every call with the same arguments returns the same tensor: do not write into it.
    Source: Vaswani et al., "Attention Is All You Need", 2017.
    """
    with torch.inference_mode(False):  # the tensor outlives the call, and must then serve in training too
        time = torch.arange(length, device="cpu")[:, None]  # [length, 1]
        even = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
        angles = time * torch.exp(-math.log(10000) * even / width)  # [length, width / 2]
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]  # [length, width]
        return waves.to(dtype).to(device)  # in this order: not every device knows float64


# --- the transformer's parts ------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """In training set each entry to 0 with probability `rate`, and divide the others by the share that is kept.

    As nn.Dropout, which took a quarter of a training step on the CPU; this takes under half its time: 16 random bits
    decide on an entry, not a whole random number. So the probability is rate, rounded to a multiple of 1/65536.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = checks.number("dropout", rate, least=0, below=1)

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return values
        count = min(round(self.rate * 65536), 65534)
        words = torch.randint(-(2**63), 2**63 - 1, ((values.numel() + 3) // 4,), device=values.device)
        bits = words.view(torch.int16)[: values.numel()].view(values.shape)  # each from -32768 to 32767
        kept = bits.ge_(count - 32768).to(values.dtype)  # 1 with probability 1 - count / 65536, else 0
        return values * kept.mul_(65536 / (65536 - count))


class Attention(nn.Module):
    """softmax(Q K' / sqrt(head_dim)) V in several heads of head_dim = width / heads features each.

    Called with tokens [batch, query, width] alone, they attend to one another; with a context [batch, key, width], to
    that. attention_mask: bool [batch, key], False for keys that nobody attends to.
    Returns (mixed [batch, query, width], map [batch, head, query, key]): the map, each row with sum 1, is None unless
    asked for: of many keys the fused product is quicker without it.
    Source: Vaswani et al., 2017, without the dropout of maps that most public code has.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, width = checks.divides("heads", heads, "width", width), int(width)
        self.projection = nn.Linear(width, 3 * width)  # query, key and value in one product
        self.output = nn.Linear(width, width)

    def forward(
        self,
        tokens: Tensor,
        context: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_map: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = self._project(tokens, context)  # each [batch, head, token, head_dim]
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None]  # [batch, 1, 1, key]
        head_dim = query.shape[-1]
        # Of few keys the map is no larger than the values, and quicker to write down than the fused product is without.
        if return_map or key.shape[2] <= head_dim:
            scores = query @ key.mT / math.sqrt(head_dim)  # [batch, head, query, key]
            if attention_mask is not None:
                scores = scores.masked_fill(~attention_mask, -math.inf)
            weights = scores.softmax(-1)
            mixed = weights @ value  # [batch, head, query, head_dim]
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        mixed = mixed.transpose(1, 2).flatten(2)  # [batch, query, width]
        return self.output(mixed), weights if return_map else None

    def _project(self, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if context is None:
            parts = self.projection(tokens).chunk(3, dim=-1)  # each [batch, token, width]
        else:
            width = tokens.shape[-1]
            weight, bias = self.projection.weight, self.projection.bias  # [3 * width, width], [3 * width]
            query = F.linear(tokens, weight[:width], bias[:width])
            parts = query, *F.linear(context, weight[width:], bias[width:]).chunk(2, dim=-1)
        return tuple(part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)


def feed_forward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    """Two linear maps with GELU between them, applied to each token alone: width -> hidden -> width."""
    (hidden,) = checks.integers(feed_forward_width=hidden)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), Dropout(dropout), nn.Linear(hidden, width))


class EncoderBlock(nn.Module):
    """x <- norm(x + attention(x)); x <- norm(x + feed_forward(x)): normalisation after each sum ("post-norm").

    tokens [batch, token, width] -> (tokens [batch, token, width], map [batch, head, query, key] or None).
    norm: what makes the normalisation from `width`. Source: Vaswani et al., 2017.
    """

    def __init__(self, width: int, heads: int, feed_forward_width: int, dropout: float, norm=nn.LayerNorm):
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = norm(width)
        self.feed_forward = feed_forward(width, feed_forward_width, dropout)
        self.feed_forward_norm = norm(width)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, return_map: bool = False) -> tuple[Tensor, Tensor | None]:
        mixed, attention_map = self.attention(tokens, return_map=return_map)  # [batch, token, width]
        tokens = self.attention_norm(tokens + self.dropout(mixed))
        tokens = self.feed_forward_norm(tokens + self.dropout(self.feed_forward(tokens)))
        return tokens, attention_map


def encode(blocks: nn.ModuleList, tokens: Tensor, return_map: bool = False) -> tuple[Tensor, Tensor | None]:
    """Send tokens [batch, token, width] through EncoderBlocks. Returns them, and the last block's map if asked for."""
    for block in blocks:
        tokens, attention_map = block(tokens, return_map=return_map and block is blocks[-1])
    return tokens, attention_map
