"""`--model NAME_OR_PATH`: a known name, a Hugging Face folder or zip, a GGUF or ONNX file, a run or a model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from sparsejax import config_text
from sparsejax.data import tokenizers
from sparsejax.data.tokenizers import Tokenizer
from sparsejax.io import gguf_model, model_folder, model_json, onnx_file, onnx_layouts, sparsity_config
from sparsejax.io.codecs.store import PackedSource
from sparsejax.io.codecs.stores import store_of, without_quantization
from sparsejax.io.family import family_of
from sparsejax.io.gguf import open_gguf
from sparsejax.io.gguf_tokenizer import tokenizer_from_gguf
from sparsejax.io.hf_folder import HfFiles, read_hf
from sparsejax.io.hub import Located, resolve
from sparsejax.io.model import Model, computed_in
from sparsejax.io.safetensors_file import open_safetensors
from sparsejax.io.sentence_embedding import read_sentence_embedding
from sparsejax.io.tensors import TensorSource
from sparsejax.io.weights import input_rules, load_values
from sparsejax.models.config import ModelConfig
from sparsejax.nnx_compat import LAYERCAST
from sparsejax.plugs import ConfigError, check_choice
from sparsejax.train.load_run import load_run

DTYPES = ("float32", "bfloat16", LAYERCAST)


def load(name_or_path: str, *, dtype: str = "float32", mesh: Mesh | None = None) -> Model:
    """The model that a name or path means, its weights straight on their devices.

    Args:
      name_or_path: see `hub.resolve`.
      dtype: of matrices, embeddings and biases, and of the computation; a model folder keeps the types it was saved with.
        `layercast`: linear maps in bfloat16, cast where they are multiplied, and all else in float32 (arXiv 2506.09501).
      mesh: where the parameters go; None: the default device.
    Raises:
      ConfigError: what was given is not there or cannot be used; names the file and the tensor or key.
    """
    check_choice("--dtype", dtype, DTYPES)
    located = resolve(name_or_path)
    return _LOADERS[located.kind](located, dtype, mesh)


def config_of(name_or_path: str) -> ModelConfig:
    """The config of the model that a name or path means, without its weights; of a Hugging Face folder without its rules.

    Raises:
      ConfigError: as `load`, for what is read.
    """
    located = resolve(name_or_path)
    if located.kind in ("model", "run"):
        return config_text.from_values(model_json.read(located.path).config, ModelConfig, str(located.path / "model.json"))
    published: Mapping[str, Any]
    if located.kind == "hf":
        published = without_quantization(read_hf(located.path).config)
    elif located.kind == "gguf":
        published, _ = gguf_model.as_hf(open_gguf(located.path))
    else:
        published, _ = onnx_layouts.as_hf(onnx_file.OnnxFile(located.path))
    return family_of(published, str(located.path)).to_config(published)


def _published(
    located: Located, published: Mapping[str, Any], source: TensorSource, about: dict[str, Any], dtype: str, mesh: Mesh | None
) -> Model:
    """The Model that a published config and its tensors decide; it has no tokenizer yet."""
    family = family_of(published, str(located.path))
    config = computed_in(family.to_config(published), dtype)
    structure, values = load_values(config, family, source, dtype=dtype, mesh=mesh)
    source_fields = {"family": family.name, "path": str(located.path), "config": dict(published), **about}
    model = Model(located.name, config, structure, values, source=source_fields)
    rules = input_rules(config, family, source)
    model = model.with_rules({}, inputs=rules) if rules else model
    return sparsity_config.applied(model, located.path) if located.kind == "hf" else model


def _load_hf(located: Located, dtype: str, mesh: Mesh | None) -> Model:
    files = read_hf(located.path)
    about: dict[str, Any] = {"format": "hf", "generation": files.generation, "special_tokens": files.special_tokens}
    sentence = read_sentence_embedding(located.path)
    if sentence:
        about["sentence_embedding"] = sentence
    tokenizer = _hf_tokenizer(files)
    source: TensorSource = open_safetensors(located.path)
    store = store_of(files.config, str(located.path))
    if store is not None:
        source, about["quantization"] = PackedSource(source, store), store.document()
    loaded = _published(located, without_quantization(files.config), source, about, dtype, mesh)
    return dataclasses.replace(loaded, tokenizer=tokenizer, chat_template=files.chat_template)


def _load_gguf(located: Located, dtype: str, mesh: Mesh | None) -> Model:
    gguf = open_gguf(located.path)
    published, source = gguf_model.as_hf(gguf)
    found = tokenizer_from_gguf(gguf)
    if found.eos_id is None:
        raise ConfigError(f"{located.path}: metadata 'tokenizer.ggml.eos_token_id' is missing")
    tokenizer = tokenizers.published(found.tokenizer, eos=found.eos_id, bos=found.bos_id, pad=found.pad_id)
    about = {
        "format": "gguf",
        "title": str(gguf.metadata.get("general.name", located.name)),
        "generation": {"eos_token_id": list(found.stop_ids)},
        "special_tokens": {role.removesuffix("_token"): text for role, text in found.special_tokens.items()},
    }
    loaded = _published(located, published, source, about, dtype, mesh)
    return dataclasses.replace(loaded, tokenizer=tokenizer, chat_template=found.chat_template)


def _load_onnx(located: Located, dtype: str, mesh: Mesh | None) -> Model:
    published, source = onnx_layouts.as_hf(onnx_file.OnnxFile(located.path))
    return _published(located, published, source, {"format": "onnx"}, dtype, mesh)


def _load_folder(located: Located, dtype: str, mesh: Mesh | None) -> Model:
    return model_folder.load(located.path, name=located.name, dtype=dtype, mesh=mesh)


def _load_run(located: Located, dtype: str, mesh: Mesh | None) -> Model:
    return load_run(located.path, name=located.name, dtype=dtype, mesh=mesh)


def _hf_tokenizer(files: HfFiles) -> Tokenizer | None:
    """The tokenizer with the ids of its special tokens; a vocabulary without an end token (BERT) ends with its separator."""
    if files.tokenizer_json is None:
        return None
    library = tokenizers.parse_tokenizer(files.tokenizer_json, f"{files.path}: tokenizer.json")
    texts = files.special_tokens

    def number(role: str, *roles: str) -> int | None:
        """The id by its text in the tokenizer's config, else by the model's configs, else by a published name."""
        named = (library.token_to_id(texts[one]) for one in (role, *roles) if one in texts)
        configured = (_first(config.get(f"{role}_token_id")) for config in (files.generation, files.config))
        known = (library.token_to_id(text) for text in tokenizers.PUBLISHED_NAMES[role])
        return next((found for found in (*named, *configured, *known) if found is not None), None)

    eos = number("eos", "sep")
    if eos is None:
        raise ConfigError(f"{files.path}: neither the tokenizer's config, config.json nor the vocabulary names an end token")
    return tokenizers.published(library, eos=eos, bos=number("bos", "cls"), pad=number("pad"), mask=number("mask"))


def _first(ids: Any) -> int | None:
    """One id of a config's value: a number, or the first of a list."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    return first if type(first) is int else None


_LOADERS = {"hf": _load_hf, "gguf": _load_gguf, "onnx": _load_onnx, "model": _load_folder, "run": _load_run}
