"""Llama and what shares its names: SmolLM2, Mistral (sliding window), Qwen2 (biases at q, k, v), Qwen3 (norms at q and k),
Arcee (a plain feed-forward network, squared ReLU)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsejax.io.family import Family, register_family
from sparsejax.io.name_map import Entry, entry, linear, norm
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, NormConfig, PositionConfig
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import (
    REQUIRED,
    Keys,
    activations,
    layer_pattern,
    published_activation,
    published_layers,
)
from sparsejax.models.families.rotary_keys import read_rope, write_rope

_BLOCK, _LAYER = "blocks.{layer}", "model.layers.{layer}"

# What every decoder that took Llama's names keeps; the norms around the feed-forward network differ.
SHARED_ENTRIES: tuple[Entry, ...] = (
    entry("embed.table", "model.embed_tokens.weight"),
    *norm("norm", "model.norm"),
    *linear("head", "lm_head"),
    *norm(f"{_BLOCK}.attn_norm", f"{_LAYER}.input_layernorm"),
    *norm(f"{_BLOCK}.attn.q_norm", f"{_LAYER}.self_attn.q_norm"),
    *norm(f"{_BLOCK}.attn.k_norm", f"{_LAYER}.self_attn.k_norm"),
    *(part for name in "qkvo" for part in linear(f"{_BLOCK}.attn.{name}", f"{_LAYER}.self_attn.{name}_proj")),
    *(part for name in ("gate", "up", "down") for part in linear(f"{_BLOCK}.mlp.{name}", f"{_LAYER}.mlp.{name}_proj")),
)
ENTRIES = (*SHARED_ENTRIES, *norm(f"{_BLOCK}.mlp_norm", f"{_LAYER}.post_attention_layernorm"))


def read_heads(keys: Keys, width: int, *, kv_heads: Any = REQUIRED, head_dim: int = 0) -> AttentionConfig:
    """Numbers of heads and their size; `kv_heads` where the key is absent, `head_dim` likewise (0: width / heads)."""
    heads = keys.integer("num_attention_heads")
    groups = keys.integer("num_key_value_heads", kv_heads or heads, null=heads)
    keys.check(heads % groups == 0, "num_key_value_heads", f"must divide num_attention_heads = {heads}")
    size = keys.integer("head_dim", head_dim, null=0)
    if not size:
        keys.check(width % heads == 0, "num_attention_heads", f"must divide hidden_size = {width}, since there is no head_dim")
        size = width // heads
    keys.check(size % 2 == 0, "head_dim", f"rotary positions need heads of an even size, this is {size}")
    return AttentionConfig(num_heads=heads, num_kv_heads=groups, head_dim=size)


def read_decoder(
    keys: Keys, width: int, attention: AttentionConfig, pattern: Sequence[str] = ("global",), *, gated: bool = True
) -> ModelConfig:
    """The config that the keys common to this file's families describe."""
    activation = keys.choice("hidden_act", activations(gated), "silu" if gated else "relu2")
    return ModelConfig(
        num_layers=keys.integer("num_hidden_layers"),
        d_model=width,
        vocab_size=keys.integer("vocab_size"),
        max_length=keys.integer("max_position_embeddings"),
        attention_pattern=tuple(pattern),
        tied_embeddings=keys.flag("tie_word_embeddings", False),
        norm=NormConfig(epsilon=keys.number("rms_norm_eps")),
        attention=attention,
        ffn=FFNConfig(hidden=keys.integer("intermediate_size"), activation=activation),
        positions=PositionConfig(rope=read_rope(keys)),
    )


