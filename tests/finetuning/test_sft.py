"""SFT and LoRA: by hand, in closed form, against transformers' and PEFT's numbers, and adapters in PEFT's files."""

import base64
import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from bench.weights import llama_of
from mini_impl.finetuning import sft
from mini_impl.finetuning.language_model import hugging_face_name
from mini_impl.finetuning.sft import (
    LoRALinear,
    add_lora,
    documented_loss,
    load_adapter,
    log_sum_exp_loss,
    lora_layers,
    merge_and_unload,
    published_loss,
    save_adapter,
    sentence_mean,
    softmax,
    supervised,
    token_cross_entropy,
)
from mini_impl.losses import LossTerms, NonFiniteLoss
from tests.finetuning import models
from tests.finetuning.test_policy import f64
from tests.tensors import random, same, whole

FILES = ("adapter_config.json", "adapter_model.safetensors")
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sft.json").read_text())


def tiny(seed=0, dtype=torch.float64):
    """A language model with random weights, large enough for every part to matter."""
    return models.small(seed, dtype, heads=2, key_value_heads=1, feed_forward_width=6)


def shake(model, seed=0):
    """Give B and A random values, as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for matrix in (layer.A, layer.B):
                matrix.copy_(0.4 * torch.randn(matrix.shape, generator=generator, dtype=torch.float64))
    return model


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_four_formulas_by_hand():
    logits, tokens = f64([[0.0, math.log(3.0)], [math.log(7.0), 0.0]]), torch.tensor([1, 1])
    probabilities, expected = softmax(logits), f64([math.log(4 / 3), math.log(8)])
    same(probabilities, f64([[0.25, 0.75], [0.875, 0.125]]))
    same(token_cross_entropy(probabilities, tokens), expected)
    same(log_sum_exp_loss(logits, tokens), expected)
    both, mask = torch.stack([expected, expected.flip(0)]), torch.tensor([[1, 1], [1, 0]])  # [sentence, token]
    for counted in (mask, mask.bool()):
        same(sentence_mean(both, counted), f64([(math.log(4 / 3) + math.log(8)) / 2, math.log(8)]))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**6))
def test_the_formulas_agree(batch, time, vocabulary, seed):
    """-sum_i y_i log yhat_i with y as a vector of 0 and 1; the form without probabilities; the gradient yhat - y."""
    logits = (4 * random(batch, time, vocabulary, seed=seed)).requires_grad_()
    tokens = whole(vocabulary, batch, time, seed=seed)
    truth = F.one_hot(tokens, vocabulary).double()
    losses = token_cross_entropy(softmax(logits), tokens)
    torch.testing.assert_close(losses, -(truth * softmax(logits).log()).sum(-1))
    torch.testing.assert_close(losses, log_sum_exp_loss(logits, tokens))
    torch.testing.assert_close(softmax(logits), softmax(logits + 1000))  # only differences of logits count
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(slope, (softmax(logits) - truth).detach())


def test_where_the_first_form_ends_and_the_last_goes_on():
    logits, tokens = torch.tensor([[0.0, 200.0]]), torch.tensor([0])
    assert log_sum_exp_loss(logits, tokens).item() == 200
    with pytest.raises(NonFiniteLoss, match=r"probability of a token is 0.0.*log_sum_exp_loss"):
        token_cross_entropy(softmax(logits), tokens)


def test_sentences_weigh_the_same_or_tokens_do():
    """Losses (log 4 - log 3) of three tokens and log 4 of one: the documented mean of means, the published mean."""
    logits = f64([0.0, math.log(3.0)]).expand(2, 3, 2)
    labels = torch.tensor([[1, 1, 1], [-100, -100, 0]])
    short, long = math.log(4), math.log(4 / 3)
    assert documented_loss(logits, labels).total.item() == pytest.approx((long + short) / 2)
    assert published_loss(logits, labels).total.item() == pytest.approx((3 * long + short) / 4)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6))
def test_the_losses_against_the_formulas(batch, time, seed):
    logits, labels = random(batch, time, 5, seed=seed), whole(5, batch, time, seed=seed)
    labels[random(batch, time, seed=seed + 1) > 0.3] = -100
    labels[:, 0] = whole(5, batch, seed=seed + 2)  # one a sentence at least
    per_token = [
        [-logits[i, t].log_softmax(0)[y].item() for t, y in enumerate(row) if y != -100]
        for i, row in enumerate(labels.tolist())
    ]
    means, every = [sum(row) / len(row) for row in per_token], [loss for row in per_token for loss in row]
    assert documented_loss(logits, labels).total.item() == pytest.approx(sum(means) / batch)
    assert published_loss(logits, labels).total.item() == pytest.approx(sum(every) / len(every))
    mine = labels.where(labels >= 0, 3)  # another mark for what does not count; 3 then counts nowhere
    if (mine != 3).any(1).all():
        by_mark = documented_loss(logits, mine, ignore_index=3).total
        torch.testing.assert_close(by_mark, documented_loss(logits, mine.where(mine != 3, -100)).total)


def test_what_is_ignored_does_not_count():
    logits, labels = random(2, 4, 5), whole(5, 2, 4)
    labels[0, 2] = labels[1, 0] = -100
    other = logits.clone()
    other[0, 2], other[1, 0] = 50 * random(2, 5, seed=9)
    for loss in (documented_loss, published_loss):
        assert loss(logits, labels).total == loss(other, labels).total
        (slope,) = torch.autograd.grad(loss(logits.requires_grad_(), labels).total, logits)
        assert (slope[labels == -100] == 0).all() and (slope[labels != -100] != 0).all()


def test_gradients_of_the_losses():
    labels, mask = torch.tensor([[1, -100, 4], [0, 2, 3]]), torch.tensor([[1, 0, 1], [1, 1, 1]])
    logits = random(2, 3, 5).requires_grad_()
    for loss in (documented_loss, published_loss):
        assert torch.autograd.gradcheck(lambda z, loss=loss: loss(z, labels).total, (logits,))
    tokens = labels.clamp(min=0)
    assert torch.autograd.gradcheck(lambda z: token_cross_entropy(softmax(z), tokens), (logits,))
    assert torch.autograd.gradcheck(lambda z: log_sum_exp_loss(z, tokens), (logits,))
    assert torch.autograd.gradcheck(lambda x: sentence_mean(x, mask), (random(2, 3).requires_grad_(),))


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 5.0])
def test_lora_by_hand(alpha):
    """W = [[1, 2]], A = [[1, -1]], B = [[3]]: W + s BA = [[1 + 3s, 2 - 3s]]."""
    layer = LoRALinear(nn.Linear(2, 1).double(), rank=1, alpha=alpha)
    for matrix, values in ((layer.base.weight, [[1, 2]]), (layer.base.bias, [0.5]), (layer.A, [[1, -1]]), (layer.B, 3)):
        matrix.data.copy_(torch.tensor(values))
    s = 1 if alpha is None else 5
    x = torch.tensor([[10.0, 1.0]], dtype=torch.float64)
    assert layer(x).item() == 10 * (1 + 3 * s) + (2 - 3 * s) + 0.5
    assert layer.merged_weight().tolist() == [[1 + 3 * s, 2 - 3 * s]]


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, 3.0]), st.integers(0, 10**6))
def test_lora_is_one_linear_map(batch, inputs, outputs, alpha, seed):
    """x (W + s BA)' + bias, and the gradients of B and A: s dW A' and s B' dW, dW that of the whole weight."""
    torch.manual_seed(seed)
    rank = min(inputs, outputs)
    layer = LoRALinear(nn.Linear(inputs, outputs).double(), rank, alpha)
    layer.B.data.normal_()
    x, slope = random(batch, 3, inputs, seed=seed), random(batch, 3, outputs, seed=seed + 1)
    s = 1 if alpha is None else alpha / rank
    weight = (layer.base.weight + s * layer.B @ layer.A).detach().requires_grad_()
    expected = x @ weight.T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)
    (layer(x) * slope).sum().backward()
    (dw,) = torch.autograd.grad((expected * slope).sum(), weight)
    same((layer.B.grad, layer.A.grad), (s * dw @ layer.A.detach().T, s * layer.B.detach().T @ dw))
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_the_order_of_operations_is_that_of_public_code():
    """Bit for bit: (x A' B') s + base."""
    layer = LoRALinear(nn.Linear(33, 17), rank=5, alpha=7)
    layer.B.data.normal_()
    x = random(4, 9, 33, dtype=torch.float32)
    assert torch.equal(layer(x), layer.base(x) + F.linear(F.linear(x, layer.A), layer.B) * (7 / 5))
    assert torch.equal(layer.merged_weight(), layer.base.weight + (layer.B @ layer.A) * (7 / 5))


