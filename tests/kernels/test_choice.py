"""Whether a kernel or torch computes: by device, size, card, environment, without Triton, while torch compiles."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mini_impl import kernels, results
from mini_impl.finetuning import policy
from mini_impl.forecasting import dlinear
from mini_impl.kernels import clipped_loss, decomposition, logprob, wanted
from tests import pretend
from tests.kernels.proof import close
from tests.kernels.proof import results as results_of
from tests.tensors import random, whole
from tests.test_devices import check_graph

CPU = torch.zeros(8)


class OnCuda:
    """What `wanted` looks at of a CUDA tensor of eight entries."""

    is_cuda, is_cpu = True, False

    def numel(self) -> int:
        return 8


@pytest.fixture
def environment(monkeypatch):
    """Sets the environment: none of ours, until the test says so; OnCuda is taken for a plain tensor."""
    monkeypatch.delenv("MINI_IMPL_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "Tensor", OnCuda)
    monkeypatch.setattr(kernels, "card", lambda: "Tesla T4")
    monkeypatch.setattr(kernels, "verified", lambda: ["NVIDIA A100-SXM4-80GB", "Tesla T4"])
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    return monkeypatch


# --- by itself --------------------------------------------------------------------------------------------------------


def test_by_itself_a_kernel_takes_large_tensors_of_a_verified_card(environment):
    assert wanted(OnCuda(), 8) and wanted(OnCuda(), 0) and not wanted(OnCuda(), 9)


@pytest.mark.parametrize(
    ("name", "other"), [("card", "NVIDIA L4"), ("card", None), ("verified", []), ("_installed", False)]
)
def test_by_itself_it_takes_none_of_another_card_nor_without_triton(environment, name, other):
    environment.setattr(kernels, name, lambda: other)
    assert not wanted(OnCuda(), 8)


def test_by_itself_it_takes_none_of_the_cpu_though_triton_interprets(environment):
    environment.setattr(kernels, "Tensor", torch.Tensor)
    assert not wanted(CPU, 0)
    environment.setenv("TRITON_INTERPRET", "1")
    assert not wanted(CPU, 0)


# --- when it is asked for ---------------------------------------------------------------------------------------------


def test_asked_for_it_takes_any_cuda_tensor(environment):
    environment.setenv("MINI_IMPL_KERNELS", "1")
    environment.setattr(kernels, "verified", list)
    assert wanted(OnCuda(), 9)


def test_asked_for_it_takes_those_of_the_cpu_only_if_triton_interprets(environment):
    environment.setenv("MINI_IMPL_KERNELS", "1")
    environment.setattr(kernels, "Tensor", torch.Tensor)
    for value, takes in ((None, False), ("0", False), ("1", True)):
        if value is not None:
            environment.setenv("TRITON_INTERPRET", value)
        assert wanted(CPU, 9) == takes
        assert wanted(nn.Parameter(CPU), 9) == takes


def test_asked_not_to_it_takes_none(environment):
    environment.setenv("MINI_IMPL_KERNELS", "0")
    environment.setenv("TRITON_INTERPRET", "1")
    assert not wanted(OnCuda(), 0)
    environment.setattr(kernels, "Tensor", torch.Tensor)
    assert not wanted(CPU, 0)


def test_asked_for_without_triton_it_says_what_is_missing(environment):
    environment.setenv("MINI_IMPL_KERNELS", "1")
    environment.setattr(kernels, "_installed", lambda: False)
    with pytest.raises(ImportError, match=r'which need Triton: pip install "mini_impl\[gpu\]"'):
        wanted(OnCuda(), 0)
    environment.setattr(kernels, "Tensor", torch.Tensor)
    assert not wanted(CPU, 0)  # here none could run


@pytest.mark.parametrize("value", ["", "yes", "2", "01"])
def test_the_environment_says_0_or_1(environment, value):
    environment.setenv("MINI_IMPL_KERNELS", value)
    with pytest.raises(ValueError, match=f"MINI_IMPL_KERNELS must be 0 or 1, or not set; got '{value}'"):
        wanted(OnCuda(), 0)


class Subclass(torch.Tensor):
    pass


def test_it_never_takes_what_is_no_plain_tensor_of_the_cpu_or_cuda(environment):
    environment.setenv("MINI_IMPL_KERNELS", "1")
    environment.setenv("TRITON_INTERPRET", "1")
    environment.setattr(kernels, "Tensor", torch.Tensor)
    for other in (CPU.as_subclass(Subclass), CPU.to("meta"), None, [1.0], OnCuda()):
        assert not wanted(other, 0)
    with pretend.device() as device:
        assert not wanted(CPU.to(device), 0)


# --- the card and what is known of it ---------------------------------------------------------------------------------


def test_the_card_is_that_of_cuda_and_none_where_there_is_none(monkeypatch):
    kernels.card.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.card() is None
    kernels.card.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert kernels.card() == "Tesla T4"
    kernels.card.cache_clear()


@pytest.mark.parametrize("there", [True, False])
def test_verified_are_the_cards_that_the_result_file_says_passed(monkeypatch, tmp_path, there):
    cards = {"Tesla T4": {"passed": True}, "NVIDIA L4": {"passed": False}, "NVIDIA A10": {"passed": "in part"}}
    if there:
        (tmp_path / "gpu.json").write_text(json.dumps({"cards": cards}))
    monkeypatch.setattr(results, "_folder", lambda: tmp_path)
    kernels.verified.cache_clear()
    assert kernels.verified() == (["Tesla T4"] if there else [])
    kernels.verified.cache_clear()


# --- the decorator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["0", "1"])
def test_a_decorated_function_keeps_its_lines_and_its_arguments(environment, asked):
    environment.setenv("MINI_IMPL_KERNELS", asked)
    took = SimpleNamespace(kernel=0)

    def kernel(first, second=2):
        took.kernel += 1
        return second

    @kernels.on_gpu(kernel, least=0)
    def function(first, second=2):
        """As documented."""
        return second

    tensor = OnCuda()
    got = [function(tensor), function(tensor, 3), function(first=tensor), function(second=4, first=tensor)]
    assert got == [2, 3, 2, 4] and took.kernel == (4 if asked == "1" else 0)
    assert function.__doc__ == "As documented." and function.__name__ == "function"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        function(second=1)
    assert function(CPU) == 2 and took.kernel == (4 if asked == "1" else 0)


# --- the three functions ----------------------------------------------------------------------------------------------

LOGITS, TOKENS = random(4, 6, 11, dtype=torch.float32), whole(11, 4, 6)
LOGPROBS, OLD = (-random(4, 6, seed=seed, dtype=torch.float32).abs() for seed in range(2))
ADVANTAGES, MASK = random(4, dtype=torch.float32), torch.arange(6) < torch.tensor([[6], [3], [1], [4]])
CHOICES = {  # what a gradient is wanted for, and what else is given
    "decomposition": (decomposition.decompose, LOGITS, 3),
    "dlinear": (dlinear.decompose, LOGITS, 3),
    "logprob": (logprob.token_logprobs, LOGITS, TOKENS, 0.7),
    "policy": (policy._token_logprobs, LOGITS, TOKENS),
    "clipped_loss by token": (clipped_loss.clipped_loss, LOGPROBS, OLD, ADVANTAGES, MASK, 0.2, 0.3, "token"),
    "clipped_loss by sequence": (clipped_loss.clipped_loss, LOGPROBS, OLD, ADVANTAGES, MASK),
}
CHOICES = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@CHOICES
@pytest.mark.parametrize("asked", [None, "1"])
def test_on_another_device_torch_computes_and_the_host_does_not_wait(environment, choice, asked):
    environment.setattr(kernels, "Tensor", torch.Tensor)
    if asked:
        environment.setenv("MINI_IMPL_KERNELS", asked)
    function, leaf, *given = choice
    expected = results_of(function, leaf, *given)
    with pretend.device() as device:
        given = [value.to(device) if isinstance(value, torch.Tensor) else value for value in given]
        with pretend.waits() as waits:
            outputs, gradient = results_of(function, leaf.to(device), *given)
        got = [value.cpu() for value in (*outputs, gradient)]
    assert len(waits) == (1 if function is dlinear.decompose else 0), waits  # its look at the series
    close(got, [*expected[0], expected[1]], 1e-6)


@CHOICES
@pytest.mark.parametrize("asked", [None, "1"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_torch_compiles_one_graph_of_it(environment, choice, asked):
    environment.setattr(kernels, "Tensor", torch.Tensor)
    environment.setenv("TRITON_INTERPRET", "1")
    if asked:
        environment.setenv("MINI_IMPL_KERNELS", asked)
    function, leaf, *given = choice
    leaf = leaf.clone().requires_grad_()

    def total(leaf):
        outputs = function(leaf, *given)
        return sum(output.square().sum() for output in (outputs if isinstance(outputs, tuple) else [outputs]))

    check_graph(total, [leaf], [leaf])


# --- without Triton ---------------------------------------------------------------------------------------------------

USE = """
import sys, torch
import mini_impl, mini_impl.finetuning.policy, mini_impl.forecasting.dlinear
from mini_impl.kernels import clipped_loss, decomposition, logprob, roofline

