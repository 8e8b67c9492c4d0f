"""The front door: what there is is told on one screen, found by its name, and runs without being installed."""

import ast
import doctest
import importlib
import inspect
import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mini_impl

ROOT = Path(__file__).parents[1]
WINGS = ("mini_impl.forecasting", "mini_impl.finetuning")


def test_help_fits_on_a_screen():
    assert len(mini_impl.__doc__.splitlines()) <= 22
    assert len(pydoc.plain(pydoc.render_doc(mini_impl)).splitlines()) < 70


@pytest.mark.parametrize("name", ["mini_impl", *WINGS])
def test_the_examples_run_and_every_name_is_there(name):
    module = importlib.import_module(name)
    failed, tried = doctest.testmod(module)
    assert not failed and (tried or name == "mini_impl.forecasting")
    for word in module.__all__:
        assert getattr(module, word, None) is not None, word


EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)


def test_models_and_trainers_are_at_the_front_door():
    names = [model.__name__ for model in mini_impl.forecasting.FORECASTERS.values()]
    for name in (*names, "fit", "evaluate", "load_csv", "fine_tune", "LanguageModel"):
        assert inspect.getdoc(getattr(mini_impl, name))
    assert mini_impl.results.load("etth1")
    assert (ROOT / "mini_impl" / "py.typed").exists()


def test_the_example_of_the_readme_runs(tmp_path):
    """The same in both languages, and as it stands but for the epochs: trained, kept, read, asked for the future."""
    assert EXAMPLES[:4] == EXAMPLES[4:]
    code = "".join(EXAMPLES[:2]).replace("epochs=3", "epochs=1")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    scores, future = run.stdout.splitlines()
    assert scores.startswith("Scores(mse=0."), run.stderr
    assert future.startswith("2025-01-01T00:00:00 {'45 Queen Street': ")
    assert len((tmp_path / "future.csv").read_text().splitlines()) == 25


@pytest.mark.slow
def test_the_loops_of_the_readme_train_a_model_of_transformers(tmp_path, monkeypatch):
    """As they stand, on a tiny Llama with random weights that knows bytes; SFT learns its answer."""
    transformers = pytest.importorskip("transformers", reason="transformers is in the optional extra 'parity'")
    tokenizers = pytest.importorskip("tokenizers")
    pieces = tokenizers.Tokenizer(tokenizers.models.BPE())
    pieces.pre_tokenizer, pieces.decoder = tokenizers.pre_tokenizers.ByteLevel(), tokenizers.decoders.ByteLevel()
    pieces.add_tokens(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=257, **sizes, eos_token_id=256))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces, eos_token="<end>")
    model.bfloat16().save_pretrained(tmp_path / "llama")  # as SmolLM2 is stored
    tokenizer.save_pretrained(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    names = {}
    assert EXAMPLES[2].count('NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"') == 1
    exec(EXAMPLES[2].replace("HuggingFaceTB/SmolLM2-135M-Instruct", "llama"), names)
    assert names["model"].dtype == torch.float32
    first = names["sft"].published_loss(plain(names), names["labels"]).total
    assert names["loss"].total < first - 0.01
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    exec(EXAMPLES[3], names)
    assert names["mask"].shape == (8, 16) and names["loss"].total.isfinite()
    assert names["rewards"].shape == (1, 8) and names["answer"].shape == (8, 16)
    assert names["how"]["top_k"] == 0  # what is scored is what was sampled from


def plain(names):
    """The logits without what LoRA learnt."""
    with torch.no_grad():
        for part in names["model"].modules():
            if hasattr(part, "B"):
                part.kept = part.B.clone()
                part.B.zero_()
        logits = names["model"](names["tokens"], attention_mask=names["attention_mask"]).logits
        for part in names["model"].modules():
            if hasattr(part, "B"):
                part.B.copy_(part.kept)
    return logits


def test_a_source_tree_runs_without_being_installed(tmp_path):
    shutil.copytree(ROOT / "mini_impl", tmp_path / "mini_impl", ignore=shutil.ignore_patterns("__pycache__"))
    hide = "import importlib.metadata as m; m.version = lambda name: m.Distribution.from_name('no ' + name)"
    code = (
        f"{hide}; from mini_impl import cli; cli.main(['forecast', 'dlinear', '--epochs', '1', '--json', 'out.json'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "(not installed)" in (tmp_path / "out.json").read_text()


def test_every_module_says_what_it_is_and_arrows_point_down():
    """Chapters import what they share, never one another; the two wings do not know each other."""
    chapters = {"dlinear", "patchtst", "itransformer", "timesnet", "timexer", "sft", "grpo", "dapo"}
    for path in (ROOT / "mini_impl").rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        assert ast.get_docstring(tree) or path.parent.name == "assets", path
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        parts = {part for name in names for part in name.split(".")}
        if path.stem in chapters:
            assert not parts & chapters, path
        if path.parent.name in ("forecasting", "finetuning"):
            assert not parts & ({"forecasting", "finetuning"} - {path.parent.name}), path
