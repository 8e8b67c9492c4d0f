"""A language model: from the tokens so far to a score for every token that may come next.

One decoder in the style of Llama, in the order in which a token goes through it. With small numbers it is the model
that the chapters train; with those of SmolLM2-135M it computes what SmolLM2 does.
Source: Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023, and what it cites.
"""

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.checkpoint import check_layers, check_weights, load_checkpoint, save_checkpoint


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 + epsilon) times a learned scale, over the last axis: [.., width] -> the same.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, tokens: Tensor) -> Tensor:
        exact = tokens if tokens.dtype.itemsize >= 4 else tokens.float()  # a square is soon beyond half precision
        normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.epsilon)
        return normed.to(tokens.dtype) * self.weight


@lru_cache(maxsize=16)
def _frequencies(head_dim: int, base: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Turns a position, in radians, of each of the head_dim / 2 pairs of features: base^(-2i / head_dim)."""
    exponents = -torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim  # made on the CPU: GPUs may lack float64
    return (base**exponents).to(dtype).to(device)  # [head_dim / 2]


def rotations(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles position * base^(-2i / head_dim) that features i and i + head_dim / 2 turn by.

    positions: whole numbers [batch, time]. Each [batch, 1, time, head_dim]. Angles in float32 at least, as half
    precision cannot count to a thousand.
    """
    exact = dtype if dtype.itemsize >= 4 else torch.float32
    angles = positions[:, None, :, None] * _frequencies(head_dim, base, exact, positions.device)
    angles = torch.cat([angles, angles], dim=-1)  # [batch, 1, time, head_dim]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn features i and i + head_dim / 2 of [batch, head, time, head_dim] by the angle of their position.

    The product of a query and a key then depends on their distance alone.
    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021; the pairs,
    as in public code.
    """
    first, second = vectors.chunk(2, dim=-1)
    return vectors * cos + torch.cat([-second, first], dim=-1) * sin


class Cache:
    """Keys and values of the tokens so far, so that generating the next one does not compute them again.

    keys, values: of each block, [batch, key_value_head, time, head_dim]; empty before the first tokens.
    """

    def __init__(self):
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @property
    def filled(self) -> int:
        """How many tokens are in."""
        return self.keys[0].shape[2] if self.keys else 0

    def extend(self, block: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a block's new keys and values behind those that are in; return all of them."""
        if block == len(self.keys):  # the first tokens
            self.keys.append(keys)
            self.values.append(values)
        else:
            self.keys[block] = torch.cat([self.keys[block], keys], dim=2)
            self.values[block] = torch.cat([self.values[block], values], dim=2)
        return self.keys[block], self.values[block]


class Attention(nn.Module):
    """softmax(Q K' / sqrt(head_dim)) V over the tokens so far, with `heads` queries that share `key_value_heads` keys.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models", 2023.
    """

    def __init__(self, width: int, heads: int, key_value_heads: int):
        super().__init__()
        self.heads, self.key_value_heads, self.head_dim = heads, key_value_heads, width // heads
        self.query = nn.Linear(width, heads * self.head_dim, bias=False)
        self.key = nn.Linear(width, key_value_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, key_value_heads * self.head_dim, bias=False)
        self.output = nn.Linear(heads * self.head_dim, width, bias=False)

    def forward(
        self, tokens: Tensor, rotation: tuple, allowed: Tensor | None, cache: Cache | None, block: int
    ) -> Tensor:
        """[batch, time, width] -> the same. allowed: bool [batch, 1, time, key]; None: each sees all before it."""
        query = rotate(self._split(self.query(tokens), self.heads), *rotation)  # [batch, head, time, head_dim]
        key = rotate(self._split(self.key(tokens), self.key_value_heads), *rotation)  # of key_value_head
        value = self._split(self.value(tokens), self.key_value_heads)  # [batch, key_value_head, time, head_dim]
        causal = allowed is None  # a mask says it itself
        if cache is not None:
            causal = causal and block == len(cache.keys)  # the first tokens; one that comes later alone sees all
            key, value = cache.extend(block, key, value)  # [batch, key_value_head, key, head_dim]
        shared = self.heads > self.key_value_heads  # each key serves heads / key_value_heads queries
        mixed = F.scaled_dot_product_attention(query, key, value, allowed, is_causal=causal, enable_gqa=shared)
        return self.output(mixed.transpose(1, 2).flatten(2))  # [batch, time, width]

    def _split(self, features: Tensor, heads: int) -> Tensor:
        """[batch, time, head x head_dim] -> [batch, head, time, head_dim]."""
        return features.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), each token alone. Source: Shazeer, "GLU Variants Improve Transformer", 2020."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(tokens)) * self.up(tokens))


