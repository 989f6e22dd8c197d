"""`model.json`: all of a model but its numbers, so that a folder can be loaded without the data or the recipe that made it.

A run folder has one beside its checkpoints, a model folder beside its safetensors. Unknown versions and names are refused.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparsejax.data.tokenizers import ByteCodec, LibraryCodec, Tokenizer, read_tokenizer_json
from sparsejax.io.files import refuse_unless
from sparsejax.models.config import ModelConfig
from sparsejax.plugs import ConfigError, check, check_choice

MODEL_JSON, TOKENIZER_JSON = "model.json", "tokenizer.json"
FORMAT = 1


class Description(NamedTuple):
    """What `model.json` and the tokenizer's file say.

    Fields:
      config: finalized ModelConfig, as nested JSON values.
      weights: `{"stored": "checkpoints"}` in a run folder, `{"stored": "safetensors", "arrays": ...}` in a model folder.
      tokenizer: None for a model of images or symbols.
      chat_template: Jinja2 or None.
      source: see `Model.source`.
    """

    config: dict[str, Any]
    weights: dict[str, Any]
    tokenizer: Tokenizer | None
    chat_template: str | None
    source: dict[str, Any]


def files(
    config: ModelConfig,
    weights: dict[str, Any],
    tokenizer: Tokenizer | None,
    chat_template: str | None = None,
    source: dict[str, Any] | None = None,
) -> dict[str, str]:
    """File name -> text of everything that describes a model."""
    document = {
        "format": FORMAT,
        "config": asdict(config),
        "weights": weights,
        "tokenizer": None if tokenizer is None else _tokenizer_ids(tokenizer),
        "chat_template": chat_template,
        "source": source or {},
    }
    found = {MODEL_JSON: json.dumps(document, indent=2, allow_nan=False) + "\n"}
    if tokenizer is not None and isinstance(tokenizer.codec, LibraryCodec):
        found[TOKENIZER_JSON] = tokenizer.codec.serialized
    return found


def read(folder: Path) -> Description:
    """The description in a run or model folder.

    Raises:
      ConfigError: no file, no JSON, another format, or keys that are missing or unknown; names the file and the key.
    """
    path = folder / MODEL_JSON
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from error
    check(isinstance(document, dict), str(path), type(document).__name__, "expected an object")
    check(document.get("format") == FORMAT, f"{path}: format", document.get("format"), f"this version reads {FORMAT}")
    keys = ("format", *Description._fields)
    for key in document:
        check_choice(f"{path}: key", key, keys)
    missing = [key for key in keys if key not in document]
    check(not missing, f"{path}: keys", sorted(document), f"missing: {', '.join(missing)}")
    for key, kinds in (("config", dict), ("weights", dict), ("source", dict), ("chat_template", str | None)):
        refuse_unless(isinstance(document[key], kinds), f"{path}: {key}", document[key], f"expected {kinds}")
    tokenizer = None if document["tokenizer"] is None else _tokenizer(document["tokenizer"], folder)
    return Description(document["config"], document["weights"], tokenizer, document["chat_template"], document["source"])


def _tokenizer_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    kind = "bytes" if isinstance(tokenizer.codec, ByteCodec) else TOKENIZER_JSON
    ids = {name: getattr(tokenizer, name) for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "mask_id")}
    return {"codec": kind, **ids, "mode_ids": tokenizer.mode_ids, "sentinel_ids": tokenizer.sentinel_ids.tolist()}


def _tokenizer(stored: dict[str, Any], folder: Path) -> Tokenizer:
    where = f"{folder / MODEL_JSON}: tokenizer"
    check(isinstance(stored, dict), where, stored, "expected an object")
    check_choice(f"{where}.codec", stored.get("codec"), ("bytes", TOKENIZER_JSON))
    codec = ByteCodec() if stored["codec"] == "bytes" else read_tokenizer_json(folder / TOKENIZER_JSON)
    try:
        specials = {name: stored[name] for name in ("pad_id", "bos_id", "eos_id", "mask_id", "mode_ids")}
        sentinels = np.array(stored["sentinel_ids"], np.int32)
        vocab_size = int(stored["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error!r}; is the file whole?") from error
    fits = codec.size <= vocab_size < codec.size + 2**20
    check(fits, f"{where}.vocab_size", vocab_size, f"the tokenizer has {codec.size} ids")
    refuse_unless(isinstance(specials["mode_ids"], dict), f"{where}.mode_ids", specials["mode_ids"], "expected an object")
    token_bytes = np.zeros(vocab_size, np.int32)
    token_bytes[: codec.size] = codec.token_bytes()
    ids = [*(specials[name] for name in ("pad_id", "bos_id", "eos_id", "mask_id")), *specials["mode_ids"].values(), *sentinels]
    ids = [number for number in ids if number is not None]
    good = all(isinstance(number, int | np.integer) and 0 <= number < vocab_size for number in ids)
    refuse_unless(good, f"{where}: ids", ids, f"expected numbers below vocab_size = {vocab_size}")
    token_bytes[ids] = 0
    return Tokenizer(codec=codec, vocab_size=vocab_size, sentinel_ids=sentinels, token_bytes=token_bytes, **specials)
