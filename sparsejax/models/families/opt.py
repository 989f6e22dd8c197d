"""OPT: learned positions that start at row 2, LayerNorm with biases, ReLU; norms before each part, in one model after it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, entry, linear, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys, activations, published_activation

_BLOCK, _LAYER = "blocks.{layer}", "model.decoder.layers.{layer}"
_OFFSET = 2

ENTRIES: tuple[Entry, ...] = (
    entry("embed.table", "model.decoder.embed_tokens.weight"),
    entry("embed.positions", "model.decoder.embed_positions.weight"),
    *norm("norm", "model.decoder.final_layer_norm"),
    *linear("head", "lm_head"),
    *norm(f"{_BLOCK}.attn_norm", f"{_LAYER}.self_attn_layer_norm"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.final_layer_norm"),
    *(part for name in "qkv" for part in linear(f"{_BLOCK}.attn.{name}", f"{_LAYER}.self_attn.{name}_proj")),
    *linear(f"{_BLOCK}.attn.o", f"{_LAYER}.self_attn.out_proj"),
    *linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.fc1"),
    *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.fc2"),
)


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "opt")
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    keys.check(width % heads == 0, "num_attention_heads", f"must divide hidden_size = {width}")
    keys.only("word_embed_proj_dim", width, "embeddings of another width than the model's")
    keys.only("_remove_final_layer_norm", False, "a model without its last norm")
    keys.only("layer_norm_elementwise_affine", True, "norms without gain and bias")
    bias = keys.flag("enable_bias", True)
    config = ModelConfig(
        num_layers=keys.integer("num_hidden_layers"),
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("max_position_embeddings"),
        block="pre" if keys.flag("do_layer_norm_before", True) else "post",
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        norm=NormConfig(kind="layer", epsilon=1e-5, bias=True),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads, bias=bias, out_bias=bias),
        ffn=FFNConfig(
            hidden=keys.integer("ffn_dim"),
            activation=keys.choice("activation_function", activations(False), "relu"),
            bias=bias,
        ),
        positions=PositionConfig(kind="learned", offset=_OFFSET),
    )
    keys.finish()
    return config


def _to_published(config: ModelConfig) -> dict[str, Any]:
    published = {
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "word_embed_proj_dim": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "ffn_dim": config.ffn.hidden,
        "max_position_embeddings": config.max_length,
        "activation_function": published_activation(config.ffn.activation, gated=False),
        "do_layer_norm_before": config.block == "pre",
        "enable_bias": config.attention.bias,
        "tie_word_embeddings": config.tied_embeddings,
    }
    return check_inverse(config, published, _to_config, "opt")


register_family(
    Family(
        name="opt",
        architecture="OPTForCausalLM",
        to_config=_to_config,
        to_published=_to_published,
        entries=lambda config: ENTRIES,
        prefix="model.",
        tied=(("embed.table", "lm_head.weight"),),
    ),
    "opt",
)
