"""The architectures of GGUF files as data: what their metadata and tensors are called in a Hugging Face checkpoint.

Sources: the tensor names of gguf-py, and llama.cpp's convert_hf_to_gguf.py for what it changes and leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Change(Protocol):
    """What the converter did to a tensor; `undo` takes it back, from `shape` to `published(shape)`."""

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Raises ValueError where the shape cannot have come from the converter."""
        ...

    def undo(self, array: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Unchanged:
    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def undo(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclass(frozen=True)
class Interleaved:
    """Rows of q or k, whose two halves of each head were interleaved for a RoPE that rotates neighbours."""

    heads: int

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] % (2 * self.heads):
            raise ValueError(f"{shape[0]} rows are not {self.heads} heads of an even size")
        return shape

    def undo(self, array: np.ndarray) -> np.ndarray:
        pairs = array.reshape(self.heads, -1, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape)


@dataclass(frozen=True)
class Regrouped:
    """A fused q, k, v that was grouped by head (q, k, v of the first head, ...) and now is all of q, then k, then v."""

    heads: int

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if shape[0] % (3 * self.heads):
            raise ValueError(f"{shape[0]} rows are not q, k and v of {self.heads} heads")
        return shape

    def undo(self, array: np.ndarray) -> np.ndarray:
        groups = array.reshape(3, self.heads, -1, *array.shape[1:])
        return groups.swapaxes(0, 1).reshape(array.shape)


@dataclass(frozen=True)
class PlusOne:
    """Gemma's norm weights w, stored as the gain 1 + w."""

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def undo(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float32) - np.float32(1)


@dataclass(frozen=True)
class Transposed:
    """GPT-2's Conv1D, whose weights are published as [in, out]."""

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[::-1]

    def undo(self, array: np.ndarray) -> np.ndarray:
        return array.T


@dataclass(frozen=True)
class Row:
    """A linear map to one number, published as [1, in]."""

    def published(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, shape[-1])

    def undo(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(1, -1)


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Fields:
      model_type, hf_class: of the `config.json`.
      integers: config key -> metadata key, without the architecture's prefix; required and positive.
      numbers: config key -> (metadata key, default), None: required.
      sizes: config key -> (tensor, axis) that shows it.
      constants: config keys that the architecture fixes.
      names: tensor -> published name, without `.weight` and `.bias`, which stay.
      blocks: the same for the tensors of a block, without `blk.N.` and without `layer`. A published name with `{expert}` is one
        slice of the leading axis.
      layer: published prefix of the tensors of a block.
      changes: tensor -> what the converter did to it: `q`, `k` (Interleaved), `qkv` (Regrouped), or a Change.
      rotary: Llama's keys for heads and RoPE apply.
    """

    model_type: str
    hf_class: str
    integers: Mapping[str, str]
    numbers: Mapping[str, tuple[str, float | None]]
    constants: Mapping[str, Any]
    names: Mapping[str, str]
    blocks: Mapping[str, str]
    layer: str = "model.layers.{layer}."
    sizes: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    changes: Mapping[str, str | Change] = field(default_factory=dict)
    rotary: bool = True


_SIZES = {"hidden_size": "embedding_length", "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
          "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length"}
_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_EXPERT_WIDTH = {"moe_intermediate_size": ("blk.0.ffn_gate_exps.weight", 1)}
_RMS = {"rms_norm_eps": ("attention.layer_norm_rms_epsilon", None)}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm"}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_ROUTED = {"ffn_gate_inp": "mlp.gate", "ffn_gate_exps": "mlp.experts.{expert}.gate_proj",
           "ffn_up_exps": "mlp.experts.{expert}.up_proj", "ffn_down_exps": "mlp.experts.{expert}.down_proj"}
_SHARED = {"ffn_gate_inp_shexp": "mlp.shared_expert_gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
           "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj"}
_MIXTRAL = {"ffn_gate_inp": "block_sparse_moe.gate", "ffn_gate_exps": "block_sparse_moe.experts.{expert}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{expert}.w3", "ffn_down_exps": "block_sparse_moe.experts.{expert}.w2"}
_SANDWICH = {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
             "post_ffw_norm": "post_feedforward_layernorm"}
_GEMMA_NORMS = ("output_norm", "attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm")
_GEMMA_CHANGES: dict[str, str | Change] = dict.fromkeys(_GEMMA_NORMS, PlusOne())
_SILU = {"hidden_act": "silu"}
_EVERY_LAYER = {"decoder_sparse_step": 1, "mlp_only_layers": []}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", _SIZES, _RMS, _SILU, _TOP, _ATTENTION | _GATED,
        changes={"attn_q": "q", "attn_k": "k"}),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _SIZES, _RMS, _SILU, _TOP, _ATTENTION | _GATED),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _SIZES, _RMS, _SILU, _TOP, _ATTENTION | _QK_NORM | _GATED),
    "qwen2moe": Architecture(
        "qwen2_moe", "Qwen2MoeForCausalLM", _SIZES | _EXPERTS, _RMS,
        _SILU | _EVERY_LAYER | {"norm_topk_prob": False}, _TOP, _ATTENTION | _ROUTED | _SHARED,
        sizes=_EXPERT_WIDTH | {"shared_expert_intermediate_size": ("blk.0.ffn_gate_shexp.weight", 0)},
        changes={"ffn_gate_inp_shexp": Row()}),
    "qwen3moe": Architecture(
        "qwen3_moe", "Qwen3MoeForCausalLM", _SIZES | _EXPERTS, _RMS,
        _SILU | _EVERY_LAYER | {"norm_topk_prob": True}, _TOP, _ATTENTION | _QK_NORM | _ROUTED,
        sizes=_EXPERT_WIDTH),
    "olmoe": Architecture(
        "olmoe", "OlmoeForCausalLM", _SIZES | _EXPERTS, _RMS, _SILU | {"norm_topk_prob": False, "clip_qkv": None},
        _TOP, _ATTENTION | _QK_NORM | _ROUTED),
    "gemma2": Architecture(
        "gemma2", "Gemma2ForCausalLM", _SIZES,
        _RMS | {"attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": ("final_logit_softcapping", 30.0)},
        {"hidden_activation": "gelu_pytorch_tanh"}, _TOP, _ATTENTION | _GATED | _SANDWICH, changes=_GEMMA_CHANGES),
    "gemma3": Architecture(
        "gemma3_text", "Gemma3ForCausalLM", _SIZES | {"sliding_window": "attention.sliding_window"}, _RMS,
        {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6, "attn_logit_softcapping": None},
        _TOP, _ATTENTION | _QK_NORM | _GATED | _SANDWICH, changes=_GEMMA_CHANGES),
    "gpt2": Architecture(
        "gpt2", "GPT2LMHeadModel",
        {"n_embd": "embedding_length", "n_layer": "block_count", "n_head": "attention.head_count",
         "n_inner": "feed_forward_length", "n_positions": "context_length", "n_ctx": "context_length"},
        {"layer_norm_epsilon": ("attention.layer_norm_epsilon", None)}, {"activation_function": "gelu_new"},
        {"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
         "output": "lm_head"},
        {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc",
         "ffn_down": "mlp.c_proj"},
        layer="transformer.h.{layer}.", rotary=False,
        changes=dict.fromkeys(("attn_qkv", "attn_output", "ffn_up", "ffn_down"), Transposed())),
    "gptneox": Architecture(
        "gpt_neox", "GPTNeoXForCausalLM", _SIZES, {"layer_norm_eps": ("attention.layer_norm_epsilon", None)},
        {"hidden_act": "gelu", "attention_bias": True},
        {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        {"attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
         "ffn_norm": "post_attention_layernorm", "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"},
        layer="gpt_neox.layers.{layer}.", rotary=False, changes={"attn_qkv": "qkv"}),
}
# What an architecture is where the file has an `expert_count`.
WITH_EXPERTS = {
    "llama": Architecture(
        "mixtral", "MixtralForCausalLM",
        _SIZES | {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}, _RMS, _SILU,
        _TOP, _ATTENTION | _MIXTRAL, changes={"attn_q": "q", "attn_k": "k"}),
}