def test_the_start():
    """The model as it was, to the bit; the first gradient of A is exactly 0 and that of B is not."""
    model, tokens = tiny(), whole(11, 3, 6)
    before = model(tokens).detach()
    assert add_lora(model, rank=2) is model
    assert torch.equal(model(tokens), before)
    documented_loss(model(tokens), tokens).total.backward()
    for layer in lora_layers(model).values():
        assert layer.A.grad.abs().max() == 0 and layer.B.grad.abs().max() > 0
        bound = 1 / layer.base.in_features**0.5
        assert layer.A.abs().max() <= bound and layer.B.abs().max() == 0 and layer.A.abs().max() > bound / 2


def test_where_adapters_go():
    model = add_lora(tiny())
    places = [f"blocks.{i}.attention.{name}" for i in (0, 1) for name in ("query", "value")]
    assert sorted(lora_layers(model)) == sorted(places)
    model = add_lora(tiny(), targets=["down", "output"], rank=3)
    assert len(lora_layers(model)) == 4 and isinstance(model.blocks[1].feed_forward.down, LoRALinear)
    model = add_lora(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), targets=("2",), rank=1)
    assert list(lora_layers(model)) == ["2"] and isinstance(model[2], LoRALinear)


def test_only_a_and_b_are_trained():
    model = add_lora(tiny(), rank=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in lora_layers(model) for part in "AB"}
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * (16 + 16) + 2 * (16 + 8))
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(2):  # A moves from the second step on
        optimiser.zero_grad()
        documented_loss(model(whole(11, 2, 5)), whole(11, 2, 5, seed=1)).total.backward()
        optimiser.step()
    after = model.state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == trained


