"""What a GPU alone would show: mixed devices, float64, host waits, graphs that break. pretend.py takes its place."""

import copy
from collections import Counter
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from mini_impl.finetuning import dapo, grpo, methods, sft
from mini_impl.finetuning.language_model import LanguageModel
from mini_impl.finetuning.tasks import sums
from mini_impl.finetuning.train import fine_tune
from mini_impl.forecasting import FORECASTERS, loss_of
from mini_impl.forecasting.data import Windows
from mini_impl.forecasting.layers import Dropout
from mini_impl.forecasting.patchtst import MaskedPatchTST, masked_loss
from mini_impl.forecasting.train import fit
from tests import pretend
from tests.tensors import random, same, whole

VARIANTS = ("documented", "published")


@pytest.fixture
def elsewhere():
    with pretend.device() as device:
        yield device


# --- the pretend device itself ----------------------------------------------------------------------------------------


def test_it_computes_what_the_cpu_computes_and_says_that_it_is_elsewhere(elsewhere):
    on_cpu = random(3, 4, dtype=torch.float32)
    there = on_cpu.to(elsewhere)
    assert there.device == elsewhere and not there.is_cpu and there.softmax(1).device == elsewhere
    same((there @ there.mT).cpu(), on_cpu @ on_cpu.mT)
    assert torch.arange(3, device=elsewhere).tolist() == torch.tensor([0, 1, 2], device=elsewhere).tolist() == [0, 1, 2]


def test_two_devices_do_not_mix(elsewhere):
    there = torch.zeros(3, device=elsewhere)
    with pytest.raises(RuntimeError, match=r"add.*two devices"):
        there + torch.zeros(3)
    same((there + torch.tensor(2.0)).cpu(), torch.full((3,), 2.0))  # one number is sent along, as on a GPU


def test_it_has_no_float64(elsewhere):
    with pytest.raises(TypeError, match="float64"):
        random(3).to(elsewhere)
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, device=elsewhere).double()


@pytest.mark.parametrize(
    "ask",
    [
        lambda there: there.tolist(),
        torch.Tensor.cpu,
        torch.Tensor.nonzero,
        torch.Tensor.unique,
        lambda there: there.sum().item(),
        lambda there: bool(there.any()),
        lambda there: there[there > 0],
        lambda there: there[[0, 2]],
        lambda there: there[torch.tensor([0, 2])],
        lambda there: torch.equal(there, there),
        lambda there: torch.allclose(there, there),
        lambda there: torch.zeros(3).copy_(there),
        lambda there: torch.linalg.eigvalsh(there * there[:, None]),
    ],
)
def test_what_makes_the_host_wait_is_counted(elsewhere, ask):
    there = torch.ones(3, device=elsewhere)
    with pretend.waits() as waits:
        ask(there)
        with pretend.uncounted():
            ask(there)
    assert len(waits) == 1


def test_what_stays_in_the_queue_is_not_counted(elsewhere):
    there = torch.ones(3, device=elsewhere)
    with pretend.waits() as waits:
        there.masked_fill(there > 0, 1.5), there.sort(), there.aminmax(), there[:2], there.isfinite().all()
        there[there > 1] = 0.5
        there[torch.arange(2, device=elsewhere)] += torch.ones(2).to(elsewhere)
    assert not waits


# --- forecasters: a whole training ------------------------------------------------------------------------------------

# torch.compile looks through a cached function, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
SIZES = {"history": 24, "horizon": 8}
SMALL = {
    "dlinear": {"kernel_size": 5},
    "patchtst": {"patch_length": 8, "stride": 4, "width": 8, "heads": 2, "layers": 1, "feed_forward_width": 12},
    "itransformer": {"width": 8, "heads": 2, "layers": 1, "feed_forward_width": 12},
    "timesnet": {"variables": 3, "width": 4, "feed_forward_width": 4, "kernels": 2, "layers": 2, "top_k": 3},
    "timexer": {"variables": 3, "patch_length": 8, "width": 8, "heads": 2, "layers": 1, "feed_forward_width": 12},
}
TRAININGS = {f"{name}-{variant}": (name, variant) for name in FORECASTERS for variant in VARIANTS}


def small(name: str, variant: str = "published") -> torch.nn.Module:
    """A small model, which returns what its loss of this variant needs."""
    make = FORECASTERS[name]
    torch.manual_seed(0)
    needs = make.documented_needs if variant == "documented" else {}
    return make(**SIZES, **SMALL.get(name, {}), **needs)


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    """The model, which then computes the same whoever draws the random numbers."""
    for part in model.modules():
        if isinstance(part, Dropout):
            part.rate = 0.0
    return model


def windows(rows: int, seed: int) -> Windows:
    return Windows(random(rows, 3, seed=seed, dtype=torch.float32).cumsum(0), **SIZES)


def train(model, loss, device, **how) -> tuple[dict, list[list[str]]]:
    """The terms of the loss of every step of one epoch, and the host waits between one step's end and the next's."""
    ends = []
    with pretend.waits() as waits:
        hook = register_optimizer_step_post_hook(lambda *_: ends.append(len(waits)))
        how |= {"epochs": 1, "batch_size": 8, "device": device}
        training = fit(model, windows(64, 0), windows(40, 1), loss, **how)
    hook.remove()
    return training.terms, [waits[start:end] for start, end in pairwise(ends)]


def check_training(model, loss, allowed: int, device, **how) -> None:
    """A training there is that of the CPU, and the host waits in no step more often than allowed."""
    there = copy.deepcopy(model)
    terms, _ = train(model, loss, "cpu", **how)
    terms_there, waits = train(there, loss, device, **how)
    same(terms_there, terms, 1e-4)
    assert max(map(len, waits)) <= allowed, Counter(waits[0])


