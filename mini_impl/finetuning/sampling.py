"""Sampling: answers from a language model, a token at a time, and how likely each token of them was.

In the order in which a token comes about: its distribution is truncated, a uniform number picks from it, and the model
reads it to say what comes next. Policy methods need the log-probability of every token under the distribution that it
was really drawn from, so `generate` records it and `score` computes the same again, with a gradient.
Sources: the documented GRPO (candidates with the probabilities under the old policy); Fan et al., "Hierarchical Neural
Story Generation", 2018 (top-k); Holtzman et al., "The Curious Case of Neural Text Degeneration", 2020 (top-p).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mini_impl import checks
from mini_impl.finetuning.language_model import Cache, LanguageModel, rotate, rotations
from mini_impl.finetuning.policy import token_logprobs
from mini_impl.losses import NonFiniteLoss


class Rollout(NamedTuple):
    """Prompts and what was sampled after them."""

    prompt: Tensor  # ids [sequence, prompt time], padded on the left
    present: Tensor  # bool, the same shape: False for the padding
    completion: Tensor  # ids [sequence, token]; after the stop token, stop tokens
    mask: Tensor  # bool, the same shape: True up to and with the stop token
    logprobs: Tensor  # [sequence, token], in nats, under the distribution that was sampled; 0 where mask is False


def truncate(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits of the distribution to sample from: divided by the temperature, -inf for the tokens that are left out.

    logits: [.., vocabulary]; half precision is left for float32. temperature: at least 0; 0 leaves the most likely
    token alone, the first of several. top_k: leave the k most likely tokens. top_p: leave as many of the most likely
    tokens as it takes to reach this probability, of what top_k left; more than 0, at most 1. Tokens as likely as the
    last one that stays do stay. Raises TypeError, ValueError.
    """
    checks.tensor("logits", logits, ..., "vocabulary", finite=False)
    checks.truncation(temperature, top_k, top_p, logits.shape[-1])
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
    logits = logits if temperature == 1 else logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered = logits.sort(-1, descending=True).values
        probabilities = ordered.softmax(-1)
        reached = probabilities.cumsum(-1) - probabilities  # by the more likely ones: 0 for the first
        count = (reached < top_p).sum(-1, keepdim=True).clamp(min=1)
        logits = logits.masked_fill(logits < ordered.gather(-1, count - 1), -math.inf)
    return logits


def uniforms(seed: int, rows: Sequence[int], count: int) -> np.ndarray:
    """`count` uniform numbers for each row: [row, count], whole multiples of 2^-23 in [0, 1), exact in float32.

    They depend on the seed and the number of the row alone, so that a row draws the same whatever is beside it. The
    generator counts and mixes, without a state to carry, and makes all of them at once.
    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (SplitMix64).
    """
    seed, rows = np.array([seed], dtype=np.uint64), np.array(rows, dtype=np.uint64)
    start = _mix(_mix(seed) + rows)[:, None]
    return (_mix(start + _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)) >> np.uint64(41)) * 2.0**-23


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd


