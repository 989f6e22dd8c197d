"""A GGUF file seen as the Hugging Face checkpoint that it was converted from: `config.json` and tensors under their old names.

The families' name maps then serve both formats. What llama.cpp's converter (convert_hf_to_gguf.py) changed in the numbers is
undone on reading: rows of q and k interleaved for its RoPE, one added to Gemma's norms, Conv1D transposed, experts stacked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.io.gguf import GgufFile
from sparsejax.io.gguf_names import (
    ARCHITECTURES,
    WITH_EXPERTS,
    Architecture,
    Change,
    Interleaved,
    PlusOne,
    Regrouped,
    Unchanged,
)
from sparsejax.io.tensors import TensorInfo
from sparsejax.plugs import ConfigError, check_choice, nearest

BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")
# Tensors that hold no weights: what they say goes into the config.
DERIVED = ("rope_freqs.weight",)
# What every published Llama 3 uses beside its factor; a GGUF file holds only the divisors of frequencies that come of them.
LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp knows the one model of each Gemma that scales its attention by D / H and not by the head size by its layers.
SCALED_BY_WIDTH = {"gemma2": 46, "gemma3_text": 62}
LISTED = 12  # names in one message


def as_hf(gguf: GgufFile) -> tuple[dict[str, Any], GgufCheckpoint]:
    """The `config.json` that fits a GGUF file, and its tensors under the names of that config's architecture.

    Raises:
      ConfigError: an architecture that is not known, metadata that is missing, of the wrong type or at odds with the tensors, a
        tensor that the architecture does not have, or one part of a split file.
    """
    general, split = _Metadata(gguf, "general"), _Metadata(gguf, "split")
    parts = split.integer("count", default=0)
    if parts > 1:
        raise ConfigError(f"{gguf.path}: one of {parts} parts of a split file; join them with llama.cpp's gguf-split --merge")
    name = general.value("architecture", str)
    check_choice(f"{gguf.path}: metadata 'general.architecture'", name, ARCHITECTURES)
    reader = _Metadata(gguf, name)
    experts = reader.integer("expert_count", default=0)
    architecture = WITH_EXPERTS[name] if experts and name in WITH_EXPERTS else ARCHITECTURES[name]
    _check_sizes(reader)
    return _config(reader, architecture), _checkpoint(reader, architecture)


class _Metadata:
    """Typed access to the keys of one prefix, such as the architecture."""

    def __init__(self, gguf: GgufFile, prefix: str):
        self.gguf, self.path, self.prefix = gguf, gguf.path, prefix

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.gguf.metadata

    def value(self, key: str, *types: type, default: Any = None) -> Any:
        found = self.gguf.metadata.get(f"{self.prefix}.{key}", default)
        if found is None:
            raise self.error(key, "is missing")
        if type(found) not in types:
            raise self.error(key, f"is a {type(found).__name__}, expected {' or '.join(one.__name__ for one in types)}")
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer, or the default where that is 0."""
        found = self.value(key, int, default=default)
        if found < 1 and found != default:
            raise self.error(key, f"= {found}: must be positive")
        return found

    def number(self, key: str, default: float | None = None) -> float:
        found = float(self.value(key, float, int, default=default))
        if not math.isfinite(found):
            raise self.error(key, f"= {found}: must be finite")
        return found

    def size(self, name: str, axis: int) -> int:
        """Of a tensor that must be there."""
        if name not in self.gguf.tensors:
            raise ConfigError(f"{self.path}: tensor {name!r} is missing")
        shape = self.gguf.tensors[name].shape
        if axis >= len(shape):
            raise ConfigError(f"{self.path}: tensor {name!r} has shape {shape}: at least {axis + 1} dimensions are expected")
        return shape[axis]

    def heads(self) -> tuple[int, int]:
        """Of queries and of keys; the first is a multiple of the second."""
        heads = self.integer("attention.head_count")
        kv_heads = self.integer("attention.head_count_kv", default=heads)
        if heads % kv_heads:
            raise self.error("attention.head_count_kv", f"= {kv_heads}: the {heads} query heads are no multiple of it")
        return heads, kv_heads

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: metadata '{self.prefix}.{key}' {message}")