@pytest.mark.parametrize(("name", "variant"), TRAININGS.values(), ids=TRAININGS)
def test_a_training_of_every_forecaster_waits_twice_a_step(elsewhere, name, variant):
    """For the look at the history and for the terms of the loss. TimesNet asks which periods there are besides."""
    model = small(name, variant)
    check_training(model, loss_of(FORECASTERS[name], variant), 4 if name == "timesnet" else 2, elsewhere)


def test_a_training_with_masks_waits_twice_a_step(elsewhere):
    model = MaskedPatchTST(24, patch_length=4, width=8, heads=2, layers=1, feed_forward_width=12)
    check_training(model, masked_loss, 2, elsewhere, score=lambda model, part: 0.0)  # it makes no forecast to judge


# --- fine-tuning: whole steps -----------------------------------------------------------------------------------------


def tune(make_method, device, monkeypatch) -> tuple[dict, list[list[str]]]:
    """The terms of the loss of every update of three steps, and the host waits of each step, sampling left out."""
    model, task = sums()
    method = make_method(task)
    sample, updates, steps = methods.sample, method.updates, []

    def sample_uncounted(*args, **kwargs):
        with pretend.uncounted():
            return sample(*args, **kwargs)

    def one_step(*args):
        with pretend.waits() as waits:  # until the trainer asks for another update and there is none
            yield from updates(*args)
        steps.append(waits)

    monkeypatch.setattr(methods, "sample", sample_uncounted)
    monkeypatch.setattr(method, "updates", one_step)
    tuning = fine_tune(model, method, steps=3, questions=2, device=device)
    monkeypatch.undo()
    return tuning.terms, steps


FEW = {"sft": {"sequences": 16}, "grpo": {"prompts": 4, "group_size": 4}, "dapo": {}}
METHODS = {
    f"{name}-{variant}": partial(methods.METHODS[name, variant], **FEW[name])
    for name, variant in methods.METHODS
    if name != "dapo"
}
METHODS["grpo-contrastive"] = partial(methods.DocumentedGRPO, weights="contrastive", **FEW["grpo"])
METHODS["grpo-length"] = partial(methods.PublishedGRPO, reduce_by="length", **FEW["grpo"])
METHODS["dapo-documented"] = partial(methods.DocumentedDAPO, sequences=16)
METHODS["dapo-gradient norm"] = partial(methods.DocumentedDAPO, sequences=16, score="gradient norm")
METHODS["dapo-published"] = partial(methods.PublishedDAPO, **FEW["grpo"])
METHODS["dapo-filter"] = partial(methods.PublishedDAPO, overlong="filter", **FEW["grpo"])


@pytest.mark.parametrize("method", METHODS)
def test_a_fine_tuning_waits_few_times_a_step(elsewhere, monkeypatch, method):
    terms, _ = tune(METHODS[method], "cpu", monkeypatch)
    terms_there, waits = tune(METHODS[method], elsewhere, monkeypatch)
    same(terms_there, terms, 1e-4)
    assert max(map(len, waits)) <= (3 if method.startswith("sft") else 10), Counter(max(waits, key=len))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compiled(function):
    """What torch.compile makes of a function: one graph for all sizes, or it raises. To translate it takes minutes."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=True, backend="eager")


@pytest.mark.parametrize("name", [name for name in FORECASTERS if name != "timesnet"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_forecaster_but_timesnet_is_one_graph(name, variant):
    model, loss = small(name, variant).eval(), loss_of(FORECASTERS[name], variant)
    history, target = (random(2, steps, 3, seed=steps, dtype=torch.float32) for steps in SIZES.values())

    def step(history, target):
        return loss(model(history), target).total

    check_graph(step, [history, target], model.parameters())


@pytest.mark.parametrize("padding", [None, 2])
def test_a_language_model_is_one_graph(padding):
    torch.manual_seed(0)
    model, tokens = LanguageModel(13, width=8, layers=2, heads=2, key_value_heads=1), whole(13, 3, 7)
    mask = None if padding is None else torch.arange(7) >= torch.tensor([[0], [padding], [1]])
    check_graph(lambda tokens: model(tokens, mask).square().mean(), [tokens], model.parameters())


LOGPROBS, OLD, REF = (-random(6, 5, seed=seed, dtype=torch.float32).abs() for seed in range(3))
MASK = torch.arange(5) < torch.tensor([[5], [3], [1], [5], [2], [4]])
ADVANTAGES, LABELS = random(6, dtype=torch.float32), whole(4, 6, 5).where(MASK, -100)
LOSSES = {
    "grpo": lambda new: grpo.published_loss(new, OLD, ADVANTAGES, MASK, REF, kl_weight=0.1),
    "grpo-length": lambda new: grpo.published_loss(new, OLD, ADVANTAGES, MASK, reduce_by="length", max_length=5),
    "dapo": lambda new: dapo.published_loss(new, OLD, ADVANTAGES, MASK),
    "sft": lambda new: sft.published_loss(new[..., None] * torch.arange(4.0), LABELS),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_published_loss_is_one_graph(loss):
    logprobs = LOGPROBS.clone().requires_grad_()
    check_graph(lambda logprobs: LOSSES[loss](logprobs).total, [logprobs], [logprobs])


def check_graph(function, inputs, parameters) -> None:
    """One graph computes the same value and gradients."""
    parameters = list(parameters)
    plain, graph = function(*inputs), compiled(function)(*inputs)
    same(graph, plain, 1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(value, parameters) for value in (graph, plain)), strict=True):
        same(ours, theirs, 1e-5)
