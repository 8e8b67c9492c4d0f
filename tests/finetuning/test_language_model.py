"""The language model: by hand, against float64 arithmetic written apart, by its symmetries, and against another one."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from mini_impl.checkpoint import save_checkpoint
from mini_impl.finetuning.language_model import (
    Cache,
    LanguageModel,
    RMSNorm,
    hugging_face_name,
    load_language_model,
    rotate,
    rotations,
    save_language_model,
)
from tests import pretend
from tests.finetuning.models import SMALL, close, golden_model, small
from tests.finetuning.test_policy import COMPILER
from tests.tensors import random, same, whole

GOLDEN = Path(__file__).parents[1] / "golden" / "language_model.json"


def left_padded(lengths):
    """attention_mask [batch, time] of rows of these lengths."""
    return torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]


# --- against others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parity_with_another_implementation(dtype):
    """Golden numbers made by tests/golden/make_language_model.py from transformers' Llama with the same weights."""
    for case in json.loads(GOLDEN.read_text())["cases"]:
        model = golden_model(case["model"], case["weights"], dtype)
        attention_mask, positions = left_padded(case["lengths"]), case["positions"]
        logits = model(torch.tensor(case["tokens"]), attention_mask)[:, positions]
        there = attention_mask[:, positions]
        assert there.sum() >= 9
        close(logits[there].double(), torch.tensor(case["logits"], dtype=torch.float64)[there], 1e-5)