class Block(nn.Module):
    """x <- x + attention(norm(x)); x <- x + feed_forward(norm(x))."""

    def __init__(self, width: int, heads: int, key_value_heads: int, feed_forward_width: int, epsilon: float):
        super().__init__()
        self.attention_norm = RMSNorm(width, epsilon)
        self.attention = Attention(width, heads, key_value_heads)
        self.feed_forward_norm = RMSNorm(width, epsilon)
        self.feed_forward = FeedForward(width, feed_forward_width)

    def forward(
        self, tokens: Tensor, rotation: tuple, allowed: Tensor | None, cache: Cache | None, block: int
    ) -> Tensor:
        tokens = tokens + self.attention(self.attention_norm(tokens), rotation, allowed, cache, block)
        return tokens + self.feed_forward(self.feed_forward_norm(tokens))


class LanguageModel(nn.Module):
    """Token ids [batch, time] -> logits [batch, time, vocab_size] of the token that comes next.

    vocab_size: how many tokens there are. width: of a token's vector, an even multiple of heads. layers: blocks.
    heads: queries of an attention; key_value_heads: keys and values, a divisor of heads. feed_forward_width: hidden
    width of the feed-forward. rope_base: the longest wavelength of the positions is
    2 pi rope_base^(1 - 2 / head_dim) tokens, head_dim = width / heads. epsilon: of the normalisations. The head is the
    embedding again ("tied"). Raises TypeError, ValueError.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        key_value_heads: int = 2,
        feed_forward_width: int = 128,
        rope_base: float = 10000.0,
        epsilon: float = 1e-5,
    ):
        super().__init__()
        vocab_size, layers, width = checks.integers(vocab_size=vocab_size, layers=layers, width=width)
        heads, feed_forward_width = checks.integers(heads=heads, feed_forward_width=feed_forward_width)
        key_value_heads = checks.divides("key_value_heads", key_value_heads, "heads", heads)
        checks.divides("2 * heads", 2 * heads, "width", width)  # twice, since positions turn pairs of features
        checks.number("rope_base", rope_base, above=1)
        checks.positive(epsilon=epsilon)
        self.settings = {
            "vocab_size": vocab_size,
            "width": width,
            "layers": layers,
            "heads": heads,
            "key_value_heads": key_value_heads,
            "feed_forward_width": feed_forward_width,
            "rope_base": float(rope_base),
            "epsilon": float(epsilon),
        }
        self.rope_base = rope_base
        self.tokenizer: str | None = None  # which of the package's it was trained with, where that is known
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, key_value_heads, feed_forward_width, epsilon) for _ in range(layers)
        )
        self.norm = RMSNorm(width, epsilon)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # sums over the blocks keep their size, as in GPT-2
                deep = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if deep else 0.02)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Logits [batch, time, vocab_size]. The arguments are those of `hidden`."""
        return self.hidden(tokens, attention_mask, cache) @ self.embedding.weight.T

    def hidden(self, tokens: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """What the head reads: [batch, time, width]; the logits are its products with the rows of the embedding.

        tokens: ids, whole numbers [batch, time]. With a cache: those that come after what is in it; it is extended.
        attention_mask: bool [batch, key], with a column for every token so far; False for padding, which nobody attends
        to and which is not counted in the positions, so that a padded row gives what it gives alone. None: no padding.
        Raises TypeError, ValueError for what is no token id, for a row of padding alone, and for other rows than those
        of the cache.
        """
        checks.look(*self._requirements(tokens, attention_mask, cache))
        return self._hidden(tokens, attention_mask, cache)

    def _requirements(
        self, tokens, attention_mask=None, cache: Cache | None = None, name: str = "tokens"
    ) -> list[checks.Requirement]:
        """Raise unless the arguments of `hidden` fit; return what must hold of the numbers in them."""
        checks.token_ids(name, tokens, "batch", "time")
        batch, time = tokens.shape
        if cache is not None and cache.keys:
            time += cache.filled
            if len(cache.keys[0]) != batch:
                raise ValueError(f"{name} must have the {len(cache.keys[0])} rows of the cache; got {batch}")
        if attention_mask is not None:
            checks.bool_mask("attention_mask", attention_mask, "[batch, token so far]", (batch, time))
        return [
            checks.known_ids(name, tokens, self.embedding.num_embeddings),
            *([] if attention_mask is None else checks.counted(attention_mask, f"attention_mask of {name}")),
        ]

    def _hidden(self, tokens: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        before, time = 0 if cache is None else cache.filled, tokens.shape[1]
        if attention_mask is None:
            positions = torch.arange(before, before + time, device=tokens.device)[None]  # [1, time]
            allowed = None if before == 0 or time == 1 else _causal(time, before, tokens.device)[None, None]
        else:
            positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, before:]  # [batch, time]
            causal = _causal(time, before, tokens.device)  # [time, key]
            allowed = causal & attention_mask[:, None, None]  # [batch, 1, time, key]
            allowed = allowed | causal.triu(before)  # padding: itself, as it needs one
        vectors = self.embedding(tokens.long())  # [batch, time, width]
        rotation = rotations(positions, self.blocks[0].attention.head_dim, self.rope_base, vectors.dtype)
        for number, block in enumerate(self.blocks):
            vectors = block(vectors, rotation, allowed, cache, number)
        return self.norm(vectors)


@lru_cache(maxsize=16)
def _causal(time: int, before: int, device: torch.device) -> Tensor:
    """bool [time, before + time]: each token sees itself and those before it."""
    return torch.ones(time, before + time, dtype=torch.bool, device=device).tril(before)


# --- weights on disk --------------------------------------------------------------------------------------------------

# What Hugging Face's Llama calls our parts. Adapters on disk have its names too, as PEFT writes them.
HUGGING_FACE = {
    "embedding": "embed_tokens",
    "blocks": "layers",
    "attention": "self_attn",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "output": "o_proj",
    "feed_forward": "mlp",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "attention_norm": "input_layernorm",
    "feed_forward_norm": "post_attention_layernorm",
}


def hugging_face_name(name: str) -> str:
    """What Hugging Face calls a part of ours: blocks.0.attention.query -> model.layers.0.self_attn.q_proj."""
    return ".".join(["model", *(HUGGING_FACE.get(part, part) for part in name.split("."))])


def save_language_model(model: LanguageModel, path: Path | str) -> None:
    """Write a model's settings, weights, and the name of its tokenizer, to one safetensors file, atomically."""
    checks.instance("model", model, LanguageModel, "a LanguageModel")
    state = {"language model": model.settings, "tokenizer": model.tokenizer}
    save_checkpoint(path, model.state_dict(), state)


def load_language_model(path: Path | str) -> LanguageModel:
    """Read what save_language_model wrote, in eval mode. Raises OSError; ValueError for another file."""
    tensors, state = load_checkpoint(path)
    if "language model" not in state:
        raise ValueError(f"{path} holds no language model that save_language_model wrote")
    check_layers(path, tensors, state["language model"])
    with torch.device("meta"):  # nothing is drawn at random, and sizes that the file does not fill take no memory
        model = LanguageModel(**state["language model"])
    check_weights(path, tensors, model)
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = state.get("tokenizer")
    return model.eval()
