"""Qwen2-MoE (raw gates, shared experts behind a sigmoid; 2407.10671) and Qwen3-MoE (norms at q and k; 2505.09388)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsejax.io.family import register_family
from sparsejax.io.name_map import Transposed, entry, linear
from sparsejax.models.config import ModelConfig
from sparsejax.models.families import llama
from sparsejax.models.families.experts import (
    dense_layers,
    expert_entries,
    experts_of,
    in_plain_terms,
    number_of_experts,
    read_feed,
    sparse_pattern,
)
from sparsejax.models.families.inverse import check_inverse
from sparsejax.models.families.keys import Keys, layer_pattern, published_layers

_MLP = "model.layers.{layer}.mlp"
EXPERT_ENTRIES = expert_entries(_MLP, router="gate", gate="gate_proj", up="up_proj", down="down_proj")
SHARED_ENTRIES = (
    *(part for name in ("gate", "up", "down")
      for part in linear(f"blocks.{{layer}}.mlp.shared.{name}", f"{_MLP}.shared_expert.{name}_proj")),
    entry("blocks.{layer}.mlp.shared_gate.kernel", f"{_MLP}.shared_expert_gate.weight", Transposed()),
)  # fmt: skip


def _qwen2_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "qwen2_moe")
    width = keys.integer("hidden_size")
    attention = llama.read_heads(keys, width, kv_heads=16)
    attention.bias = keys.flag("qkv_bias", True)
    config = llama.read_decoder(keys, width, attention)
    _read_listed_window(keys, config)
    hidden, together = keys.integer("moe_intermediate_size"), keys.integer("shared_expert_intermediate_size")
    rule = f"expected a multiple of moe_intermediate_size = {hidden}"
    keys.check(together % hidden == 0, "shared_expert_intermediate_size", rule)
    shared: dict[str, Any] = dict(shared=together // hidden, shared_gate=True)
    config.feed_pattern = _read_pattern(keys, config, "num_experts", **shared)
    keys.finish("router_*")
    return config


def _qwen3_config(published: Mapping[str, Any]) -> ModelConfig:
    keys = Keys(published, "qwen3_moe")
    width = keys.integer("hidden_size")
    attention = llama.read_heads(keys, width, kv_heads=4)
    attention.bias = attention.out_bias = keys.flag("attention_bias", False)
    attention.qk_norm = True
    used, window = keys.flag("use_sliding_window", False), keys.integer("sliding_window", 4096, null=0)
    attention.window = window if used else 0
    config = llama.read_decoder(keys, width, attention, ("local" if attention.window else "global",))
    # Published files have num_experts; transformers 5 writes the other name.
    keys.check(not (keys.given("num_experts") and keys.given("num_local_experts")), "num_experts",
               "num_local_experts is given too; one of them is expected")  # fmt: skip
    name = "num_local_experts" if keys.given("num_local_experts") else "num_experts"
    config.feed_pattern = _read_pattern(keys, config, name)
    keys.finish("router_*", "max_window_layers")
    return config


def _read_pattern(keys: Keys, config: ModelConfig, experts: str, **shared: Any) -> tuple[str, ...]:
    renormalised = keys.flag("norm_topk_prob", False)
    feed = read_feed(keys, experts=experts, hidden="moe_intermediate_size", renormalised=renormalised, **shared)
    return sparse_pattern(keys, config.num_layers, feed)


def _read_listed_window(keys: Keys, config: ModelConfig) -> None:
    """Which layers a window is for has changed between releases of the reference, so they must be listed."""
    used, window = keys.flag("use_sliding_window", False), keys.integer("sliding_window", 4096, null=0, least=0)
    keys.value("max_window_layers", None)
    keys.check(not used or keys.given("layer_types"), "use_sliding_window", "needs layer_types, which says for which layers")
    config.attention_pattern = layer_pattern(keys, config.num_layers, ["global"] * config.num_layers)
    local = "local" in config.attention_pattern
    keys.check(not local or (used and window), "layer_types", "there are sliding layers, but sliding_window is not in use")
    config.attention.window = window if local else 0


def _qwen2_published(config: ModelConfig) -> dict[str, Any]:
    config, spec = in_plain_terms(config), experts_of(config)
    kinds = published_layers(config.attention_pattern, config.num_layers)
    local: dict[str, Any] = {"use_sliding_window": True, "sliding_window": config.attention.window, "layer_types": kinds}
    published = {
        "model_type": "qwen2_moe",
        **_write_common(config, spec),
        "qkv_bias": config.attention.bias,
        "num_experts": spec.experts,
        "shared_expert_intermediate_size": spec.shared * spec.width(config),
        **(local if config.attention.window else {"use_sliding_window": False}),
    }
    return check_inverse(config, published, _qwen2_config, "qwen2_moe")


def _qwen3_published(config: ModelConfig) -> dict[str, Any]:
    config, spec = in_plain_terms(config), experts_of(config)
    published = {
        "model_type": "qwen3_moe",
        **_write_common(config, spec),
        "attention_bias": config.attention.bias,
        "num_experts": spec.experts,
        "use_sliding_window": config.attention.window > 0,
        "sliding_window": config.attention.window or None,
    }
    return check_inverse(config, published, _qwen3_config, "qwen3_moe")


def _write_common(config: ModelConfig, spec: Any) -> dict[str, Any]:
    return {
        **llama.write_decoder(config),
        "num_experts_per_tok": spec.k,
        "moe_intermediate_size": spec.width(config),
        "norm_topk_prob": spec.combine == "renorm",
        "mlp_only_layers": dense_layers(config),
        "decoder_sparse_step": 1,
    }


ENTRIES = (*llama.ENTRIES, *EXPERT_ENTRIES, *SHARED_ENTRIES)

for _name, _architecture, _read, _write in (
    ("qwen2_moe", "Qwen2MoeForCausalLM", _qwen2_config, _qwen2_published),
    ("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_config, _qwen3_published),
):
    register_family(llama.decoder_family(_name, _architecture, _read, _write, ENTRIES, experts=number_of_experts), _name)