def by_numpy(model, tokens):
    """Logits of one row of ids: a token, a head and a pair of features at a time."""
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    heads, groups = model.settings["heads"], model.settings["key_value_heads"]
    head_dim = model.settings["width"] // heads

    def linear(name, x):
        return weights[f"{name}.weight"] @ x

    def norm(name, x):
        return weights[f"{name}.weight"] * x / math.sqrt(sum(x**2) / len(x) + model.settings["epsilon"])

    def turned(vector, position):
        pairs = vector[: head_dim // 2] + 1j * vector[head_dim // 2 :]  # a rotation is a product of complex numbers
        angles = [position / model.settings["rope_base"] ** (2 * i / head_dim) for i in range(head_dim // 2)]
        pairs = pairs * np.exp(1j * np.array(angles))
        return np.concatenate([pairs.real, pairs.imag])

    rows = [weights["embedding.weight"][token] for token in tokens]
    for i in range(model.settings["layers"]):
        block = f"blocks.{i}"
        normed = [norm(f"{block}.attention_norm", row) for row in rows]
        query, key, value = (
            [linear(f"{block}.attention.{name}", row) for row in normed] for name in ("query", "key", "value")
        )
        for t in range(len(rows)):
            mixed = []
            for head in range(heads):
                own = slice(head * head_dim, head * head_dim + head_dim)
                shared = slice(head * groups // heads * head_dim, (head * groups // heads + 1) * head_dim)
                scores = [turned(query[t][own], t) @ turned(key[s][shared], s) / head_dim**0.5 for s in range(t + 1)]
                parts = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(part * value[s][shared] for s, part in enumerate(parts)))
            rows[t] = rows[t] + linear(f"{block}.attention.output", np.concatenate(mixed))
        for t, row in enumerate(rows):
            normed = norm(f"{block}.feed_forward_norm", row)
            gate = linear(f"{block}.feed_forward.gate", normed)
            hidden = gate / (1 + np.exp(-gate)) * linear(f"{block}.feed_forward.up", normed)
            rows[t] = row + linear(f"{block}.feed_forward.down", hidden)
    return np.stack([weights["embedding.weight"] @ norm("norm", row) for row in rows])


sizes = st.sampled_from([(16, 4, 2), (12, 2, 2), (12, 6, 1), (6, 3, 3), (2, 1, 1)])  # width, heads, key_value_heads


@given(st.integers(1, 3), st.integers(1, 6), sizes, st.integers(1, 3), st.floats(2, 1e5), st.floats(1e-6, 0.1),
       st.integers(0, 10**6))  # fmt: skip
@settings(max_examples=30)
def test_the_model_against_numpy(batch, time, size, layers, rope_base, epsilon, seed):
    form = dict(zip(("width", "heads", "key_value_heads"), size, strict=True))
    model = small(seed, **form, layers=layers, rope_base=rope_base, epsilon=epsilon)
    tokens = whole(11, batch, time, seed=seed)
    for row, logits in zip(tokens.tolist(), model(tokens), strict=True):
        np.testing.assert_allclose(logits.detach(), by_numpy(model, row), rtol=1e-9, atol=1e-9)


# --- its parts, by hand -----------------------------------------------------------------------------------------------


def test_rms_norm_by_hand():
    norm = RMSNorm(2, epsilon=0.0)
    assert norm(torch.tensor([[3.0, -4.0]])).tolist()[0] == pytest.approx([3 / 12.5**0.5, -4 / 12.5**0.5])
    norm.weight.data = torch.tensor([2.0, 0.5])
    assert norm(torch.tensor([3.0, -4.0])).tolist() == pytest.approx([6 / 12.5**0.5, -2 / 12.5**0.5])
    assert RMSNorm(2, epsilon=7.0)(torch.tensor([3.0, -3.0])).tolist() == [0.75, -0.75]  # the root of 9 + 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_what_half_precision_cannot_square(dtype):
    normed = RMSNorm(4, epsilon=1e-5).to(dtype)(torch.tensor([1000.0, -1000.0, 1000.0, 1000.0], dtype=dtype))
    assert normed.dtype == dtype and normed.tolist() == [1, -1, 1, 1]


def test_rotation_by_hand():
    """Features 0 and 2 turn by the position, 1 and 3 by a hundredth of it, as the base is 10^4."""
    vector = torch.tensor([1.0, 0, 0, 1]).double()
    cos, sin = rotations(torch.tensor([[0, 1, 100]]), 4, 1e4, torch.float64)
    assert cos.shape == sin.shape == (1, 1, 3, 4)
    turned = rotate(vector.expand(1, 1, 3, 4), cos, sin)[0, 0]
    expected = [[math.cos(p), -math.sin(p / 100), math.sin(p), math.cos(p / 100)] for p in (0, 1, 100)]
    close(turned, torch.tensor(expected, dtype=torch.float64), 1e-15)


@given(st.sampled_from([2, 4, 10]), st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000), st.floats(2, 1e6))
@settings(max_examples=50)
def test_products_depend_on_the_distance_alone(head_dim, here, there, moved, base):
    query, key = random(2, head_dim, seed=here)

    def product(at, to):
        cos, sin = rotations(torch.tensor([[at, to]]), head_dim, base, torch.float64)
        turned = rotate(torch.stack([query, key])[None, None], cos, sin)[0, 0]
        close(turned.norm(dim=-1), torch.stack([query, key]).norm(dim=-1))
        return turned[0] @ turned[1]

    close(product(here, there), product(here + moved, there + moved))
    close(product(here, here), query @ key)


@given(st.sampled_from([2, 4, 16]), st.floats(2, 1e6))
def test_the_longest_wavelength(head_dim, base):
    """The slowest pair of features turns once in 2 pi base^(1 - 2 / head_dim) tokens, as the docstring says."""
    cos, sin = rotations(torch.tensor([[1]]), head_dim, base, torch.float64)
    slowest = torch.atan2(sin, cos).min().item()  # of the angles of one step
    assert 2 * math.pi / slowest == pytest.approx(2 * math.pi * base ** (1 - 2 / head_dim))


def test_half_precision_counts_positions():
    """bfloat16 knows no 1001, but its rotation is that of position 1001, rounded at the end."""
    positions = torch.tensor([[1000, 1001, 8191]])
    rough, exact = (rotations(positions, 8, 1e4, dtype) for dtype in (torch.bfloat16, torch.float64))
    for ours, theirs in zip(rough, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        close(ours.double(), theirs, 2**-8)


def test_groups_share_keys_and_values():
    """Two keys for four queries compute what four keys do, each of the two written down twice."""
    model, written_out = small(), small(key_value_heads=4)
    weights = model.state_dict()
    for name in weights:
        if name.endswith(("key.weight", "value.weight")):
            weights[name] = weights[name].unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    written_out.load_state_dict(weights)
    close(written_out(whole(11, 2, 7)), model(whole(11, 2, 7)))


def test_the_head_is_the_embedding():
    model, tokens = small(), whole(11, 2, 5)
    assert not any("head" in name for name in model.state_dict())
    hidden = model.hidden(tokens)
    assert hidden.shape == (2, 5, 16)
    assert torch.equal(model(tokens), hidden @ model.embedding.weight.T)


def test_the_start():
    """What is added to the sums over the blocks starts smaller, so that they do not grow with their number."""
    torch.manual_seed(0)
    model = LanguageModel(100, width=128, layers=8, heads=4, key_value_heads=2, feed_forward_width=300)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 0.005 if name.endswith(("output.weight", "down.weight")) else 0.02  # 0.02 / sqrt(2 * 8)
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name


# --- what follows from its form ---------------------------------------------------------------------------------------


@given(st.integers(2, 9), st.data())
@settings(max_examples=20)
def test_no_token_sees_a_later_one(time, data):
    model, changed = small(), data.draw(st.integers(1, time - 1))
    tokens = whole(11, 2, time, seed=time)
    other = tokens.clone()
    other[1, changed] = (other[1, changed] + 1) % 11
    moved = (model(other) - model(tokens)).abs().amax(-1) > 1e-9  # [batch, time]
    assert moved[0].tolist() == [False] * time
    assert moved[1].tolist() == [False] * changed + [True] * (time - changed)


def test_the_order_of_earlier_tokens_counts():
    one, other = small()(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert (one - other).abs().max() > 1e-3


@given(st.lists(st.integers(1, 7), min_size=1, max_size=4), st.integers(0, 10**6))
@settings(max_examples=20)
def test_a_padded_row_gives_what_it_gives_alone(lengths, seed):
    """Whatever the padding is, and on whichever side; and it is finite itself."""
    model, time = small(), max(lengths)
    tokens = whole(11, len(lengths), time, seed=seed)
    for attention_mask in (left_padded(lengths), left_padded(lengths).flip(1)):
        logits = model(tokens, attention_mask)
        assert torch.isfinite(logits).all()
        for row, keep, padded in zip(tokens, attention_mask, logits, strict=True):
            close(padded[keep], model(row[keep][None])[0])


@given(st.lists(st.booleans(), min_size=1, max_size=9).filter(any), st.integers(0, 10**6))
@settings(max_examples=20)
def test_padding_may_lie_between(attention_mask, seed):
    model, tokens, attention_mask = (
        small(),
        whole(11, 1, len(attention_mask), seed=seed),
        torch.tensor([attention_mask]),
    )
    close(model(tokens, attention_mask)[attention_mask], model(tokens[attention_mask][None])[0])


def test_no_padding_is_no_mask():
    model, tokens = small(), whole(11, 3, 6)
    close(model(tokens, torch.ones(3, 6, dtype=torch.bool)), model(tokens))


@pytest.mark.parametrize("padded", [False, True])
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 10**6))
@settings(max_examples=20)
def test_the_cache_gives_what_a_fresh_pass_gives(padded, pieces, seed):
    """In whichever pieces the tokens come; and the same gradient."""
    model, time = small(), sum(pieces)
    tokens = whole(11, 3, time, seed=seed)
    attention_mask = None
    if padded:  # on the left, and in one row at its end
        attention_mask = torch.arange(time) >= torch.tensor([0, pieces[0] // 2, pieces[0] - 1])[:, None]
        attention_mask[0, 1:] &= torch.arange(1, time) < time - 1
    cache, end, parts = Cache(), 0, []
    for piece in pieces:
        start, end = end, end + piece
        parts.append(model(tokens[:, start:end], attention_mask[:, :end] if padded else None, cache))
        assert cache.filled == end
    fresh = model(tokens, attention_mask)
    keep = attention_mask if padded else torch.ones(3, time, dtype=torch.bool)
    here, there = torch.cat(parts, dim=1)[keep], fresh[keep]
    close(here, there)
    same(*(torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (here, there)), 1e-9)


def test_inference_mode():
    """What is kept between calls, and was made in inference mode, serves training afterwards."""
    model, tokens, attention_mask = small(rope_base=321.0), whole(11, 1, 23), torch.ones(1, 23, dtype=torch.bool)
    with torch.inference_mode():
        cache = Cache()
        parts = [model(tokens[:, :20], cache=cache), model(tokens[:, 20:], cache=cache)]
        close(torch.cat(parts, dim=1), model(tokens, attention_mask))
    model(tokens, attention_mask).sum().backward()
    assert torch.isfinite(model.embedding.weight.grad).all()


def test_no_token_has_nothing_to_attend_to(monkeypatch):
    """Padding before a row's first token has itself: of a row where nothing is allowed, older torch makes NaN."""
    masks, attention = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, mask, **others):
        masks.append(mask)
        return attention(query, key, value, mask, **others)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    model, attention_mask = small(), left_padded([6, 4, 3])
    model(whole(11, 3, 6), attention_mask)
    cache = Cache()
    model(whole(11, 3, 5), attention_mask[:, :5], cache)
    model(whole(11, 3, 1), attention_mask, cache)
    assert len(masks) == 6 and all(mask.any(-1).all() for mask in masks)
    assert [mask.shape for mask in masks[1::2]] == [(3, 1, 6, 6), (3, 1, 5, 5), (3, 1, 1, 6)]


# --- gradients --------------------------------------------------------------------------------------------------------


def loss_of(model, names, tokens, attention_mask=None):
    """The mean cross-entropy of the next tokens as a function of the named weights."""

    def loss(*weights):
        logits = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (tokens, attention_mask))
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return loss, [model.get_parameter(name).detach().clone().requires_grad_() for name in names]


TINY = {"vocab_size": 4, "width": 4, "heads": 2, "key_value_heads": 1, "feed_forward_width": 3}
PADDED = torch.tensor([[False, True, True], [True, True, True]])
padded_or_not = pytest.mark.parametrize("attention_mask", [None, PADDED], ids=["whole", "padded"])


@padded_or_not
def test_gradients(attention_mask):
    """Of the embedding, of a norm and of the weights of a block, against finite differences."""
    names = ["embedding.weight", "blocks.0.attention_norm.weight", "norm.weight"]
    names += [f"blocks.0.attention.{name}.weight" for name in ("query", "key", "value", "output")]
    names += [f"blocks.1.feed_forward.{name}.weight" for name in ("gate", "up", "down")]
    loss, weights = loss_of(small(**TINY), names, whole(4, 2, 3), attention_mask)
    assert torch.autograd.gradcheck(loss, weights)


@padded_or_not
def test_gradients_of_gradients(attention_mask):
    """As a penalty on gradients needs; of torch's attentions, the plain one ("math") can."""
    names = [f"blocks.0.attention.{name}.weight" for name in ("query", "key", "value")]
    names += ["blocks.1.feed_forward.gate.weight"]
    loss, weights = loss_of(small(**TINY), names, whole(4, 2, 3), attention_mask)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradgradcheck(loss, weights)


def test_every_weight_is_trained():
    model, tokens = small(), whole(11, 2, 8)
    model(tokens).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_it_learns():
    """To say 0 1 2 3 .. and, after 10, what came first: attention to the beginning is needed for that."""
    torch.manual_seed(0)
    model = LanguageModel(**SMALL)
    tokens = torch.stack([torch.tensor([first, *range(1, 10), 10, first]) for first in range(1, 10)])
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(150):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(tokens)[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten()).backward()
        optimiser.step()
    assert torch.equal(model(tokens)[:, 1:-1].argmax(-1), tokens[:, 2:])


# --- dtypes, devices, compilation, files ------------------------------------------------------------------------------


def test_devices(device):
    model, tokens, attention_mask = small().float(), whole(11, 3, 6), left_padded([6, 4, 3])
    here = model(tokens, attention_mask)
    model.to(device)
    tokens, there = tokens.to(device), attention_mask.to(device)
    logits = model(tokens, there)
    logits.sum().backward()
    assert logits.device.type == device and logits.dtype == torch.float32
    close(logits.cpu()[attention_mask], here[attention_mask], 1e-4)
    cache = Cache()
    parts = [model(tokens[:, :4], there[:, :4], cache), model(tokens[:, 4:], there, cache)]
    close(torch.cat(parts, dim=1).cpu()[attention_mask], here[attention_mask], 1e-4)


def test_on_a_device_of_its_own_it_waits_once():
    """No tensor of another device, no float64; the one look at the arguments is the one wait."""
    for attention_mask in (None, left_padded([7, 3])):
        with pretend.device() as elsewhere:
            model, tokens = small().float().to(elsewhere), whole(11, 2, 7).to(elsewhere)
            there = None if attention_mask is None else attention_mask.to(elsewhere)
            with pretend.waits() as waits:
                model(tokens, there).square().sum().backward()
            assert len(waits) == 1, waits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    model, tokens = small(), whole(11, 2, 9)
    exact, rough = model(tokens), model.to(dtype)(tokens)
    assert rough.dtype == dtype
    close(rough.double(), exact, 0.02 * exact.abs().max().item() * (1 if dtype == torch.float16 else 4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_in_one_graph(padded, backend):
    """Logits and gradients of a compiled model are the model's own, for another length too."""
    model = small()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for time in (7, 9):
        results = []
        for called in (model, compiled):
            model.zero_grad()
            logits = called(whole(11, 2, time), left_padded([time, 3]) if padded else None)
            logits.square().sum().backward()
            results.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        same(*results, 1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler and Python's headers")
@torch.no_grad()
def test_compiled():
    model, tokens, there = small(layers=1), whole(11, 2, 7), left_padded([7, 3])
    close(torch.compile(model)(tokens, there)[there], model(tokens, there)[there], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_saved_and_loaded(tmp_path, dtype):
    model, tokens = small(rope_base=123.0, epsilon=0.01).to(dtype), whole(11, 2, 7)
    save_language_model(model, tmp_path / "model.safetensors")
    loaded = load_language_model(tmp_path / "model.safetensors")
    assert loaded.settings == model.settings and not loaded.training
    assert torch.equal(loaded(tokens), model(tokens))


def test_a_file_of_another_kind(tmp_path):
    save_checkpoint(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, {"step": 1})
    with pytest.raises(ValueError, match=r"other.safetensors holds no language model that save_language_model wrote"):
        load_language_model(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match="No such file"):
        load_language_model(tmp_path / "none.safetensors")


def test_the_names_of_others():
    for ours, theirs in {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "blocks.10.attention.output": "model.layers.10.self_attn.o_proj",
        "blocks.0.attention_norm.weight": "model.layers.0.input_layernorm.weight",
        "blocks.0.feed_forward_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "blocks.3.feed_forward.gate.weight": "model.layers.3.mlp.gate_proj.weight",
    }.items():
        assert hugging_face_name(ours) == theirs


# --- bad input --------------------------------------------------------------------------------------------------------


def made(**changes):
    return LanguageModel(**{**SMALL, **changes})


def after(tokens, attention_mask=None):
    """What a model makes of tokens behind two rows of five."""
    model, cache = made(), Cache()
    model(GOOD, cache=cache)
    return model(tokens, attention_mask, cache)


GOOD = whole(11, 2, 5)
ALL = torch.ones(2, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: made(vocab_size=0), ValueError, "vocab_size must be at least 1; got 0"),
        (lambda: made(width=12), ValueError, r"width must be a multiple of 2 \* heads; got 12 and 8"),
        (lambda: made(layers=0), ValueError, "layers must be at least 1; got 0"),
        (lambda: made(key_value_heads=3), ValueError, "heads must be a multiple of key_value_heads; got 4 and 3"),
        (lambda: made(feed_forward_width=True), TypeError, "feed_forward_width must be a whole number.*got True"),
        (lambda: made(rope_base=1), ValueError, "rope_base.*greater than 1; got 1"),
        (lambda: made(epsilon=0), ValueError, "epsilon.*greater than 0; got 0"),
        (lambda: made()([[1, 2]]), TypeError, r"tokens.*\[batch, time\], whole numbers; got list"),
        (lambda: made().hidden(GOOD.float()), TypeError, "tokens.*got dtype torch.float32"),
        (lambda: made()(GOOD[:, :0]), ValueError, r"tokens.*no axis empty; got shape \[2, 0\]"),
        (lambda: made()(GOOD + 7), ValueError, "tokens.*from 0 to 10; got ids from 7 to 1[0-7]"),
        (lambda: made()(GOOD, ALL.long()), ValueError, r"attention_mask must be a bool .*\[2, 5\]; got torch.int64"),
        (lambda: after(GOOD[:, :2], ALL[:, :2]), ValueError, r"attention_mask.*\[2, 7\]; got torch.bool \[2, 2\]"),
        (lambda: made()(GOOD, ALL & (GOOD < 0)), ValueError, r"attention_mask.*counts no token of the rows \[0, 1\]"),
        (lambda: after(GOOD[:1]), ValueError, "tokens must have the 2 rows of the cache; got 1"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_whole_numbers_of_any_kind_mean_the_same_and_are_kept(tmp_path):
    """Twice 200 layers are 144 in eight bits, and would start from other weights."""
    sizes = {"vocab_size": 20, "width": 16, "layers": 130, "heads": 4, "key_value_heads": 2, "feed_forward_width": 8}
    models = []
    for kind in (int, np.uint8, np.int64):
        torch.manual_seed(0)
        models.append(LanguageModel(**{name: kind(size) for name, size in sizes.items()}))
    save_language_model(models[1], tmp_path / "model")
    for other in (*models[1:], load_language_model(tmp_path / "model")):
        assert other.settings == models[0].settings
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in models[0].state_dict().items())