def test_gradients_through_adapters():
    model = shake(add_lora(tiny(), rank=2))
    names = [f"blocks.0.attention.query.{part}" for part in "AB"]
    tokens, labels = whole(11, 2, 4), whole(11, 2, 4, seed=1)

    def loss(*matrices):
        logits = torch.func.functional_call(model, dict(zip(names, matrices, strict=True)), tokens)
        return documented_loss(logits, labels).total

    assert torch.autograd.gradcheck(loss, [model.get_parameter(n).detach().clone().requires_grad_() for n in names])


@pytest.mark.parametrize("alpha", [None, 12])
def test_merging(alpha):
    """The merged model computes the same, has the old layers again, and nothing in it is trained."""
    model, tokens = shake(add_lora(tiny(), rank=3, alpha=alpha)), whole(11, 2, 5)
    adapted = model(tokens).detach()
    assert (adapted - tiny()(tokens)).abs().max() > 0.01
    assert merge_and_unload(model) is model
    torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=1e-12)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in tiny().named_parameters()]
    assert not lora_layers(model) and not any(parameter.requires_grad for parameter in model.parameters())
    add_lora(model)  # and on with it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@given(st.integers(1, 8), st.integers(0, 10**6))
@settings(max_examples=15)
def test_the_error_of_merging(dtype, rank, seed):
    """Each weight is within half a unit in the last place, and what float32 rounds, of the exact sum."""
    torch.manual_seed(seed)
    holder = nn.Sequential(nn.Linear(16, 8).to(dtype))
    add_lora(holder, ["0"], rank, alpha=2 * rank)
    layer = shake(holder, seed)[0]
    assert layer.A.dtype == torch.promote_types(dtype, torch.float32)
    exact = layer.base.weight.detach().double() + 2 * (layer.B.detach().double() @ layer.A.detach().double())
    terms = layer.base.weight.detach().double().abs() + 2 * (layer.B.double().abs() @ layer.A.double().abs()).detach()
    merge_and_unload(holder)
    assert isinstance(holder[0], nn.Linear) and holder[0].weight.dtype == dtype
    error = (holder[0].weight.double() - exact).abs()
    sums = (rank + 3) * torch.finfo(layer.A.dtype).eps * terms  # rounding of the product and the sums
    assert (error <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + sums).all()