def use():
    for part in (decomposition.decompose, mini_impl.forecasting.dlinear.decompose):
        assert part(torch.ones(1, 5, 2), 3)[0].sum() == 10
    logits, tokens = torch.zeros(3, 4, requires_grad=True), torch.zeros(3, dtype=torch.long)
    logprob.token_logprobs(logits, tokens).sum().backward()
    mini_impl.finetuning.policy.token_logprobs(logits, tokens)
    ones = torch.ones(2, 3)
    assert clipped_loss.clipped_loss(ones, ones, ones[:, 0], ones) == -1
    decomposition.traffic(1, 5, 2, 3), logprob.traffic(3, 4), clipped_loss.traffic(2, 3)
"""
NOT_IMPORTED = "use(); print('triton' in sys.modules)"
NOT_INSTALLED = """
use()
import os
os.environ["MINI_IMPL_KERNELS"] = "0"
use()
os.environ["MINI_IMPL_KERNELS"] = "1"
try:
    use()
except ImportError as error:
    print(error)
"""


def run(code: str, monkeypatch, **environment) -> str:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def test_triton_is_not_imported_until_a_kernel_runs(monkeypatch):
    assert run(USE + NOT_IMPORTED, monkeypatch) == "False\n"


def test_without_triton_torch_computes_and_a_kernel_that_is_asked_for_is_missed(monkeypatch):
    block = "import sys; sys.modules['triton'] = None\n"
    said = run(block + USE + NOT_INSTALLED, monkeypatch, TRITON_INTERPRET="1")
    assert said == 'MINI_IMPL_KERNELS=1 asks for kernels, which need Triton: pip install "mini_impl[gpu]"\n'