def _check_sizes(reader: _Metadata) -> None:
    """What metadata and tensors both say must agree before anything is sized by it."""
    found = {int(match[1]) for name in reader.gguf.tensors if (match := BLOCK.match(name))}
    layers = reader.integer("block_count")
    if len(found) != layers or max(found) != layers - 1:
        raise reader.error("block_count", f"= {layers}, but there are tensors of {len(found)} blocks")
    rows, width = (reader.size("token_embd.weight", axis) for axis in (0, 1))
    for key, size in (("vocab_size", rows), ("embedding_length", width)):
        if reader.integer(key, default=size) != size:
            raise reader.error(key, f"= {reader.integer(key)}, but 'token_embd.weight' has shape {(rows, width)}")


def _config(reader: _Metadata, architecture: Architecture) -> dict[str, Any]:
    """As `config.json` has it."""
    tensors = reader.gguf.tensors
    config: dict[str, Any] = {"model_type": architecture.model_type, "architectures": [architecture.hf_class]}
    config["vocab_size"] = reader.size("token_embd.weight", 0)
    config |= {key: reader.integer(source) for key, source in architecture.integers.items()}
    config |= {key: reader.number(*source) for key, source in architecture.numbers.items()}
    config |= {key: reader.size(*source) for key, source in architecture.sizes.items()}
    config |= architecture.constants
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture.rotary:
        config |= _attention(reader)
    if architecture.model_type == "gpt_neox":
        config |= _neox(reader)
    if architecture.model_type in SCALED_BY_WIDTH:
        config |= _gemma(reader, config)
    if architecture.model_type == "llama":
        config |= {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": "blk.0.ffn_up.bias" in tensors}
    return config | _token_ids(reader.gguf)


def _attention(reader: _Metadata) -> dict[str, Any]:
    """Llama's keys for heads and RoPE."""
    heads, kv_heads = reader.heads()
    size = reader.integer("attention.key_length", default=reader.integer("embedding_length") // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if reader.integer(key, default=size) != size:
            raise reader.error(key, f"= {reader.integer(key)}: only heads of one size ({size}), rotated whole, are known")
    return {"num_key_value_heads": kv_heads, "head_dim": size, **_rope(reader, size)}


def _rope(reader: _Metadata, head_dim: int) -> dict[str, Any]:
    theta = reader.number("rope.freq_base", 10000.0)
    kind = reader.value("rope.scaling.type", str, default="none")
    if "rope_freqs.weight" in reader.gguf.tensors:
        return {"rope_theta": theta, "rope_scaling": _llama3_scaling(reader.gguf, theta, head_dim)}
    if kind == "none":
        return {"rope_theta": theta, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": reader.number("rope.scaling.factor")}
    if reader.has("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = reader.integer("rope.scaling.original_context_length")
    return {"rope_theta": theta, "rope_scaling": scaling}


def _llama3_scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """The Llama 3 scaling whose divisors of frequencies a file holds; they are computed again and must agree."""
    stored = np.asarray(gguf.read("rope_freqs.weight"), np.float64)
    low, high, length = LLAMA3_SCALING.values()
    turns = length / (2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim))  # of each pair in the original context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    divisors = 1 / ((1 - smooth) / stored.max() + smooth)
    if stored.shape != divisors.shape or not np.allclose(stored, divisors, rtol=1e-3):
        raise ConfigError(f"{gguf.path}: tensor 'rope_freqs.weight' is not Llama 3's scaling of RoPE with {LLAMA3_SCALING}")
    return {"rope_type": "llama3", "factor": float(stored.max()), **LLAMA3_SCALING}


def _neox(reader: _Metadata) -> dict[str, Any]:
    size = reader.integer("embedding_length") // reader.heads()[0]
    return {
        "rotary_pct": reader.integer("rope.dimension_count", default=size) / size,
        "rotary_emb_base": reader.number("rope.freq_base", 10000.0),
        "use_parallel_residual": reader.value("use_parallel_residual", bool, default=True),
    }


def _gemma(reader: _Metadata, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the files leave to llama.cpp's own tables."""
    by_width = config["num_hidden_layers"] == SCALED_BY_WIDTH[config["model_type"]]
    scale = config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]
    if config["model_type"] == "gemma2":
        window = reader.integer("attention.sliding_window", default=4096)
        return {"query_pre_attn_scalar": scale, "sliding_window": window}
    return {
        "query_pre_attn_scalar": scale,
        "rope_local_base_freq": reader.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": reader.number("final_logit_softcapping", 0.0) or None,
    }


def _token_ids(gguf: GgufFile) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding"}
    stored = {f"{ours}_token_id": gguf.metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()}
    return {key: value for key, value in stored.items() if isinstance(value, int)}


@dataclass(frozen=True)
class Part:
    """Where a published tensor is found: a tensor of the file, an expert on its leading axis, and what undoes the converter."""

    stored: str
    expert: int | None
    change: Change


@dataclass(frozen=True)
class GgufCheckpoint:
    """A `TensorSource` over a GGUF file, under published names and in published layouts."""

    gguf: GgufFile
    parts: Mapping[str, Part]
    tensors: Mapping[str, TensorInfo]

    @property
    def path(self) -> Path:
        return self.gguf.path

    def read(self, name: str) -> np.ndarray:
        if name not in self.parts:
            raise ConfigError(f"{self.path}: there is no tensor {name!r}.{nearest(name, self.parts)}")
        stored, expert, change = self.parts[name].stored, self.parts[name].expert, self.parts[name].change
        array = self.gguf.read(stored) if expert is None else self.gguf.read_rows(stored, expert, expert + 1)[0]
        return change.undo(array)


def _checkpoint(reader: _Metadata, architecture: Architecture) -> GgufCheckpoint:
    """Every tensor under its published name."""
    changes = _changes(reader, architecture)
    parts: dict[str, Part] = {}
    tensors: dict[str, TensorInfo] = {}
    unknown = []
    for stored, info in reader.gguf.tensors.items():
        stem = stored.rpartition(".")[0]
        block = BLOCK.fullmatch(stem)
        change = changes.get(block[2] if block else stem, Unchanged())
        published = _published(stored, architecture)
        if published is None:
            unknown += [stored] * (stored not in DERIVED)
            continue
        experts = range(_stacked(reader, stored, info)) if "{expert}" in published else (None,)
        shape = info.shape[1:] if "{expert}" in published else info.shape
        try:
            tensor = TensorInfo(change.published(shape), np.dtype(np.float32) if isinstance(change, PlusOne) else info.dtype)
        except ValueError as error:
            raise ConfigError(f"{reader.path}: tensor {stored!r} of shape {info.shape}: {error}") from None
        for expert in experts:
            name = published.format(expert=expert)
            parts[name], tensors[name] = Part(stored, expert, change), tensor
    if unknown:
        more = f" and {len(unknown) - LISTED} more" if len(unknown) > LISTED else ""
        listed = ", ".join(unknown[:LISTED])
        raise ConfigError(f"{reader.path}: tensors that no {architecture.model_type} model has: {listed}{more}")
    return GgufCheckpoint(reader.gguf, parts, tensors)


def _published(stored: str, architecture: Architecture) -> str | None:
    """The published name of a tensor, in which `{expert}` may stand; None: the architecture has no such tensor."""
    stem, _, suffix = stored.rpartition(".")
    block = BLOCK.fullmatch(stem)
    name = architecture.blocks.get(block[2]) if block else architecture.names.get(stem)
    if name is None or suffix not in ("weight", "bias"):
        return None
    return f"{architecture.layer.format(layer=block[1])}{name}.{suffix}" if block else f"{name}.{suffix}"


def _stacked(reader: _Metadata, stored: str, info: TensorInfo) -> int:
    """The number of experts in a tensor."""
    experts = reader.integer("expert_count")
    if len(info.shape) != 3 or info.shape[0] != experts:
        raise ConfigError(f"{reader.path}: tensor {stored!r} has shape {info.shape}; expected [{experts} experts, out, in]")
    return experts


def _changes(reader: _Metadata, architecture: Architecture) -> dict[str, Change]:
    """What the converter changed, with the numbers of heads filled in."""
    heads, kv_heads = reader.heads()
    by_heads: dict[str, Change] = {"q": Interleaved(heads), "k": Interleaved(kv_heads), "qkv": Regrouped(heads)}
    return {stem: by_heads[one] if isinstance(one, str) else one for stem, one in architecture.changes.items()}
