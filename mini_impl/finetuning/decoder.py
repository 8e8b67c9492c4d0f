"""The language model once more, laid out for speed: one new token a row, many steps, no gradient.

`generate` is what it is for. What it computes is what `LanguageModel.hidden` computes with a cache.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl.finetuning.language_model import Cache, LanguageModel, rotate, rotations

GROWTH = 16  # places that the cache grows by: it is copied seldom, and little of it is empty


class Decoder:
    """What the head reads at each row's next token, one token a row at a time.

    For so little work a call costs more than its arithmetic, so there are few: rotations are prepared for all steps,
    matrices with one input stand side by side, with the scale of the normalisation before them in them, and the queries
    that share a key are one matrix.
    cache: of the prompts. attention_mask: bool [row, time], False for their padding. steps: how many tokens come at
    most.
    """

    def __init__(self, model: LanguageModel, cache: Cache, attention_mask: Tensor, steps: int):
        attention, weight = model.blocks[0].attention, model.embedding.weight
        self.heads, self.key_value_heads, self.head_dim = attention.heads, attention.key_value_heads, attention.head_dim
        self.embedding, self.scale = weight, model.norm.weight
        self.blocks = [
            (
                _matrix(block.attention.query, block.attention.key, block.attention.value)
                * block.attention_norm.weight,  # [(heads + 2 key_value_heads) x head_dim, width]
                _matrix(block.attention.output).T.contiguous(),  # [heads x head_dim, width]
                _matrix(block.feed_forward.gate, block.feed_forward.up)
                * block.feed_forward_norm.weight,  # [2 x feed_forward_width, width]
                _matrix(block.feed_forward.down).T.contiguous(),  # [feed_forward_width, width]
            )
            for block in model.blocks
        ]
        exact = torch.promote_types(weight.dtype, torch.float32)
        self.mean = torch.full((weight.shape[1], 1), 1 / weight.shape[1], dtype=exact, device=weight.device)
        self.epsilon = torch.tensor(model.norm.epsilon, dtype=exact, device=weight.device)
        # [block, row, key_value_head, place, head_dim]
        self.keys, self.values = torch.stack(cache.keys), torch.stack(cache.values)
        # Added to the scores of the queries: -inf is not attended to.
        bias = torch.zeros_like(attention_mask, dtype=weight.dtype).masked_fill(~attention_mask, -math.inf)
        self.bias = bias[:, None, None].repeat(1, self.key_value_heads, 1, 1)  # [row, key_value_head, 1, place]
        positions = attention_mask.sum(1, keepdim=True) + torch.arange(steps, device=weight.device)  # [row, step]
        cos, sin = rotations(positions, self.head_dim, model.rope_base, weight.dtype)
        self.rotation = torch.stack([cos[:, 0], sin[:, 0]]).transpose(0, 1)  # [row, cos and sin, step, head_dim]
        self.step, self.place = 0, attention_mask.shape[1]  # of the next token, the second in the cache
        self._grow(-self.place % GROWTH)

    def _grow(self, places: int) -> None:
        """Make room for more tokens, which nobody attends to as long as they are not there."""
        self.keys, self.values = (F.pad(kept, (0, 0, 0, places)) for kept in (self.keys, self.values))
        self.bias = F.pad(self.bias, (0, places), value=-math.inf)

    def branch(self, rows: Tensor) -> None:
        """Go on with these rows: some may be left out, others be there several times."""
        if torch.equal(rows, torch.arange(len(self.bias), device=rows.device)):
            return
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.bias, self.rotation = self.bias[rows], self.rotation[rows]

    @torch.inference_mode()  # a little quicker than no_grad
    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids [row] of the next tokens -> what the head reads, [row, width]."""
        if self.place == self.bias.shape[-1]:
            self._grow(GROWTH)
        self.bias[..., self.place] = 0
        bias = self.bias.flatten(0, 1)  # [row x key_value_head, 1, place]
        rotation = self.rotation[:, :, self.step, None].unbind(1)  # cos and sin, each [row, 1, head_dim]
        vectors = self.embedding[tokens]  # [row, width]
        for (project, output, gate_up, down), keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            # 1. Queries, keys and values of the new token; queries and keys turn by its position.
            heads = F.linear(self._normed(vectors), project).view(len(tokens), -1, self.head_dim)
            turned = rotate(heads[:, : -self.key_value_heads], *rotation)  # [row, heads + key_value_heads, head_dim]
            # 2. Keys and values go into the cache.
            keys[:, :, self.place] = turned[:, self.heads :]  # [row, key_value_head, head_dim]
            values[:, :, self.place] = heads[:, -self.key_value_heads :]
            # 3. Attention: the queries that share a key are the rows of one matrix.
            query = turned[:, : self.heads].reshape(len(bias), -1, self.head_dim)  # [row x key_value_head, query, ..]
            key, value = keys.flatten(0, 1), values.flatten(0, 1)  # [row x key_value_head, place, head_dim]
            attention = torch.baddbmm(bias, query, key.mT, alpha=self.head_dim**-0.5).softmax(-1)  # [.., query, place]
            mixed = torch.bmm(attention, value).view(len(tokens), -1)  # [row, heads x head_dim]
            vectors = torch.addmm(vectors, mixed, output)  # [row, width]
            # 4. The feed-forward.
            gate, up = F.linear(self._normed(vectors), gate_up).chunk(2, dim=-1)  # each [row, feed_forward_width]
            vectors = torch.addmm(vectors, F.silu(gate) * up, down)  # [row, width]
        self.place, self.step = self.place + 1, self.step + 1
        return self._normed(vectors) * self.scale

    def _normed(self, vectors: Tensor) -> Tensor:
        """x / sqrt(mean of x^2 + epsilon): [row, width] -> the same."""
        exact = vectors.to(self.mean.dtype)
        return vectors * torch.addmm(self.epsilon, exact * exact, self.mean).rsqrt().to(vectors.dtype)


def _matrix(*layers: nn.Module) -> Tensor:
    """The matrices of linear layers, or of LoRA's, one below the other: [out features of all, in features]."""
    return torch.cat(
        [
            layer.weight if isinstance(layer, nn.Linear) else layer.merged_weight().to(layer.base.weight.dtype)
            for layer in layers
        ]
    )
