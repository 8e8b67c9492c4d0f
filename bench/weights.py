"""The weights of a peer and of our model, each in the other's names and shapes, to give both models the same.

Of neuralforecast's models: each function takes a peer and returns what our model's `load_state_dict` takes. Of
transformers' Llama, whose shapes are ours: one with our weights, or with random ones.
"""

import torch
from torch import Tensor, nn

from mini_impl.finetuning.language_model import LanguageModel, hugging_face_name


def dlinear(peer: nn.Module) -> dict[str, Tensor]:
    names = {"linear_trend": "trend", "linear_season": "seasonal"}
    return {
        f"{ours}.{kind}": getattr(getattr(peer, theirs), kind).detach()
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }


def patchtst(peer: nn.Module) -> dict[str, Tensor]:
    """Queries, keys and values stacked; the head's columns by patch, not by feature."""
    theirs = peer.state_dict()
    ours = {
        "encoder.embedding": part(theirs, "model.backbone.W_P"),
        "encoder.position": theirs["model.backbone.W_pos"],
        "head": part(theirs, "model.head.linear"),
    }
    layers = sum(name.endswith("self_attn.W_Q.weight") for name in theirs)
    for layer in range(layers):
        block, peer = f"encoder.blocks.{layer}", f"model.backbone.encoder.layers.{layer}"
        ours |= {
            f"{block}.attention.projection": stack(theirs, *(f"{peer}.self_attn.W_{letter}" for letter in "QKV")),
            f"{block}.attention.output": part(theirs, f"{peer}.self_attn.to_out.0"),
            f"{block}.attention_norm": part(theirs, f"{peer}.norm_attn.1"),
            f"{block}.feed_forward.0": part(theirs, f"{peer}.ff.0"),
            f"{block}.feed_forward.3": part(theirs, f"{peer}.ff.3"),
            f"{block}.feed_forward_norm": part(theirs, f"{peer}.norm_ffn.1"),
        }
    width = len(ours["encoder.embedding"]["weight"])
    by_feature = ours["head"]["weight"].unflatten(1, (width, -1))  # [horizon, width, patch]
    ours["head"]["weight"] = by_feature.mT.flatten(1)
    return flatten(ours)


def itransformer(peer: nn.Module) -> dict[str, Tensor]:
    names = {"encoder.norm": "norm", "projector": "projection", "enc_embedding.value_embedding": "embedding"}
    theirs = peer.state_dict()
    for i in range(peer.e_layers):
        layer, block = f"encoder.attn_layers.{i}", f"blocks.{i}"
        names[f"{layer}.attention.projection"] = f"{block}.attention.projection"
        names[f"{layer}.attention.out_projection"] = f"{block}.attention.output"
        names[f"{layer}.norm1"], names[f"{layer}.norm2"] = f"{block}.attention_norm", f"{block}.feed_forward_norm"
        names[f"{layer}.conv1"], names[f"{layer}.conv2"] = f"{block}.feed_forward.0", f"{block}.feed_forward.3"
        join_projections(theirs, f"{layer}.attention")
    return rename(theirs, names)


def timesnet(peer: nn.Module) -> dict[str, Tensor]:
    return {timesnet_name(name): parameter.detach() for name, parameter in peer.named_parameters()}


def timesnet_name(name: str) -> str:
    """The name of one of the peer's weights in our model."""
    for theirs, ours in {
        "enc_embedding.value_embedding.tokenConv": "embedding",
        "predict_linear": "extension",
        "layer_norm": "norm",
        "model.": "blocks.",
        "conv.0": "widen",
        "conv.2": "narrow",
    }.items():
        name = name.replace(theirs, ours)
    return name


def timexer(peer: nn.Module) -> dict[str, Tensor]:
    theirs = peer.state_dict()
    theirs["learned_token"] = theirs.pop("en_embedding.glb_token")[0]
    del theirs["en_embedding.position_embedding.pe"]
    tokens = peer.patch_num + 1
    theirs["head.linear.weight"] = theirs["head.linear.weight"].unflatten(1, (-1, tokens)).mT.flatten(1)
    names = {
        "learned_token": "learned_token",
        "en_embedding.value_embedding": "patch_embedding",
        "ex_embedding.value_embedding": "exogenous_embedding",
        "encoder.norm": "norm",
        "head.linear": "head",
    }
    for i in range(peer.e_layers):
        layer = f"encoder.layers.{i}"
        for j, attention in enumerate(("self_attention", "cross_attention"), start=1):
            names[f"{layer}.{attention}.projection"] = f"layers.{i}.{attention}.projection"
            names[f"{layer}.{attention}.out_projection"] = f"layers.{i}.{attention}.output"
            names[f"{layer}.norm{j}"] = f"layers.{i}.{attention.replace('attention', 'norm')}"
            join_projections(theirs, f"{layer}.{attention}")
        names[f"{layer}.conv1"], names[f"{layer}.conv2"] = f"layers.{i}.feed_forward.0", f"layers.{i}.feed_forward.3"
        names[f"{layer}.norm3"] = f"layers.{i}.feed_forward_norm"
    return rename(theirs, names)


def join_projections(weights: dict[str, Tensor], attention: str) -> None:
    """Put one map in the place of the three for query, key and value."""
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"{attention}.{name}_projection.{kind}") for name in ("query", "key", "value")]
        weights[f"{attention}.projection.{kind}"] = torch.cat(parts)


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Weights by our names for the modules (theirs: ours); a convolution over one step as the linear map that it is."""
    renamed = {}
    for name, value in weights.items():
        start = next(start for start in names if name == start or name.startswith(start + "."))
        renamed[name.replace(start, names[start])] = value.squeeze(-1) if ".conv" in name else value
    return renamed


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One module's tensors, under their own names."""
    return {name.removeprefix(f"{prefix}."): value for name, value in weights.items() if name.startswith(f"{prefix}.")}


def stack(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """Several linear maps of the same input as one."""
    parts = [part(weights, prefix) for prefix in prefixes]
    return {name: torch.cat([piece[name] for piece in parts]) for name in ("weight", "bias")}


def flatten(modules: dict[str, dict | Tensor]) -> dict[str, Tensor]:
    """{module: {name: tensor}} -> {module.name: tensor}."""
    named = {}
    for module, value in modules.items():
        named |= {module: value} if isinstance(value, Tensor) else {f"{module}.{name}": t for name, t in value.items()}
    return named


def llama_of(model: LanguageModel, stop: int | None = None) -> nn.Module:
    """transformers' Llama with the weights of our model. stop: the token that ends an answer, and pads."""
    peer = llama(**model.settings, stop=stop)
    weights = {hugging_face_name(name): value for name, value in model.state_dict().items()}
    missing, unexpected = peer.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)  # the head is the embedding again
    return peer


def llama(
    vocab_size: int,
    width: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    feed_forward_width: int,
    rope_base: float = 10000.0,
    epsilon: float = 1e-5,
    stop: int | None = None,
) -> nn.Module:
    """transformers' Llama with the sizes of a LanguageModel, and its own random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        intermediate_size=feed_forward_width,
        rms_norm_eps=epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=stop,
    )
    return LlamaForCausalLM(config).eval()
