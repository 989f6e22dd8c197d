"""GPT-2: learned positions, LayerNorm with biases, one fused map for q, k and v, kernels stored as ours ([in, out])."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, Fused, Transposed, entry, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys, activations, published_activation

_BLOCK, _LAYER = "blocks.{layer}", "transformer.h.{layer}"


def _entries(config: ModelConfig) -> tuple[Entry, ...]:
    fused = Fused((config.d_model,) * 3)
    maps = (("attn.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj"))
    leaves = (("kernel", "weight"), ("bias", "bias"))
    return (
        entry("embed.table", "transformer.wte.weight"),
        entry("embed.positions", "transformer.wpe.weight"),
        *norm("norm", "transformer.ln_f"),
        entry("head.kernel", "lm_head.weight", Transposed()),
        *norm(f"{_BLOCK}.attn_norm", f"{_LAYER}.ln_1"),
        *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.ln_2"),
        *(
            entry(tuple(f"{_BLOCK}.attn.{name}.{ours}" for name in "qkv"), f"{_LAYER}.attn.c_attn.{theirs}", fused)
            for ours, theirs in leaves
        ),
        *(entry(f"{_BLOCK}.{ours}.{o}", f"{_LAYER}.{theirs}.{t}") for ours, theirs in maps for o, t in leaves),
    )


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "gpt2")
    for key in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        keys.only(key, False, "this changes the model")
    width, heads = keys.integer("n_embd"), keys.integer("n_head")
    keys.check(width % heads == 0, "n_head", f"must divide n_embd = {width}")
    config = ModelConfig(
        num_layers=keys.integer("n_layer"),
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("n_positions"),
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        norm=NormConfig(kind="layer", epsilon=keys.number("layer_norm_epsilon", 1e-5), bias=True),
        attention=AttentionConfig(
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            bias=True,
            out_bias=True,
            scale=0.0 if keys.flag("scale_attn_weights", True) else 1.0,
        ),
        ffn=FFNConfig(
            hidden=keys.integer("n_inner", 4 * width),
            activation=keys.choice("activation_function", activations(False), "gelu_new"),
            bias=True,
        ),
        positions=PositionConfig(kind="learned"),
    )
    keys.finish("n_ctx")
    return config


def _to_published(config: ModelConfig) -> dict[str, Any]:
    activation = published_activation(config.ffn.activation, gated=False)
    published = {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_length,
        "n_ctx": config.max_length,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.attention.num_heads,
        "n_inner": config.ffn.hidden,
        "activation_function": "gelu_new" if activation == "gelu_pytorch_tanh" else activation,
        "layer_norm_epsilon": config.norm.epsilon,
        "scale_attn_weights": config.attention.scale in (0.0, config.attention.head_dim**-0.5),
        "tie_word_embeddings": config.tied_embeddings,
    }
    return check_inverse(config, published, _to_config, "gpt2")


register_family(
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        to_config=_to_config,
        to_published=_to_published,
        entries=_entries,
        prefix="transformer.",
        ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),  # causal masks
        tied=(("embed.table", "lm_head.weight"),),
    ),
    "gpt2",
)
