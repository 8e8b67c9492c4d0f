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
from torch import Tensor

from mini_impl import checks
from mini_impl.finetuning.decoder import Decoder
from mini_impl.finetuning.head import _head_logprobs
from mini_impl.finetuning.language_model import Cache, LanguageModel
from mini_impl.finetuning.policy import _token_logprobs, no_nan
from mini_impl.losses import NonFiniteLoss


class Rollout(NamedTuple):
    """Prompts and what was sampled after them."""

    prompt: Tensor  # ids [sequence, prompt time], padded on the left
    attention_mask: Tensor  # bool, the same shape: False for the padding
    completion: Tensor  # ids [sequence, token]; after eos_token_id, eos_token_id
    mask: Tensor  # bool, the same shape: True up to and with the first eos_token_id
    logprobs: Tensor  # [sequence, token], in nats, under the distribution that was sampled; 0 where mask is False


def truncate(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits of the distribution to sample from: divided by the temperature, -inf for the tokens that are left out.

    logits: [.., vocab_size]; half precision is left for float32. temperature: at least 0; 0 leaves the most likely
    token alone, the first of several. top_k: leave the k most likely tokens. top_p: leave as many of the most likely
    tokens as it takes to reach this probability, of what top_k left; more than 0, at most 1. Tokens as likely as the
    last one that stays do stay. Raises TypeError, ValueError; NonFiniteLoss for NaN among the logits.
    """
    checks.tensor("logits", logits, ..., "vocab_size")
    checks.look(no_nan(logits))
    return _truncate(logits, temperature, top_k, top_p)


def _truncate(logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    checks.number("temperature", temperature, least=0)
    logits = logits if logits.dtype.itemsize >= 4 else logits.float()
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)  # [.., 1]
        return torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
    logits = logits if temperature == 1 else logits / temperature
    if top_k is not None:
        checks.integer("top_k", top_k, most=logits.shape[-1], why="the number of tokens")
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p is not None and checks.number("top_p", top_p, above=0, most=1) < 1:
        ordered = logits.sort(-1, descending=True).values  # [.., vocab_size]
        probabilities = ordered.softmax(-1)
        reached = probabilities.cumsum(-1) - probabilities  # by the more likely ones: 0 for the first
        count = (reached < top_p).sum(-1, keepdim=True).clamp(min=1)  # [.., 1]
        logits = logits.masked_fill(logits < ordered.gather(-1, count - 1), -math.inf)
    return logits


def uniforms(seed: int, rows: Sequence[int], count: int) -> np.ndarray:
    """`count` uniform numbers for each row: [row, count], whole multiples of 2^-23 in [0, 1), exact in float32.

    They depend on the seed and the number of the row alone, so that a row draws the same whatever is beside it. The
    generator counts and mixes, without a state to carry, and makes all of them at once. seed, rows: whole numbers from
    0 to 2^64 - 1. Raises TypeError, ValueError.
    Source: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014 (SplitMix64).
    """
    for name, value in (("seed", seed), *((f"rows[{place}]", row) for place, row in enumerate(rows))):
        checks.integer(name, value, least=0, most=2**64 - 1)
    count = checks.integer("count", count)
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


def _check_prompts(prompts, vocab_size: int) -> None:
    wanted = f"prompts must be lists of token ids, whole numbers from 0 to {vocab_size - 1}, none of them empty"
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise (ValueError if prompts == [] else TypeError)(f"{wanted}; got {prompts!r}")
    for number, ids in enumerate(prompts):
        whole = isinstance(ids, Sequence) and {type(token) for token in ids} <= {int, np.int64}
        if not whole or not ids or min(ids) < 0 or max(ids) >= vocab_size:
            raise (ValueError if whole else TypeError)(f"{wanted}; prompts[{number}] is {ids!r}")


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    rows: Sequence[int] | None = None,
) -> Rollout:
    """Sample a completion of every prompt, up to and with eos_token_id, of at most max_new_tokens tokens.

    prompts: ids, of any lengths but 0. eos_token_id: the id that ends a completion, and pads. temperature, top_k,
    top_p: as in `truncate`. seed: a whole number from 0 to 2^64 - 1. rows: the number of each prompt's random stream,
    that of (seed, number); None: 0, 1, .. A row gives the same tokens alone and in a batch, but where rounding decides.
    The model's mode and gradients stay as they are. Rollout.completion is as long as the longest one.
    Raises TypeError, ValueError; NonFiniteLoss if the model's logits make no distribution (NaN or +inf among them).
    """
    checks.instance("model", model, LanguageModel, "a LanguageModel")
    weight, vocab_size = model.embedding.weight, model.embedding.num_embeddings
    _check_prompts(prompts, vocab_size)
    (max_new_tokens,) = checks.integers(max_new_tokens=max_new_tokens)
    checks.integer("eos_token_id", eos_token_id, least=0, most=vocab_size - 1, why="the last token id")
    rows = range(len(prompts)) if rows is None else rows
    if not isinstance(rows, Sequence) or len(rows) != len(prompts):
        raise ValueError(f"rows must be whole numbers, one for each of the {len(prompts)} prompts; got {rows!r}")
    lengths = [len(ids) for ids in prompts]
    time = max(lengths)
    prompt = torch.tensor([[eos_token_id] * (time - len(ids)) + list(ids) for ids in prompts])  # [row, time]
    attention_mask = torch.arange(time) >= time - torch.tensor(lengths)[:, None]  # [row, time]

    # Rows that are the same so far are one to the model, a node: the answers to one prompt (a group of GRPO) begin as
    # one, and a row that has stopped belongs to none.
    first: dict[tuple[int, ...], int] = {}
    first_row = torch.tensor([first.setdefault(tuple(ids), row) for row, ids in enumerate(prompts)])  # [row]
    start, node = first_row.unique(return_inverse=True)  # [node]: a row of each prompt; [row]: its node
    prompt, attention_mask, start, node = (part.to(weight.device) for part in (prompt, attention_mask, start, node))
    row = torch.arange(len(prompts), device=weight.device)  # [row]: where each row at work stands in the batch
    cache = Cache()
    padding = None if min(lengths) == time else attention_mask[start]
    hidden = model._hidden(prompt[start], padding, cache)[:, -1]  # [node, width]
    decoder = Decoder(model, cache, attention_mask[start], max_new_tokens)

    draws = torch.tensor(uniforms(seed, rows, max_new_tokens))  # [row, token]
    draws = draws.to(torch.promote_types(weight.dtype, torch.float32)).to(weight.device)
    completion = torch.full((len(prompts), max_new_tokens), eos_token_id, device=weight.device)
    chosen = torch.ones_like(draws)  # the probability of each token
    for step in range(max_new_tokens):
        probabilities = _truncate(hidden @ weight.T, temperature, top_k, top_p).softmax(-1)  # [node, vocab_size]
        line = probabilities.cumsum(-1)[node]  # [row, vocab_size]: from 0 to 1, with a stretch for each token
        token = (line <= draws[row, step, None] * line[:, -1:]).sum(-1)  # the one in whose stretch the draw lies
        completion[row, step] = token
        chosen[row, step] = probabilities[node, token]
        going = token != eos_token_id  # [row]
        if step == max_new_tokens - 1 or not going.any():
            break
        row, node, token = row[going], node[going], token[going]
        said, node = (node * vocab_size + token).unique(return_inverse=True)  # [node]: its parent and its token
        decoder.branch(said // vocab_size)
        hidden = decoder(said % vocab_size)  # [node, width]

    completion, logprobs = completion[:, : step + 1], chosen[:, : step + 1].log()
    ended = completion == eos_token_id
    mask = ended.cumsum(1) - ended.long() == 0  # none before it
    checks.look(checks.finite("log-probabilities of what was sampled", logprobs, NonFiniteLoss))
    return Rollout(prompt, attention_mask, completion, mask, logprobs)


def written(rollout: Rollout, tokenizer) -> list[str]:
    """The texts of a rollout, without the end-of-sequence token."""
    rows = zip(rollout.completion.tolist(), rollout.mask.sum(1).tolist(), strict=True)
    end = tokenizer.eos_token_id
    return [tokenizer.decode([token for token in row[:length] if token != end]) for row, length in rows]


# --- the same again ---------------------------------------------------------------------------------------------------


def completion_logits(model: LanguageModel, rollout: Rollout) -> Tensor:
    """The model's logits at the tokens of the completions, with gradient: [sequence, token, vocab_size].

    Raises TypeError, ValueError.
    """
    return _completion_hidden(model, rollout, _padded(model, rollout)) @ model.embedding.weight.T


def score(
    model: LanguageModel,
    rollout: Rollout,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """log p of every token of the completions, [sequence, token], with gradient: what `generate` recorded, recomputed.

    temperature, top_k, top_p: those of `generate`. 0 where the mask is False, -inf for a token that is left out.
    Without top_k and top_p the logits of all tokens are never held at once (`head.head_logprobs`).
    Raises TypeError, ValueError, NonFiniteLoss.
    """
    checks.number("temperature", temperature, least=0)
    logprobs = _score(model, rollout, temperature, top_k, top_p, _padded(model, rollout))
    checks.look(no_nan(logprobs))
    return logprobs


def _score(
    model: LanguageModel,
    rollout: Rollout,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    padded: bool | None = None,
) -> Tensor:
    """score of a rollout that is known to fit, without a look at what comes out. padded: None: it is read."""
    hidden = _completion_hidden(model, rollout, padded)  # [sequence, token, width]
    weight = model.embedding.weight
    if top_k is None and top_p is None and 0 < temperature < math.inf:
        exact = torch.promote_types(weight.dtype, torch.float32)
        logprobs = _head_logprobs(hidden.to(exact), weight.to(exact), rollout.completion, temperature)
    else:
        logprobs = _token_logprobs(_truncate(hidden @ weight.T, temperature, top_k, top_p), rollout.completion)
    return logprobs.where(rollout.mask, 0)  # [sequence, token]


def _completion_hidden(model: LanguageModel, rollout: Rollout, padded: bool | None) -> Tensor:
    """What the head reads to predict the tokens of the completions: [sequence, token, width]."""
    padded = not rollout.attention_mask.all() if padded is None else padded
    tokens, attention_mask = _whole(rollout)
    hidden = model._hidden(tokens[:, :-1], attention_mask[:, :-1] if padded else None)  # the last predicts nothing
    return hidden[:, rollout.prompt.shape[1] - 1 :]


def _whole(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Prompts with their completions, and the attention_mask of both, each [sequence, time]."""
    tokens = torch.cat([rollout.prompt, rollout.completion], dim=1)
    return tokens, torch.cat([rollout.attention_mask, torch.ones_like(rollout.mask)], dim=1)


def _padded(model: LanguageModel, rollout: Rollout) -> bool:
    """Whether a prompt of a rollout is padded. Raises TypeError, ValueError unless it fits the model; one look."""
    checks.instance("model", model, LanguageModel, "a LanguageModel")
    checks.instance("rollout", rollout, Rollout, "what generate returned")
    if len(rollout.prompt) != len(rollout.completion):
        got = f"{len(rollout.completion)} and {len(rollout.prompt)}"
        raise ValueError(f"rollout must have a completion for each prompt; got {got}")
    required, unpadded = model._requirements(*_whole(rollout), name="rollout"), []
    checks.look(*required, checks.Requirement((rollout.attention_mask.all(),), unpadded.append))  # read along
    return unpadded != [True]