def _mix(bits: np.ndarray) -> np.ndarray:
    """A permutation of the 64-bit numbers in which every bit depends on every other one."""
    bits = bits + _GOLDEN  # so that 0 does not stay 0
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    stop: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> Rollout:
    """Sample a completion of every prompt, up to and with the stop token, of at most max_tokens tokens.

    prompts: ids, of any lengths but 0. stop: the id that ends a completion, and pads. temperature, top_k, top_p: as in
    `truncate`. seed: a whole number from 0 to 2^64 - 1. rows: the number of each prompt's random stream, that of (seed,
    number); None: 0, 1, .. A row gives the same tokens alone and in a batch, but where rounding decides.
    The model's mode and gradients stay as they are. Rollout.completion is as long as the longest one.
    Raises TypeError, ValueError; NonFiniteLoss if the model's logits make no distribution (NaN or +inf among them).
    """
    vocabulary = model.embedding.num_embeddings
    checks.prompts("prompts", prompts, vocabulary)
    checks.integer("max_tokens", max_tokens)
    checks.integer("stop", stop, least=0, most=vocabulary - 1, why="the last token id")
    checks.truncation(temperature, top_k, top_p, vocabulary)
    checks.streams(seed, rows, len(prompts))
    in_training = [module for module in model.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        rollout = _generate(model, prompts, max_tokens, stop, (temperature, top_k, top_p), seed, rows)
    finally:
        for module in in_training:
            module.training = True
    checks.all_finite("log-probabilities of what was sampled", rollout.logprobs, NonFiniteLoss)
    return rollout


def _generate(model, prompts, max_tokens, stop, truncation, seed, rows) -> Rollout:
    """What generate does, with a model in eval mode and arguments that are checked.

    Rows that are the same so far are one to the model, a node: the answers to one prompt (a group of GRPO) begin as
    one, and a row that has stopped belongs to none.
    """
    weight, vocabulary = model.embedding.weight, model.embedding.num_embeddings
    nodes = {prompt: number for number, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    node = torch.tensor([nodes[tuple(prompt)] for prompt in prompts], device=weight.device)  # of each row at work
    row = torch.arange(len(prompts), device=weight.device)  # where it stands in the batch
    time = max(map(len, nodes))
    prompt = torch.tensor([[stop] * (time - len(ids)) + list(ids) for ids in nodes], device=weight.device)
    present = torch.tensor([[False] * (time - len(ids)) + [True] * len(ids) for ids in nodes], device=weight.device)
    cache = Cache(model, len(nodes), time)
    hidden = model.hidden(prompt, None if present.all() else present, cache)[:, -1]  # [node, width]
    decoder = Decoder(model, cache, present, max_tokens)
    prompt, present = prompt[node], present[node]

    draws = uniforms(seed, range(len(prompts)) if rows is None else rows, max_tokens)
    draws = torch.tensor(draws, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    completion = torch.full((len(prompts), max_tokens), stop, device=weight.device)
    chosen = torch.ones_like(draws)  # the probability of each token
    for step in range(max_tokens):
        probabilities = truncate(hidden @ weight.T, *truncation).softmax(-1)
        shares = probabilities.cumsum(-1)[node]  # [row, vocabulary]: a line from 0 to 1, a stretch for each token
        token = (shares <= draws[row, step, None] * shares[:, -1:]).sum(-1)  # the one in whose stretch the draw lies
        completion[row, step] = token
        chosen[row, step] = probabilities[node, token]
        going = token != stop
        if step == max_tokens - 1 or not going.any():
            break
        row, said = row[going], (node * vocabulary + token)[going]
        said, node = said.unique(return_inverse=True)
        decoder.branch(said // vocabulary)
        hidden = decoder(said % vocabulary)
    completion, logprobs = completion[:, : step + 1], chosen[:, : step + 1].log()
    stopped = completion == stop
    mask = stopped.cumsum(1) - stopped.long() == 0  # no stop token before it
    return Rollout(prompt, present, completion, mask, logprobs)


class Decoder:
    """A model's arithmetic for one new token a row: what `model.hidden` computes with a cache, laid out for speed.

    For so little work a call costs more than its arithmetic, so there are few: rotations and padding are prepared for
    all steps, matrices with one input stand side by side, with the scale of the normalisation before them in them, and
    the queries that share a key are one matrix.
    cache: of the prompts. present: bool [row, time], False for their padding. steps: how many tokens come at most.
    """

    def __init__(self, model: LanguageModel, cache: Cache, present: Tensor, steps: int):
        attention, weight = model.blocks[0].attention, model.embedding.weight
        self.heads, self.shared, self.size = attention.heads, attention.key_value_heads, attention.size
        self.embedding, self.scale = weight, model.norm.weight
        self.blocks = [
            (
                _matrix(block.attention.query, block.attention.key, block.attention.value)
                * block.attention_norm.weight,
                _matrix(block.attention.output).T.contiguous(),
                _matrix(block.feed_forward.gate, block.feed_forward.up) * block.feed_forward_norm.weight,
                _matrix(block.feed_forward.down).T.contiguous(),
            )
            for block in model.blocks
        ]
        exact = torch.promote_types(weight.dtype, torch.float32)
        self.mean = torch.full((weight.shape[1], 1), 1 / weight.shape[1], dtype=exact, device=weight.device)
        self.epsilon = torch.tensor(model.norm.epsilon, dtype=exact, device=weight.device)
        self.place = present.shape[1]  # of the next token in the cache
        more = -(self.place + steps) % _LANES + steps
        self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (cache.keys, cache.values))
        # Added to the scores [row, key_value_head, query, key]: -inf is not attended to.
        bias = torch.zeros_like(present, dtype=weight.dtype).masked_fill(~present, -math.inf)
        self.bias = F.pad(bias, (0, more), value=-math.inf)[:, None, None].repeat(1, self.shared, 1, 1)
        positions = present.sum(1, keepdim=True) + torch.arange(steps, device=weight.device)
        cos, sin = rotations(positions, self.size, model.rope_base, weight.dtype)
        self.rotation = torch.stack([cos[:, 0], sin[:, 0]]).transpose(0, 1)  # [row, cos and sin, step, size]
        self.step = 0

    def branch(self, rows: Tensor) -> None:
        """Go on with these rows: some may be left out, others be there several times."""
        if torch.equal(rows, torch.arange(len(self.bias), device=rows.device)):
            return
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.bias, self.rotation = self.bias[rows], self.rotation[rows]

    @torch.inference_mode()  # a little quicker than no_grad
    def __call__(self, tokens: Tensor) -> Tensor:
        """Ids [row] of the next tokens -> what the head reads, [row, width]."""
        end = -(-(self.place + 1) // _LANES) * _LANES
        self.bias[..., self.place] = 0
        bias = self.bias[..., :end].flatten(0, 1)  # [row x key_value_head, 1, key]
        rotation = self.rotation[:, :, self.step, None].unbind(1)  # two of [row, 1, size]
        vectors = self.embedding[tokens]
        for (project, output, gate_up, down), keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            split = F.linear(self._normed(vectors), project).view(len(tokens), -1, self.size)  # [row, head, size]
            turned = rotate(split[:, : -self.shared], *rotation)
            keys[:, :, self.place], values[:, :, self.place] = turned[:, self.heads :], split[:, -self.shared :]
            query = turned[:, : self.heads].reshape(len(bias), -1, self.size)
            past = keys.flatten(0, 1)[:, :end], values.flatten(0, 1)[:, :end]
            attention = torch.baddbmm(bias, query, past[0].mT, alpha=self.size**-0.5).softmax(-1)
            vectors = torch.addmm(vectors, torch.bmm(attention, past[1]).view(len(tokens), -1), output)
            gate, up = F.linear(self._normed(vectors), gate_up).chunk(2, dim=-1)
            vectors = torch.addmm(vectors, F.silu(gate) * up, down)
        self.place, self.step = self.place + 1, self.step + 1
        return self._normed(vectors) * self.scale

    def _normed(self, vectors: Tensor) -> Tensor:
        """x / sqrt(mean of x^2 + epsilon)."""
        exact = vectors.to(self.mean.dtype)
        return vectors * torch.addmm(self.epsilon, exact * exact, self.mean).rsqrt().to(vectors.dtype)


_LANES = 16  # keys are attended to in multiples of this: rows that fill the processor's vectors are much faster


def _matrix(*layers: nn.Module) -> Tensor:
    """The matrices of linear layers, or of LoRA's, one below the other: [out features of all, in features]."""
    return torch.cat(
        [
            layer.weight if isinstance(layer, nn.Linear) else layer.merged_weight().to(layer.base.weight.dtype)
            for layer in layers
        ]
    )


# --- the same again ---------------------------------------------------------------------------------------------------


def completion_logits(model: LanguageModel, rollout: Rollout) -> Tensor:
    """The model's logits at the tokens of the completions, with gradient: [sequence, token, vocabulary].

    Raises TypeError, ValueError.
    """
    checks.rollout(rollout, model.embedding.num_embeddings)
    tokens = torch.cat([rollout.prompt, rollout.completion[:, :-1]], dim=1)
    present = torch.cat([rollout.present, torch.ones_like(rollout.mask[:, :-1])], dim=1)
    hidden = model.hidden(tokens, None if present.all() else present)
    return hidden[:, rollout.prompt.shape[1] - 1 :] @ model.embedding.weight.T


def score(
    model: LanguageModel,
    rollout: Rollout,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """log p of every token of the completions, [sequence, token], with gradient: what `generate` recorded, recomputed.

    temperature, top_k, top_p: those of `generate`. 0 where the mask is False, -inf for a token that is left out.
    Raises TypeError, ValueError, NonFiniteLoss.
    """
    logits = truncate(completion_logits(model, rollout), temperature, top_k, top_p)
    return token_logprobs(logits, rollout.completion).where(rollout.mask, 0)
