"""T5 (1910.10683) and T5 v1.1 / Flan: relative biases shared by all layers, logits of attention not scaled, no biases of maps.

The first has ReLU and a tied head behind a scale of D^-0.5; v1.1 a gated GELU and a head of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, Transposed, entry, linear, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import GATED, Keys, activations, published_activation
from sparsejax.plugs import check_choice

_GATE = "gated-"


def _stack_entries(ours: str, theirs: str, bias: str, *, cross: bool, gated: bool) -> tuple[Entry, ...]:
    """One stack's entries; each sublayer is a numbered module on their side."""
    block, layer = f"{ours}.{{layer}}", f"{theirs}.block.{{layer}}.layer"
    fed = f"{layer}.{1 + cross}"
    # The first of two entering maps is the gate.
    maps = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    crossing = (
        *norm(f"{block}.cross_norm", f"{layer}.1.layer_norm"),
        *(part for name in "qkvo" for part in linear(f"{block}.cross.{name}", f"{layer}.1.EncDecAttention.{name}")),
    )
    return (
        entry(bias, f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *norm(f"{block}.attn_norm", f"{layer}.0.layer_norm"),
        *(part for name in "qkvo" for part in linear(f"{block}.attn.{name}", f"{layer}.0.SelfAttention.{name}")),
        *(crossing if cross else ()),
        *norm(f"{block}.mlp_norm", f"{fed}.layer_norm"),
        *(part for name, map_ in maps.items() for part in linear(f"{block}.mlp.{name}", f"{fed}.DenseReluDense.{map_}")),
    )


def _entries(config: ModelConfig) -> tuple[Entry, ...]:
    gated = config.ffn.activation in GATED.values()
    return (
        entry("embed.table", "shared.weight"),
        *_stack_entries("encoder.blocks", "encoder", "encoder_bias", cross=False, gated=gated),
        *norm("encoder_norm", "encoder.final_layer_norm"),
        *_stack_entries("decoder.blocks", "decoder", "relative_bias", cross=True, gated=gated),
        *norm("norm", "decoder.final_layer_norm"),
        entry("head.kernel", "lm_head.weight", Transposed()),
    )


def _to_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "t5")
    named = keys.value("architectures", ["T5ForConditionalGeneration"])
    keys.check(isinstance(named, list) and len(named) == 1, "architectures", "expected a list of one name")
    known = ("T5ForConditionalGeneration", "T5WithLMHeadModel")
    check_choice(f"{keys.where}: architectures (of a t5 model)", named[0], known)
    keys.only("is_encoder_decoder", True, "half of a T5")
    width, layers, heads = keys.integer("d_model"), keys.integer("num_layers"), keys.integer("num_heads")
    tied = keys.flag("tie_word_embeddings", True)
    buckets = keys.integer("relative_attention_num_buckets", 32, least=4)
    config = ModelConfig(
        kind="encoder_decoder",
        encoder_layers=layers,
        num_layers=keys.integer("num_decoder_layers", layers),
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("n_positions", 512),
        tied_embeddings=tied,
        # transformers 5 says whether there is a scale apart from whether the head is tied.
        head_scale=width**-0.5 if keys.flag("scale_decoder_outputs", tied) else 1.0,
        norm=NormConfig(epsilon=keys.number("layer_norm_epsilon", 1e-6)),
        attention=AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=keys.integer("d_kv", 64), scale=1.0),
        ffn=FFNConfig(hidden=keys.integer("d_ff"), activation=_read_activation(keys)),
        positions=PositionConfig(
            kind="relative",
            relative_buckets=buckets,
            relative_max_distance=keys.integer("relative_attention_max_distance", 128, least=buckets),
        ),
    )
    keys.finish()
    return config


def _read_activation(keys: Keys) -> str:
    """Ours of `feed_forward_proj`, from which the reference derives `dense_act_fn` and `is_gated_act`."""
    allowed = {**activations(False), **{f"{_GATE}{theirs}": ours for theirs, ours in activations(True).items()}}
    allowed["gated-gelu"] = "geglu_tanh"
    found = keys.choice("feed_forward_proj", allowed, "relu")
    name = keys.value("feed_forward_proj", "relu")
    plain = "gelu_new" if name == "gated-gelu" else name.removeprefix(_GATE)
    keys.check(keys.value("dense_act_fn", plain) == plain, "dense_act_fn", f"at odds with feed_forward_proj = {name!r}")
    gated = name.startswith(_GATE)
    keys.check(keys.flag("is_gated_act", gated) == gated, "is_gated_act", f"at odds with feed_forward_proj = {name!r}")
    return found


def _to_published(config: ModelConfig) -> dict[str, Any]:
    gated = config.ffn.activation in GATED.values()
    activation = published_activation(config.ffn.activation, gated)
    projection = f"{_GATE}{activation}" if gated else activation
    published = {
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.attention.head_dim,
        "d_ff": config.ffn.hidden,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.num_layers,
        "num_heads": config.attention.num_heads,
        "n_positions": config.max_length,
        "relative_attention_num_buckets": config.positions.relative_buckets,
        "relative_attention_max_distance": config.positions.relative_max_distance,
        "layer_norm_epsilon": config.norm.epsilon,
        "feed_forward_proj": "gated-gelu" if projection == "gated-gelu_pytorch_tanh" else projection,
        "tie_word_embeddings": config.tied_embeddings,
    }
    if (config.head_scale != 1.0) != config.tied_embeddings:
        published["scale_decoder_outputs"] = config.head_scale != 1.0
    return check_inverse(config, published, _to_config, "t5")


register_family(
    Family(
        name="t5",
        architecture="T5ForConditionalGeneration",
        to_config=_to_config,
        to_published=_to_published,
        entries=_entries,
        tied=tuple(
            ("embed.table", theirs)
            for theirs in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        ),
        # Of the first decoder layer's cross-attention; files of 2019 hold it, no code has ever read it.
        ignored=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    ),
    "t5",
)
