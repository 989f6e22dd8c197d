"""How a sentence-transformers model makes one vector of a text: `modules.json` and its pooling's config beside the model."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

from sparsejax.io.files import MAX_TEXT, refuse_unless
from sparsejax.plugs import ConfigError, check, check_choice

MODULES = "modules.json"
_STAGES = ("Transformer", "Pooling", "Normalize")
_POOLS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "class"}  # flag -> `how` of layers.head.pooled


def read_sentence_embedding(path: Path | str) -> dict[str, Any]:
    """What `sparsejax.layers.head.pooled` needs for a model folder or zip archive; {} where there is no `modules.json`.

    Returns:
      `pool`: mean | class; `normalized`: whether the vectors have length 1; `max_length`: tokens, longer texts are cut there
      (0: not given).
    Raises:
      ConfigError: a file that is no such JSON, a module other than these (a dense layer behind the pooling), or a pooling other
        than the mean and the first token.
    """
    path = Path(path)
    stages = _parsed(path, MODULES)
    if stages is None:
        return {}
    where = f"{path}: {MODULES}"
    listed = isinstance(stages, list) and all(isinstance(one, dict) and isinstance(one.get("type"), str) for one in stages)
    refuse_unless(listed and stages, where, stages, "expected a list of modules with their type and path")
    kinds = [one["type"].rpartition(".")[2] for one in stages]
    for kind in kinds:
        check_choice(f"{where}: type", kind, _STAGES)
    refuse_unless(kinds in (list(_STAGES[:2]), list(_STAGES)), where, kinds, f"expected {' then '.join(_STAGES)}")
    pooling = _required(path, f"{stages[1].get('path')}/config.json")
    limits = _parsed(path, "sentence_bert_config.json") or {}
    return {"pool": _pool(pooling, str(path)), "normalized": kinds[-1] == "Normalize", "max_length": _length(limits, str(path))}


def _pool(pooling: Any, where: str) -> str:
    refuse_unless(isinstance(pooling, dict), f"{where}: pooling", pooling, "expected an object")
    modes = [key for key, value in pooling.items() if key.startswith("pooling_mode") and value is True]
    refuse_unless(len(modes) == 1, f"{where}: pooling", modes, "expected one way to pool")
    check_choice(f"{where}: pooling", modes[0], _POOLS)
    return _POOLS[modes[0]]


def _length(limits: Any, where: str) -> int:
    given = limits.get("max_seq_length") if isinstance(limits, dict) else limits
    refuse_unless(given is None or (type(given) is int and given > 0), f"{where}: max_seq_length", given, "expected an integer")
    return given or 0


def _required(path: Path, name: str) -> Any:
    found = _parsed(path, name)
    if found is None:
        raise ConfigError(f"{path}: {name} is missing; {MODULES} names it")
    return found


def _parsed(path: Path, name: str) -> Any:
    """The JSON value of a file of the folder or archive; None where there is none of this name."""
    try:
        text = _archived(path, name) if path.is_file() else (path / name).read_bytes() if (path / name).is_file() else None
        return None if text is None else json.loads(text)
    except (OSError, ValueError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:  # a password, deep nesting
        raise ConfigError(f"{path}: {name}: not readable as JSON ({error})") from error


def _archived(path: Path, name: str) -> bytes | None:
    """The archive's shallowest member whose path ends in `name`, as archives may hold the model in a folder."""
    with zipfile.ZipFile(path) as archive:
        parts = PurePosixPath(name).parts
        found = [one for one in archive.infolist() if PurePosixPath(one.filename).parts[-len(parts) :] == parts]
        if not found:
            return None
        nearest = min(found, key=lambda one: one.filename.count("/"))
        check(nearest.file_size <= MAX_TEXT, f"{path}: {name}", f"{nearest.file_size} bytes", f"expected at most {MAX_TEXT}")
        return archive.read(nearest)
