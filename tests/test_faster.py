"""The switches of a training's speed: bfloat16, and torch.compile."""

import copy
from functools import partial

import pytest
import torch

from mini_impl import faster
from mini_impl.finetuning import METHODS, fine_tune, sums
from mini_impl.finetuning.train import _faster_blocks
from mini_impl.forecasting import FORECASTERS, evaluate, fit, loss_of
from mini_impl.forecasting.patchtst import MaskedPatchTST, masked_loss
from tests.tensors import random, same
from tests.test_devices import FEW, TRAININGS, small, windows, without_dropout

QUICK = {"epochs": 2, "batch_size": 8, "progress": False}
FAST = [pytest.param(False, "bf16", id="bf16"), pytest.param(True, "float32", id="compiled")]


@pytest.fixture
def without_a_compiler(monkeypatch):
    """torch.compile that finds the graphs, which takes little, and leaves their operations as they are."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def trained(name: str, variant: str, **how):
    model = without_dropout(small(name, variant))  # compiled, it draws other numbers
    training = fit(model, windows(64, 0), windows(40, 1), loss_of(FORECASTERS[name], variant), **QUICK, **how)
    return model, training


@pytest.mark.parametrize(("compile", "precision"), FAST)
@pytest.mark.parametrize(("name", "variant"), TRAININGS.values(), ids=TRAININGS)
def test_a_fast_training_ends_near_the_plain_one(without_a_compiler, name, variant, compile, precision):
    plain, exact = trained(name, variant)
    model, training = trained(name, variant, compile=compile, precision=precision)
    near = 1e-5 if precision == "float32" else 0.05
    same(training.terms, exact.terms, near)
    same(evaluate(model, windows(40, 1)).mse, evaluate(plain, windows(40, 1)).mse, near)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_bf16_rounds_the_products_and_returns_float32():
    torch.manual_seed(0)
    model, history = FORECASTERS["itransformer"](24, 8).eval(), random(3, 24, 5, dtype=torch.float32)
    exact, rounded = model(history).prediction, faster.faster(model, False, "bf16")(history).prediction
    assert rounded.dtype == torch.float32
    assert 1e-6 < (rounded - exact).abs().max() < 0.05


def test_every_tensor_that_a_model_returns_is_float32_again():
    model = MaskedPatchTST(24, patch_length=4, width=8, heads=2, layers=1, feed_forward_width=12)
    training = fit(
        model, windows(64, 0), windows(40, 1), masked_loss, **QUICK, precision="bf16", score=lambda model, part: 0.0
    )
    assert len(training.validation) == 2


@pytest.mark.parametrize(("compile", "precision"), FAST)
@pytest.mark.parametrize(("method", "form"), METHODS)
def test_a_fast_fine_tuning_ends_near_the_plain_one(without_a_compiler, method, form, compile, precision):
    few = {"sequences": 16} if (method, form) == ("dapo", "documented") else FEW[method] or FEW["grpo"]
    if compile and METHODS[method, form].second_derivative:
        with pytest.raises(ValueError, match="compile=True has no second derivative, which DocumentedDAPO takes"):
            tuned(method, form, few, compile=True)
        return
    same(tuned(method, form, few, compile=compile, precision=precision), tuned(method, form, few), 0.05)


def tuned(method: str, form: str, few: dict, **how) -> dict:
    model, task = sums()
    training = fine_tune(model, METHODS[method, form](task, **few), steps=2, questions=2, progress=False, **how)
    assert "_hidden" not in vars(model)  # it is the class's method again
    return {name: curve[:1] for name, curve in training.terms.items()}  # later ones answer with other weights


def test_the_blocks_are_the_plain_ones_again_after_an_error(without_a_compiler):
    model, _ = sums()
    tokens = torch.arange(8)[None]
    exact = model.hidden(tokens)
    with pytest.raises(KeyError), _faster_blocks((model,), True, "bf16")():
        assert (model.hidden(tokens) - exact).abs().max() > 1e-4
        raise KeyError
    assert torch.equal(model.hidden(tokens), exact)


@pytest.mark.slow
def test_what_the_compiler_makes_computes_the_same():
    plain, exact = trained("dlinear", "documented")
    model, training = trained("dlinear", "documented", compile=True)
    same(training.terms, exact.terms, 1e-5)
    same(model.state_dict(), plain.state_dict(), 1e-5)


def test_without_a_compiler_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    model = copy.deepcopy(small("dlinear"))
    with pytest.raises(RuntimeError, match=r"compile=True needs what torch.compile needs: a C\+\+ compiler"):
        faster.faster(model, True, "float32")(random(2, 24, 3, dtype=torch.float32))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"precision": "fp16"}, ValueError, "precision must be one of 'float32', 'bf16'; got 'fp16'"),
        ({"compile": 1}, TypeError, "compile must be True or False; got 1"),
    ],
)
def test_wrong_switches(wrong, error, message):
    with pytest.raises(error, match=message):
        fit(small("dlinear"), windows(64, 0), windows(40, 1), loss_of(FORECASTERS["dlinear"], "published"), **wrong)
    model, task = sums()
    with pytest.raises(error, match=message):
        fine_tune(model, METHODS["sft", "published"](task), steps=1, **wrong)
