"""A model as a Hugging Face folder: safetensors, configs, tokenizer and model card, under the names of a published family.

Importing it again gives the same parameters bit for bit.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from sparsejax import plugs
from sparsejax.data.tokenizers import ByteCodec, LibraryCodec, Tokenizer
from sparsejax.io import sparsity_config
from sparsejax.io.codecs.stores import EXPORTS, KEY
from sparsejax.io.family import Family
from sparsejax.io.model import Model
from sparsejax.io.model_folder import claim, write_texts
from sparsejax.io.safetensors_file import write_safetensors
from sparsejax.io.weights_out import plan_tensors, quantized_maps
from sparsejax.layers.op import FIELDS, SiteRules
from sparsejax.models.config import ModelConfig
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError, check_choice

PACKAGES = ("jax", "flax", "safetensors", "tokenizers")


class Exported(NamedTuple):
    """What was written: family, files by name, bytes of the weights, and notes on what the format cannot say."""

    family: str
    files: list[str]
    weight_bytes: int
    notes: list[str]


def write_hf(
    model: Model, folder: Path | str, *, store: str = "", command: str = "", results: Sequence[tuple[str, str]] = ()
) -> Exported:
    """Write a model into a new or empty folder.

    Args:
      model: with plain (not packed) parameters, in whose dtypes it is stored; with a `store`, kernels may be QTensors.
      folder: the target.
      store: of `io.codecs.stores.EXPORTS`: how quantized kernels are stored; empty: there are none.
      command: the command line, for the model card.
      results: (what, value) rows of the card's table.
    Raises:
      ConfigError: no published family can express the config (says which field for each that comes near), packed weights that
        the store does not hold, or a folder that is in use.
    """
    dense = model.with_rules()
    family, published = family_for(dense)
    published = {"architectures": [family.architecture], **_special_ids(model), **published, "dtype": model.config.dtype}
    chosen = None
    if store:
        check_choice("--format", store, EXPORTS)
        chosen = EXPORTS[store](*quantized_maps(dense.config, family, dense.structure, dense.values))
        published[KEY] = chosen.document()
    plan = plan_tensors(dense.config, family, dense.structure, dense.values, chosen)
    arrays = sparsity_config.arrays_of_ops(model)
    documents: dict[str, Any] = {"config.json": published, **_tokenizer_documents(model)}
    extra = sparsity_config.written(model.config)
    notes = [f"The linear maps are quantized, stored as {store}; config.json says how."] if store else []
    if extra is not None:
        documents[sparsity_config.NAME] = extra
        beside = f", what they were fitted to in {sparsity_config.ARRAYS}" if arrays else ""
        rules = SiteRules.of(model.config)
        merged = any(getattr(op, "merged", False) for field in FIELDS for _, ops in getattr(rules, field) for op in ops)
        without = "must not run it: the kernels hold the inverse of rotations" if merged else "compute the dense model"
        notes.append(
            "config.json has no words for rules (model.inputs, weights, neurons, residuals): they are in "
            f"{sparsity_config.NAME}{beside}, and readers that do not know it {without}"
        )
    texts = {"README.md": model_card(model, family, command, results, notes)}
    texts |= {name: _text(document) for name, document in reversed(documents.items())}
    folder = claim(folder, "--out")
    written = write_safetensors(folder, plan)
    if arrays:
        apart = folder / "arrays"
        (single,) = write_safetensors(apart, arrays, max_shard_bytes=2**62).files
        os.replace(single, folder / sparsity_config.ARRAYS)
        apart.rmdir()
    write_texts(folder, texts)
    return Exported(family.name, sorted(p.name for p in folder.iterdir()), written.size, notes)


def family_for(model: Model) -> tuple[Family, dict[str, Any]]:
    """The family to write a model as, with its `config.json`: the one it came from, else the first that can express it."""
    families = {family.name: family for family in (plugs.resolve("family", name) for name in plugs.names("family"))}
    own = model.source.get("family")
    if own in families:
        return families[own], families[own].to_published(model.config)
    reasons = {}
    for family in families.values():
        try:
            return family, family.to_published(model.config)
        except ConfigError as error:
            reasons[family.name] = str(error)
    # A reason that names our fields is that of a family which read the config; the fewest fields are the nearest.
    nearest = sorted(reasons, key=lambda name: (" model." not in reasons[name], reasons[name].count(" model."), name))[:3]
    told = "; ".join(f"{name}: {reasons[name]}" for name in nearest)
    raise ConfigError(f"--format hf: no published family can express {model.name}. The nearest: {told}")


def _special_ids(model: Model) -> dict[str, Any]:
    """Ids of special tokens as `config.json` has them: as published, else the tokenizer's."""
    published = model.source.get("config") or {}
    found = {key: value for key, value in published.items() if key.endswith("_token_id")}
    if not found and model.tokenizer is not None:
        found = {f"{role}_token_id": getattr(model.tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")}
    return found


def _tokenizer_documents(model: Model) -> dict[str, Any]:
    """tokenizer.json, its config, the chat template, and the ids that end a text."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return {}
    texts = special_texts(tokenizer, model.source.get("special_tokens") or {})
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.max_length,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": text for role, text in texts.items()},
    }
    generation = model.source.get("generation") or {"eos_token_id": tokenizer.eos_id}
    start = {key: value for key, value in _special_ids(model).items() if key == "decoder_start_token_id"}
    generation = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id, **start, **generation}
    found: dict[str, Any] = {"tokenizer.json": tokenizer_json(tokenizer), "tokenizer_config.json": config}
    if model.config.kind in ("decoder", "encoder_decoder"):
        found["generation_config.json"] = generation
    if model.chat_template:
        found["chat_template.jinja"] = model.chat_template
    return found


def special_texts(tokenizer: Tokenizer, known: dict[str, str]) -> dict[str, str]:
    """Role -> text of the special tokens, as `tokenizer_config.json` names them."""
    if known or not isinstance(tokenizer.codec, LibraryCodec):
        return known or {role: f"<{role}>" for role in ("pad", "bos", "eos", "mask")}
    by_id = {number: text for text, number in tokenizer.codec.vocabulary.items()}
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "mask": tokenizer.mask_id}
    return {role: by_id.get(number, f"<{role}>") for role, number in ids.items() if number is not None}


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """The text of a `tokenizer.json` that gives the same ids; specials that the vocabulary lacks are added to it."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as LibraryTokenizer

    if isinstance(tokenizer.codec, ByteCodec):
        library = LibraryTokenizer(models.BPE(vocab={text: byte for byte, text in _byte_letters().items()}, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    else:
        library = LibraryTokenizer.from_str(tokenizer.codec.serialized)  # type: ignore[attr-defined]
    ids = {"pad": tokenizer.pad_id, "bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "mask": tokenizer.mask_id}
    added = {number: f"<{role}>" for role, number in ids.items() if number is not None}
    for number in sorted(added):  # the library numbers what is added in order
        if number == library.get_vocab_size():
            library.add_special_tokens([AddedToken(added[number], special=True)])
    return library.to_str(pretty=False)


def _byte_letters() -> dict[int, str]:
    """The letter that the library's byte-level alphabet has for each byte (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    others = (byte for byte in range(256) if byte not in letters)
    return letters | {byte: chr(256 + place) for place, byte in enumerate(others)}


def _text(document: Any) -> str:
    return document if isinstance(document, str) else json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def model_card(
    model: Model, family: Family, command: str, results: Sequence[tuple[str, str]], notes: Sequence[str]
) -> str:
    """README.md of the folder: where the model comes from, what was done to it, what was measured, and how it was written."""
    source, config = model.source, model.config
    parameters = parameter_counts(config)["total"]
    base = source.get("run") and f"trained by sparsejax, run `{source['run']}` at step {source.get('step')}"
    recipe = [f"{field}: {rule}" for field in FIELDS for rule in getattr(config, field)]
    rows = [f"| {name} | {value} |" for name, value in results]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    parts = [
        "---\nlibrary_name: transformers\ntags: [sparsejax]\n---",
        f"# {Path(model.name).name}",
        f"{family.architecture}, {parameters:,} parameters, {config.dtype}.",
        f"**Base model:** {base or f'{source.get('title', model.name)}, read from {source.get('format', 'a model folder')}'}",
        "**Recipe:** " + ("; ".join(f"`{rule}`" for rule in recipe) or "none: the weights are as they were read"),
        f"**Calibration:** {_calibration(source.get('compression'))}",
        *notes,
        *(["| measured | value |\n|---|---|\n" + "\n".join(rows)] if rows else []),
        f"Written with {versions}" + (f":\n\n    {command}" if command else "."),
    ]
    return "\n\n".join(parts) + "\n"


def _calibration(compression: dict[str, Any] | None) -> str:
    if not compression:
        return "none"
    spec = compression["calibration"]
    windows = f"{spec['sequences']} x {spec['length']} tokens of {spec['source']}, seed {spec['seed']}"
    return f"recipe {compression['recipe']}, {windows}, sha256 {spec['sha256']}"


def describe(config: ModelConfig, exported: Exported, folder: Path | str) -> list[str]:
    """Lines for people."""
    return [
        f"{folder}: {exported.family}, {exported.weight_bytes:,} bytes of weights in {config.dtype}",
        f"  {', '.join(exported.files)}",
        *(f"note: {note}" for note in exported.notes),
    ]
