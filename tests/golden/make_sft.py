"""Make tests/golden/sft.json: adapters that PEFT wrote, and what transformers' Llama computes with them (make golden).

The same Llama, small and with random weights, serves all cases. PEFT's files are stored as they are: the JSON, and the
safetensors in base64. The loss is transformers' own, which shifts the labels itself.
"""

import base64
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

from bench.weights import llama

SIZES = {"vocabulary": 19, "width": 16, "layers": 2, "heads": 4, "key_value_heads": 2, "feed_forward_width": 12}


def random_llama() -> transformers.LlamaForCausalLM:
    """A Llama whose weights are random, and the same at every call."""
    torch.manual_seed(0)
    model = llama(*SIZES.values())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter)).copy_(parameter.round(decimals=3))
    return model


def case(rank: int, alpha: int, targets: dict[str, str]) -> dict:
    """PEFT's adapter for the linear layers with these names (ours: theirs), and what it does to the Llama."""
    model = get_peft_model(random_llama(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets.values())))
    torch.manual_seed(rank)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:  # B too: at its start of 0 nothing could be told
                parameter.copy_((0.4 * torch.randn_like(parameter)).round(decimals=3))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        weights = Path(folder, "adapter_model.safetensors").read_bytes()
    config["base_model_name_or_path"] = None
    config["target_modules"].sort()  # a set in PEFT

    tokens = torch.randint(SIZES["vocabulary"], (2, 7))
    labels = tokens.clone()  # those of transformers: labels[:, t] is tokens[:, t] itself
    labels[0, :3] = labels[1, :1] = labels[1, 5:] = -100
    output = model(input_ids=tokens, labels=labels)
    output.loss.backward()
    gradients = {
        name.replace(".default", ""): parameter.grad.tolist()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ".layers.0." in name
    }
    merged = model.merge_and_unload()
    return {
        "rank": rank,
        "alpha": alpha,
        "targets": list(targets),
        "config": config,
        "weights": base64.b64encode(weights).decode(),
        "tokens": tokens.tolist(),
        "labels": labels.tolist(),
        "logits": output.logits.tolist(),
        "loss": output.loss.item(),
        "gradients": gradients,
        "merged": merged.get_submodule("model.layers.1.self_attn").v_proj.weight.tolist(),
    }


if __name__ == "__main__":
    attention = {"query": "q_proj", "value": "v_proj"}
    others = {"key": "k_proj", "value": "v_proj", "output": "o_proj", "gate": "gate_proj", "down": "down_proj"}
    golden = {
        "made by": "tests/golden/make_sft.py",
        "versions": {module.__name__: module.__version__ for module in (peft, transformers, torch)},
        "model": SIZES,
        "base": {name: value.tolist() for name, value in random_llama().named_parameters() if name != "lm_head.weight"},
        "cases": [case(3, 6, attention), case(2, 2, others)],
    }
    Path(__file__).with_name("sft.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