def test_half_precision_keeps_small_updates_until_it_merges():
    """1 + 2^-10 is 1 in bfloat16: the adapter has it, the merged weight cannot."""
    holder = nn.Sequential(nn.Linear(1, 1, bias=False).bfloat16())
    add_lora(holder, ["0"], 1)
    for matrix, value in ((holder[0].base.weight, 1.0), (holder[0].A, 1.0), (holder[0].B, 2**-10)):
        matrix.data.fill_(value)
    assert holder[0].merged_weight().item() == 1 + 2**-10
    assert merge_and_unload(holder)[0].weight.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_devices(device, dtype):
    model = add_lora(tiny(dtype=dtype).to(device), rank=2, alpha=4)
    tokens = whole(11, 2, 5).to(device)
    logits = model(tokens)
    assert logits.dtype == dtype and logits.device.type == device
    for loss in (documented_loss, published_loss):
        model.zero_grad()
        loss(model(tokens), tokens).total.backward()
        assert all(torch.isfinite(layer.B.grad).all() for layer in lora_layers(model).values())
    expected = shake(model)(tokens).float()
    atol = 1e-4 if dtype == torch.float32 else 0.2
    torch.testing.assert_close(merge_and_unload(model)(tokens).float(), expected, rtol=0, atol=atol)


def test_a_compiled_model_with_adapters():
    model, tokens = shake(add_lora(tiny(), rank=2)), whole(11, 2, 5)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), model(tokens))
    documented_loss(compiled(tokens), tokens).total.backward()
    assert all(layer.A.grad.abs().max() > 0 for layer in lora_layers(model).values())


def test_it_learns():
    """Sixteen random answers are learnt by two adapted layers a block, and kept when merged."""
    torch.manual_seed(0)
    model = tiny(dtype=torch.float32)
    questions, answers = whole(11, 16, 6), whole(11, 16, 6, seed=1)
    answers[:, :3] = -100
    add_lora(model, targets=("query", "value", "gate", "down"), rank=4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=0.02)
    first = documented_loss(model(questions), answers).total.item()
    for _ in range(60):
        optimiser.zero_grad()
        loss = documented_loss(model(questions), answers).total
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.7 * first
    last = documented_loss(model(questions), answers).total.item()
    assert documented_loss(merge_and_unload(model)(questions), answers).total.item() == pytest.approx(last, abs=1e-4)


# --- parity with PEFT and transformers, and PEFT's files ------------------------------------------------------------


def golden_model():
    """The Llama of the golden numbers, as ours."""
    return models.golden_model(GOLDEN["model"], GOLDEN["base"])


def matrices(model):
    """A and B of each adapter, by PEFT's names."""
    return {
        f"base_model.model.{hugging_face_name(name)}.lora_{part}.weight": getattr(layer, part)
        for name, layer in lora_layers(model).items()
        for part in "AB"
    }


