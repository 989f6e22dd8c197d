"""Gemma 2, Gemma 3, and the text part of the Gemma 3 that also reads images (which is published again as the text model).

Norms have the gain 1 + w and stand before and after each part; embeddings are scaled by sqrt(D); logits of attention are scaled
by `query_pre_attn_scalar` and soft-capped (2); queries and keys are normalised and local layers have a theta of their own (3).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, norm
from sparsejax.models.config import FFNConfig, ModelConfig, NormConfig, PositionConfig, RopeConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import (
    REQUIRED,
    Keys,
    activations,
    layer_pattern,
    published_activation,
    published_layers,
)
from sparsejax.models.families.llama import SHARED_ENTRIES, decoder_family, read_heads
from sparsejax.models.families.rotary_keys import read_layered_rope, read_rope, write_rope

_BLOCK, _LAYER = "blocks.{layer}", "model.layers.{layer}"

ENTRIES: tuple[Entry, ...] = (
    *SHARED_ENTRIES,
    *norm(f"{_BLOCK}.attn_post_norm", f"{_LAYER}.post_attention_layernorm"),
    *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.pre_feedforward_layernorm"),
    *norm(f"{_BLOCK}.mlp_post_norm", f"{_LAYER}.post_feedforward_layernorm"),
)

# What a file that leaves the key out means: the text parts of Gemma 3 list only what differs from these.
GEMMA3_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256,
}  # fmt: skip
SLIDING_WINDOW = 4096  # where absent


def _read(keys: Keys, *, layered_rope: bool, softcap: Any, head_softcap: Any, every: int) -> ModelConfig:
    """What the members share.

    Args:
      keys: of the text model.
      layered_rope: local layers rotate with their own theta.
      softcap, head_softcap: where the keys are absent; null is off.
      every: where layer types are not listed, each layer of this number is global, the others are local.
    """
    keys.only("use_bidirectional_attention", False, "attention in both directions")
    width, layers = keys.integer("hidden_size"), keys.integer("num_hidden_layers")
    attention = read_heads(keys, width, head_dim=256)
    attention.bias = attention.out_bias = keys.flag("attention_bias", False)
    scalar = keys.number("query_pre_attn_scalar", 256)
    attention.scale = 0.0 if scalar == attention.head_dim else scalar**-0.5
    attention.softcap = keys.number("attn_logit_softcapping", softcap, null=0.0)
    kinds = ["local" if (layer + 1) % every else "global" for layer in range(layers)]
    pattern = layer_pattern(keys, layers, kinds)
    layered = "local" in pattern
    attention.window = keys.integer("sliding_window", SLIDING_WINDOW, null=0) if layered else 0
    keys.value("sliding_window", None)
    keys.check(attention.window or not layered, "sliding_window", "layers of the type sliding_attention need one")
    gated = activations(True)
    activation = keys.choice("hidden_activation", gated, REQUIRED)
    agrees = keys.choice("hidden_act", gated, keys.value("hidden_activation")) == activation
    keys.check(agrees, "hidden_act", "at odds with hidden_activation, which counts; remove one of them")
    rope = read_layered_rope(keys, theta=1e6, local_theta=1e4, layered=layered) if layered_rope else read_rope(keys)
    return ModelConfig(
        num_layers=layers,
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("max_position_embeddings"),
        block="sandwich",
        attention_pattern=pattern,
        tied_embeddings=keys.flag("tie_word_embeddings", True),
        embedding_scale=True,
        head_softcap=keys.number("final_logit_softcapping", head_softcap, null=0.0),
        norm=NormConfig(epsilon=keys.number("rms_norm_eps"), plus_one=True),
        attention=attention,
        ffn=FFNConfig(hidden=keys.integer("intermediate_size"), activation=activation),
        positions=PositionConfig(rope=rope),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    a = config.attention
    scalar = round(a.scale**-2) if a.scale else a.head_dim
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": a.num_heads,
        "num_key_value_heads": a.num_kv_heads,
        "head_dim": a.head_dim,
        "intermediate_size": config.ffn.hidden,
        "hidden_activation": published_activation(config.ffn.activation, gated=True),
        "rms_norm_eps": config.norm.epsilon,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": a.bias,
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": a.softcap or None,
        "final_logit_softcapping": config.head_softcap or None,
        "sliding_window": a.window or SLIDING_WINDOW,
        "layer_types": published_layers(config.attention_pattern, config.num_layers),
        **write_rope(config.positions.rope),
    }


def _gemma2_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "gemma2")
    config = _read(keys, layered_rope=False, softcap=50.0, head_softcap=30.0, every=2)
    keys.finish()
    return config


def _gemma2_published(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "gemma2", **_write(config)}


def _gemma3_config(published: Mapping[str, Any]) -> ModelConfig:
    """Of a text model, or of a model of images and text, whose text part is `text_config`."""
    where = "config.json"
    if published.get("model_type") == "gemma3":
        outer, where = Keys(published, "gemma3"), "config.json: text_config"
        text = outer.inner("text_config").published
        tied = {key: published[key] for key in ("tie_word_embeddings",) if key in published}
        published = {**tied, **text}
    keys = Keys({**GEMMA3_DEFAULTS, **published}, "gemma3_text", where)
    every = keys.integer("sliding_window_pattern", keys.integer("_sliding_window_pattern", 6))
    config = _read(keys, layered_rope=True, softcap=0.0, head_softcap=0.0, every=every)
    config.attention.qk_norm = True
    keys.check(not config.attention.softcap, "attn_logit_softcapping", "Gemma 3 has none; only null is supported")
    keys.finish()
    return config


def _gemma3_published(config: ModelConfig) -> dict[str, Any]:
    """`sliding_window_pattern` is what transformers 4.50 to 4.52 read in the place of `layer_types`."""
    rope = config.positions.rope
    published = {"model_type": "gemma3_text", **_write(config), "rope_local_base_freq": rope.local_theta or RopeConfig().theta}
    pattern = config.attention_pattern
    if pattern == ("local",) * (len(pattern) - 1) + ("global",) and len(pattern) <= config.num_layers:
        published["sliding_window_pattern"] = len(pattern)
    return published


def _family(
    name: str,
    architecture: str,
    to_config: Callable[[Mapping[str, Any]], ModelConfig],
    to_published: Callable[[ModelConfig], dict[str, Any]],
    **options: Any,
) -> Family:
    def checked(config: ModelConfig) -> dict[str, Any]:
        return check_inverse(config, to_published(config), to_config, name)

    return decoder_family(name, architecture, to_config, checked, ENTRIES, **options)


register_family(_family("gemma2", "Gemma2ForCausalLM", _gemma2_config, _gemma2_published), "gemma2")
register_family(
    _family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _gemma3_config,
        _gemma3_published,
        # Of the model with images: first as published on the hub, then as transformers names its modules since 4.52.
        renamed=(
            ("language_model.model.", "model."),
            ("language_model.lm_head.", "lm_head."),
            ("model.language_model.", "model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        ),
        ignored=("vision_tower.*", "multi_modal_projector.*"),
    ),
    "gemma3_text",
    "gemma3",
)