def write_decoder(config: ModelConfig, *, gated: bool = True) -> dict[str, Any]:
    """The keys of `read_heads` and `read_decoder`."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.attention.num_heads,
        "num_key_value_heads": config.attention.num_kv_heads,
        "head_dim": config.attention.head_dim,
        "intermediate_size": config.ffn.hidden,
        "hidden_act": published_activation(config.ffn.activation, gated=gated),
        "rms_norm_eps": config.norm.epsilon,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tied_embeddings,
        **write_rope(config.positions.rope),
    }


def _llama_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "llama")
    width = keys.integer("hidden_size")
    attention = read_heads(keys, width, kv_heads=0)
    attention.bias = attention.out_bias = keys.flag("attention_bias", False)
    config = read_decoder(keys, width, attention)
    config.ffn.bias = keys.flag("mlp_bias", False)
    keys.finish()
    return config


def _llama_published(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.attention.bias, "mlp_bias": config.ffn.bias}
    return {"model_type": "llama", **write_decoder(config), **biases}


def _arcee_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "arcee")
    width = keys.integer("hidden_size")
    attention = read_heads(keys, width, kv_heads=0)
    attention.bias = attention.out_bias = keys.flag("attention_bias", False)
    config = read_decoder(keys, width, attention, gated=False)
    config.ffn.bias = keys.flag("mlp_bias", False)
    keys.finish()
    return config


def _arcee_published(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.attention.bias, "mlp_bias": config.ffn.bias}
    return {"model_type": "arcee", **write_decoder(config, gated=False), **biases}


def _mistral_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "mistral")
    width = keys.integer("hidden_size")
    attention = read_heads(keys, width)
    attention.window = keys.integer("sliding_window", 4096, null=0)
    kind = "local" if attention.window else "global"
    config = read_decoder(keys, width, attention, (kind,))
    pattern = layer_pattern(keys, config.num_layers, [kind] * config.num_layers)
    rule = f"at odds with sliding_window = {attention.window or None}, which all layers use"
    keys.check(pattern == (kind,), "layer_types", rule)
    keys.finish()
    return config


def _mistral_published(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "mistral", **write_decoder(config), "sliding_window": config.attention.window or None}


def read_switched_window(keys: Keys, config: ModelConfig) -> None:
    """Qwen: `use_sliding_window` makes the layers from `max_window_layers` on local, unless `layer_types` lists them."""
    used = keys.flag("use_sliding_window", False)
    window, first = keys.integer("sliding_window", 4096, null=0), keys.integer("max_window_layers", 28, least=0)
    window = window if used else 0
    kinds = ["local" if window and layer >= first else "global" for layer in range(config.num_layers)]
    config.attention_pattern = layer_pattern(keys, config.num_layers, kinds)
    local = "local" in config.attention_pattern
    keys.check(window or not local, "layer_types", "there are sliding layers, but sliding_window is not in use")
    config.attention.window = window if local else 0


def write_switched_window(config: ModelConfig) -> dict[str, Any]:
    """The keys of `read_switched_window`; `layer_types` too where layers are local, which is what newer readers take."""
    names = published_layers(config.attention_pattern, config.num_layers)
    if "sliding_attention" not in names:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    first = names.index("sliding_attention")
    window: dict[str, Any] = {"use_sliding_window": True, "sliding_window": config.attention.window, "max_window_layers": first}
    return {**window, "layer_types": names}


def _qwen2_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "qwen2")
    width = keys.integer("hidden_size")
    attention = read_heads(keys, width)
    attention.bias = True
    config = read_decoder(keys, width, attention)
    read_switched_window(keys, config)
    keys.finish()
    return config


def _qwen2_published(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "qwen2", **write_decoder(config), **write_switched_window(config)}


def _qwen3_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "qwen3")
    width = keys.integer("hidden_size")
    attention = read_heads(keys, width, head_dim=128)
    attention.bias = attention.out_bias = keys.flag("attention_bias", False)
    attention.qk_norm = True
    config = read_decoder(keys, width, attention)
    read_switched_window(keys, config)
    keys.finish()
    return config


def _qwen3_published(config: ModelConfig) -> dict[str, Any]:
    bias = {"attention_bias": config.attention.bias}
    return {"model_type": "qwen3", **write_decoder(config), **bias, **write_switched_window(config)}


def decoder_family(
    name: str,
    architecture: str,
    to_config: Callable[[Mapping[str, Any]], ModelConfig],
    to_published: Callable[[ModelConfig], dict[str, Any]],
    entries: tuple[Entry, ...] = ENTRIES,
    ignored: tuple[str, ...] = (),
    **options: Any,
) -> Family:
    """A family whose checkpoints are laid out as Llama's: a base model `model.`, a head that may be tied."""
    return Family(
        name=name,
        architecture=architecture,
        to_config=to_config,
        to_published=to_published,
        entries=lambda config: entries,
        prefix="model.",
        ignored=("*.rotary_emb.inv_freq", *ignored),
        tied=(("embed.table", "lm_head.weight"),),
        **options,
    )


def _register(
    name: str,
    architecture: str,
    to_config: Callable[[Mapping[str, Any]], ModelConfig],
    to_published: Callable[[ModelConfig], dict[str, Any]],
) -> None:
    def checked(config: ModelConfig) -> dict[str, Any]:
        return check_inverse(config, to_published(config), to_config, name)

    register_family(decoder_family(name, architecture, to_config, checked), name)


_register("llama", "LlamaForCausalLM", _llama_config, _llama_published)
_register("arcee", "ArceeForCausalLM", _arcee_config, _arcee_published)
_register("mistral", "MistralForCausalLM", _mistral_config, _mistral_published)
_register("qwen2", "Qwen2ForCausalLM", _qwen2_config, _qwen2_published)
_register("qwen3", "Qwen3ForCausalLM", _qwen3_config, _qwen3_published)