def golden_folder(case, folder):
    """PEFT's files of a case, in a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(case["config"]))
    (folder / "adapter_model.safetensors").write_bytes(base64.b64decode(case["weights"]))
    return folder


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"rank {case['rank']}")
def test_an_adapter_of_peft(case, tmp_path):
    """PEFT's file in our model: its logits, loss, gradients of A and B, and merged weight; and the same file again."""
    model = load_adapter(golden_model(), golden_folder(case, tmp_path / "theirs"))
    tokens, labels = torch.tensor(case["tokens"]), torch.tensor(case["labels"])
    logits = model(tokens)
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=0, atol=2e-5)
    loss = published_loss(logits[:, :-1], labels[:, 1:])  # shifted once, here
    assert loss.total.item() == pytest.approx(case["loss"], abs=1e-5)
    loss.total.backward()
    found = {name: matrix.grad for name, matrix in matrices(model).items()}
    for name, gradient in case["gradients"].items():
        torch.testing.assert_close(found[name], torch.tensor(gradient), rtol=1e-4, atol=1e-5)

    save_adapter(model, tmp_path / "ours")
    ours, theirs = (load((tmp_path / name / "adapter_model.safetensors").read_bytes()) for name in ("ours", "theirs"))
    same(ours, theirs, 0)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    for name in ("peft_type", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "target_modules"):
        assert config[name] == case["config"][name], name

    merged = merge_and_unload(model).blocks[1].attention.value.weight
    torch.testing.assert_close(merged, torch.tensor(case["merged"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"rank {case['rank']}")
def test_add_lora_is_that_of_peft(case, tmp_path):
    """Which layers, and the scale: the golden adapter's numbers, put in by hand."""
    tensors = load(base64.b64decode(case["weights"]))
    model = add_lora(golden_model(), case["targets"], case["rank"], case["alpha"])
    assert tensors.keys() == matrices(model).keys()
    for name, matrix in matrices(model).items():
        matrix.data.copy_(tensors[name])
    logits = model(torch.tensor(case["tokens"]))
    torch.testing.assert_close(logits, torch.tensor(case["logits"]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("alpha", [None, 3.5])
def test_an_adapter_comes_back(alpha, tmp_path):
    model, tokens = shake(add_lora(tiny(), ("query", "up"), rank=2, alpha=alpha)), whole(11, 2, 5)
    save_adapter(model, tmp_path / "new" / "folder")
    again = load_adapter(tiny(), tmp_path / "new" / "folder")
    assert lora_layers(again).keys() == lora_layers(model).keys()
    assert torch.equal(again(tokens), model(tokens))
    assert all(p.requires_grad == q.requires_grad for p, q in zip(again.parameters(), model.parameters(), strict=True))
    save_adapter(shake(model, seed=1), tmp_path / "new" / "folder")  # over the old one
    assert torch.equal(load_adapter(tiny(), tmp_path / "new" / "folder")(tokens), model(tokens))
    assert {path.name for path in (tmp_path / "new" / "folder").iterdir()} == {*FILES}


def golden_llama():
    """The same Llama as transformers has it."""
    pytest.importorskip("transformers", reason="transformers is in the optional extra 'parity'")
    return llama_of(golden_model())


@pytest.mark.parametrize("alpha", [None, 8])
def test_peft_loads_ours(alpha, tmp_path):
    """On transformers' Llama with the same weights: the same logits, before and after merging."""
    peft = pytest.importorskip("peft", reason="PEFT is in the optional extra 'parity'")
    model = shake(add_lora(golden_model(), ("query", "value", "up"), rank=4, alpha=alpha))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(golden_llama(), tmp_path)
    tokens = whole(GOLDEN["model"]["vocabulary"], 2, 7)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)
        one, merged = theirs.merge_and_unload(), merge_and_unload(model)
        for i, block in enumerate(merged.blocks):
            there = one.model.layers[i]
            assert torch.equal(there.self_attn.q_proj.weight, block.attention.query.weight)
            assert torch.equal(there.mlp.up_proj.weight, block.feed_forward.up.weight)


def test_an_adapter_of_transformers_own_model(tmp_path):
    """Its layers keep their names: PEFT finds every matrix, and so do we, on a fresh model and on our own."""
    peft = pytest.importorskip("peft", reason="PEFT is in the optional extra 'parity'")
    tokens = whole(GOLDEN["model"]["vocabulary"], 2, 7)
    with torch.no_grad():
        plain = golden_llama()(tokens).logits
        llama = shake(add_lora(golden_llama(), ("q_proj", "v_proj"), rank=4))
        save_adapter(llama, tmp_path)
        expected = llama(tokens).logits
        assert (expected - plain).abs().max() > 0.1
        same(peft.PeftModel.from_pretrained(golden_llama(), tmp_path)(tokens).logits, expected, 1e-5)
        same(load_adapter(golden_llama(), tmp_path)(tokens).logits, expected, 0)
        same(load_adapter(golden_model(), tmp_path)(tokens), expected, 1e-5)


@pytest.mark.parametrize("alpha", [None, 6])
def test_the_transposed_layers_of_gpt2(alpha, tmp_path):
    """transformers' Conv1D has its weight as [in, out]: PEFT reads ours, we read PEFT's, and merging is exact."""
    peft = pytest.importorskip("peft", reason="PEFT is in the optional extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="transformers is in the optional extra 'parity'")

    def gpt2():
        torch.manual_seed(0)
        sizes = {"vocab_size": 20, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()

    tokens = whole(20, 2, 7)
    ours = shake(add_lora(gpt2(), ("c_attn", "c_proj"), rank=3, alpha=alpha))
    assert ours.transformer.h[0].attn.c_attn.A.shape == (3, 8)
    with torch.no_grad():
        expected = ours(tokens).logits
        assert (expected - gpt2()(tokens).logits).abs().max() > 0.01
        save_adapter(ours, tmp_path / "ours")
        theirs = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "ours")
        same(theirs(tokens).logits, expected, 1e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        same(load_adapter(gpt2(), tmp_path / "theirs")(tokens).logits, expected, 1e-6)
        same(merge_and_unload(ours)(tokens).logits, expected, 1e-5)


def test_a_stop_between_the_two_files_leaves_no_new_weights_with_old_scales(tmp_path, monkeypatch):
    save_adapter(add_lora(golden_model(), rank=2, alpha=4), tmp_path)
    write = sft.write_bytes

    def stopping(path, content):
        if path.name == "adapter_config.json":
            raise OSError("disk full")
        write(path, content)

    monkeypatch.setattr(sft, "write_bytes", stopping)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(add_lora(golden_model(), rank=2, alpha=8), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        load_adapter(golden_model(), tmp_path)


def test_what_peft_has_no_name_for_is_not_stored(tmp_path):
    around = nn.Sequential(add_lora(golden_model(), rank=2))
    with pytest.raises(ValueError, match=r"model must be the LanguageModel itself: .* PEFT has no names"):
        save_adapter(around, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_of_another_model_keep_their_names(tmp_path):
    save_adapter(add_lora(nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 3))}), ["0"], rank=1), tmp_path)
    tensors = load((tmp_path / "adapter_model.safetensors").read_bytes())
    assert set(tensors) == {f"base_model.model.layers.0.lora_{part}.weight" for part in "AB"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_layer_is_that_of_peft_to_the_bit(dtype):
    peft = pytest.importorskip("peft", reason="PEFT is in the optional extra 'parity'")
    torch.manual_seed(0)
    linear = nn.Linear(24, 16).to(dtype)
    ours = LoRALinear(copy.deepcopy(linear), rank=4, alpha=6)
    ours.B.data.normal_()
    theirs = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.lora_A.default.weight.data.copy_(ours.A.data)
    layer.lora_B.default.weight.data.copy_(ours.B.data)
    x, slope = random(3, 5, 24, dtype=torch.float32).to(dtype), random(3, 5, 16, seed=1).to(dtype)
    here, there = ours(x), layer(x)
    assert here.dtype == there.dtype == dtype and torch.equal(here, there)
    here.backward(slope)
    there.backward(slope)
    assert torch.equal(ours.A.grad, layer.lora_A.default.weight.grad)
    assert torch.equal(ours.B.grad, layer.lora_B.default.weight.grad)
    with torch.no_grad():
        assert torch.equal(merge_and_unload(nn.Sequential(ours))[0].weight, theirs.merge_and_unload()[0].weight)


# --- bad input --------------------------------------------------------------------------------------------------------

LOGITS, LABELS = torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.long)
MASKED = LABELS.clone()
MASKED[0] = MASKED[2] = -100


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"labels": MASKED}, ValueError, r"labels != -100 counts no token of the rows \[0, 2\]"),
        ({"labels": LABELS + 5}, ValueError, "labels .*-100.* from 0 to 4; got ids from 5 to 5"),
        ({"labels": LABELS.double()}, TypeError, "labels.*got dtype torch.float64"),
        ({"labels": LABELS[:, 1:]}, ValueError, r"labels must be \[3, 4\] on cpu.*; got \[3, 3\]"),
        ({"labels": LABELS.to("meta")}, ValueError, "labels must be .* on cpu, as logits; got .* on meta"),
        ({"logits": LOGITS[0]}, ValueError, r"logits.*got shape \[4, 5\]"),
        ({"ignore_index": None}, TypeError, "ignore_index must be a whole number"),
    ],
)
def test_bad_labels_are_named(change, error, says):
    with pytest.raises(error, match=says):
        published_loss(**{"logits": LOGITS, "labels": LABELS, **change})


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: supervised([], [], 0), ValueError, "prompts, and one answer to each; got 0 and 0"),
        (lambda: supervised([[1], [2]], [[1], []], 0), ValueError, r"of the rows \[1\] are empty"),
        (lambda: documented_loss(LOGITS / 0, LABELS).values(), NonFiniteLoss, "term 'cross_entropy' .* is nan"),
        (lambda: softmax(torch.tensor([0.0, math.inf])), ValueError, "logits.*1 of its 2 are NaN or infinite"),
        (lambda: log_sum_exp_loss(LOGITS, LABELS + 5), ValueError, "tokens.*from 0 to 4; got ids from 5 to 5"),
        (lambda: token_cross_entropy(LOGITS + 0.2, LABELS[0]), ValueError, r"tokens.*\[3, 4\]; got \[4\]"),
        (lambda: sentence_mean(torch.full((1, 9), 1e38), torch.ones(1, 9)), NonFiniteLoss, "the sums of token_losses"),
        (lambda: sentence_mean(LOGITS[0], torch.ones(4, 5).tril(-1)), ValueError, r"no token of the .*\[0\]"),
        (lambda: LoRALinear(nn.Linear(4, 3), 0), ValueError, "rank must be at least 1; got 0"),
        (lambda: LoRALinear(nn.Linear(4, 3), 4), ValueError, "rank must be at most 3, as the weight of base is 3 x 4"),
        (lambda: LoRALinear(nn.Linear(4, 3), 2, 0), ValueError, "alpha.*greater than 0; got 0"),
        (
            lambda: LoRALinear(nn.Embedding(4, 3), 2),
            TypeError,
            "base must be an nn.Linear, or a Conv1D .*; got Embedding",
        ),
        (lambda: add_lora(tiny(), rank=9), ValueError, "rank must be at most 8, as the weight of .*value is 8 x 16"),
        (lambda: add_lora(tiny(), targets=("query", "q_proj")), ValueError, "targets.*some of .*'query'.*'q_proj'"),
        (lambda: add_lora(tiny(), targets=()), ValueError, r"targets must be several names.*got \(\)"),
        (lambda: add_lora(tiny(), targets="query"), ValueError, "targets must be several names.*got 'query'"),
        (lambda: add_lora(add_lora(tiny(), rank=2)), ValueError, "has LoRA layers already.*blocks.0.attention.query"),
        (lambda: save_adapter(tiny(), "nowhere"), ValueError, "no LoRA layers; add_lora puts them in"),
        (lambda: load_adapter(tiny(), "nowhere"), FileNotFoundError, "nowhere/adapter_config.json"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_an_error_leaves_the_model_as_it_was():
    model = tiny()
    for change in ({"rank": 9}, {"targets": ("query", "other")}, {"rank": 2, "alpha": math.nan}):
        with pytest.raises(ValueError):
            add_lora(model, **change)
        assert not lora_layers(model) and all(parameter.requires_grad for parameter in model.parameters())
    model = add_lora(tiny(dtype=torch.float16), rank=2)
    lora_layers(model)["blocks.1.attention.value"].A.data.fill_(300)
    lora_layers(model)["blocks.1.attention.value"].B.data.fill_(300)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"merged weight of blocks.1.attention.value.*NaN or infinite"):
        merge_and_unload(model)
    assert len(lora_layers(model)) == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class PreTrainedModel(nn.Module):
    """What transformers calls its models."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


def test_what_is_around_a_model_is_not_in_the_names_of_its_adapters(tmp_path):
    """Or PEFT would find none of them, warn, and give the model as it was."""
    for place, wrap in enumerate((torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model)))):
        save_adapter(wrap(add_lora(PreTrainedModel(), ("layer",), rank=2)), tmp_path / str(place))
        names = load((tmp_path / str(place) / "adapter_model.safetensors").read_bytes())
        assert names.keys() == {f"base_model.model.layer.lora_{part}.weight" for part in "AB"}
    with pytest.raises(ValueError, match="model must be the PreTrainedModel itself: for one inside a Sequential PEFT"):
        save_adapter(nn.Sequential(add_lora(PreTrainedModel(), ("layer",), rank=2)), tmp_path / "inside")
    assert not (tmp_path / "inside").exists()


def test_a_weight_that_another_layer_uses_too_is_not_merged():
    model = PreTrainedModel()
    model.head, model.embedding = nn.Linear(4, 9, bias=False), nn.Embedding(9, 4)
    model.head.weight = model.embedding.weight
    add_lora(model, ("head",), rank=2)
    before = model.embedding.weight.clone()
    with pytest.raises(ValueError, match="head shares its weight with another layer, which merging would change"):
        merge_and_unload(model)
    assert torch.equal(model.embedding.weight, before) and isinstance(model.head, LoRALinear)


def test_adapters_of_several_ranks_are_not_stored(tmp_path):
    model = add_lora(tiny(), rank=2)
    model.blocks[0].attention.key = LoRALinear(model.blocks[0].attention.key, rank=3)
    with pytest.raises(ValueError, match=r"one rank and one alpha.*\(3, 3.0\)"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config, tensors: config.update(peft_type="IA3"), "asks for peft_type='IA3'"),
        (lambda config, tensors: config.update(use_rslora=True, alpha_pattern={"q": 1}), "asks for .*rslora"),
        *(
            (
                lambda config, tensors, start=start: config.update(init_lora_weights=start),
                f"init_lora_weights='{start}'",
            )
            for start in ("pissa", "pissa_niter_4", "olora", "corda", "loftq")
        ),
        (lambda config, tensors: config.update(use_dora=True), "asks for use_dora"),
        (lambda config, tensors: config.update(r=2), r"lora_A.weight \[3, 16\], wants \[2, 16\]"),
        (lambda config, tensors: config.update(lora_alpha=0), "alpha.*greater than 0"),
        (lambda config, tensors: tensors.popitem(), r"matrices A and B of its rank.*weight missing, wants \["),
        (lambda config, tensors: tensors.clear(), "got none"),
        (lambda config, tensors: tensors.update(other=torch.ones(1)), r"got other \[1\], wants no such layer"),
        (lambda config, tensors: tensors[next(iter(tensors))].fill_(math.nan), "of the adapter .*NaN"),
    ],
)
def test_adapters_that_do_not_fit(change, says, tmp_path):
    case = GOLDEN["cases"][0]
    folder = golden_folder(case, tmp_path)
    config, tensors = copy.deepcopy(case["config"]), load(base64.b64decode(case["weights"]))
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(save(tensors))
    model = golden_model()
    with pytest.raises(ValueError, match=says):
        load_adapter(model, folder)
    assert not lora_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", FILES)
def test_broken_files(name, tmp_path):
    folder = golden_folder(GOLDEN["cases"][0], tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        load_adapter(golden_model(), folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(golden_model(), folder)


def test_loss_terms_is_what_every_loss_returns():
    for loss in (documented_loss(LOGITS, LABELS), published_loss(LOGITS, LABELS)):
        assert isinstance(loss, LossTerms) and list(loss.terms) == ["cross_entropy"]
        assert loss.total.item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
@pytest.mark.parametrize("loss", [documented_loss, published_loss])
def test_labels_of_any_kind_mean_the_same(loss, dtype):
    """156 is what -100 is in eight bits; here it is a token."""
    labels = torch.tensor([[3, 156], [120, 9]])
    logits = random(2, 2, 160)
    assert loss(logits, labels.to(dtype)).total == loss(logits, labels).total


def test_what_is_no_token_id_is_no_part_of_a_prompt():
    for prompts, answers, padding, words in [
        ([[1.7, 2]], [[3]], 0, "lists of token ids, whole numbers; got float"),
        ([[1, 2]], [[True]], 0, "lists of token ids, whole numbers; got bool"),
        ([[1, 2]], [[3]], True, "padding must be a whole number"),
        ([[1, 2]], [[3]], 0.5, "padding must be a whole number"),
    ]:
        with pytest.raises(TypeError, match=words):
            supervised(prompts, answers, padding)
    tokens, _, _ = supervised([[np.uint8(200), 1]], [[2]], np.int64(0))
    assert tokens.tolist() == [[200, 1]]
