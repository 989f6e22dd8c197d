"""GPT-NeoX and Pythia: q, k and v in one map, interleaved by heads; partial rotation; attention and FFN side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, Interleaved, Same, Transposed, entry, linear, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys, activations, published_activation
from sparsejax.models.families.rotary_keys import read_partial_rope, write_rope

_BLOCK, _LAYER = "blocks.{layer}", "gpt_neox.layers.{layer}"


def _entries(config: ModelConfig) -> tuple[Entry, ...]:
    fused = (("kernel", "weight", Transposed()), ("bias", "bias", Same()))
    return (
        entry("embed.table", "gpt_neox.embed_in.weight"),
        *norm("norm", "gpt_neox.final_layer_norm"),
        *linear("head", "embed_out"),
        *norm(f"{_BLOCK}.attn_norm", f"{_LAYER}.input_layernorm"),
        *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.post_attention_layernorm"),
        *(
            entry(
                tuple(f"{_BLOCK}.attn.{name}.{ours}" for name in "qkv"),
                f"{_LAYER}.attention.query_key_value.{theirs}",
                Interleaved(config.attention.num_heads, 3, layout),
            )
            for ours, theirs, layout in fused
        ),
        *linear(f"{_BLOCK}.attn.o", f"{_LAYER}.attention.dense"),
        *linear(f"{_BLOCK}.mlp.up", f"{_LAYER}.mlp.dense_h_to_4h"),
        *linear(f"{_BLOCK}.mlp.down", f"{_LAYER}.mlp.dense_4h_to_h"),
    )


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "gpt_neox")
    width, heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    keys.check(width % heads == 0, "num_attention_heads", f"must divide hidden_size = {width}")
    rope = read_partial_rope(keys, theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25)
    rotated = int(width // heads * rope.fraction)
    keys.check(rope.fraction <= 1 and rotated >= 2 and rotated % 2 == 0, "rotary_pct",
               f"rotates {rotated} of the {width // heads} features of a head, expected an even number")  # fmt: skip
    bias = keys.flag("attention_bias", True)
    config = ModelConfig(
        num_layers=keys.integer("num_hidden_layers"),
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("max_position_embeddings"),
        block="parallel" if keys.flag("use_parallel_residual", True) else "pre",
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        norm=NormConfig(kind="layer", epsilon=keys.number("layer_norm_eps", 1e-5), bias=True),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=width // heads, bias=bias, out_bias=bias),
        ffn=FFNConfig(
            hidden=keys.integer("intermediate_size"),
            activation=keys.choice("hidden_act", activations(False), "gelu"),
            bias=True,
        ),
        positions=PositionConfig(rope=rope),
    )
    keys.finish()
    return config


def _to_published(config: ModelConfig) -> dict[str, Any]:
    rope = config.positions.rope
    published = {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "intermediate_size": config.ffn.hidden,
        "hidden_act": published_activation(config.ffn.activation, gated=False),
        "layer_norm_eps": config.norm.epsilon,
        "max_position_embeddings": config.max_length,
        "use_parallel_residual": config.block == "parallel",
        "attention_bias": config.attention.bias,
        "tie_word_embeddings": config.tied_embeddings,
        "rotary_emb_base": rope.theta,
        "rotary_pct": rope.fraction,
        "rope_scaling": write_rope(rope)["rope_scaling"],
    }
    return check_inverse(config, published, _to_config, "gpt_neox")


register_family(
    Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        to_config=_to_config,
        to_published=_to_published,
        entries=_entries,
        prefix="gpt_neox.",
        # transformers 5 calls the head `lm_head` in memory and reads and writes either name.
        renamed=(("lm_head.", "embed_out."),),
        ignored=("*.attention.bias", "*.attention.masked_bias", "*.attention.rotary_emb.inv_freq"),
        tied=(("embed.table", "embed_out.weight"),),
    ),
    "gpt_neox",
)
