"""`experiments.export`: a model of any kind as a folder that loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.compress.export_run import export_run
from sparsejax.io import export_hf, model_folder
from sparsejax.io.codecs.stores import EXPORTS
from sparsejax.io.hub import resolve
from sparsejax.io.load import load
from sparsejax.io.model import Model
from sparsejax.plugs import ConfigError, check, check_choice
from sparsejax.quantized_arrays import QTensor

FORMATS = ("model", "hf", *EXPORTS)


def export_model(name: str, out: str, *, format: str = "model", dtype: str = "float32", command: str = "") -> dict[str, Any]:
    """Write a model into a new or empty folder, read it back, and compare; the result as JSON values.

    Args:
      name: what `--model` resolves.
      out: the folder.
      format: `model` (ours: packed weights stay packed, and a run trained with quantized weights is packed now), `hf`
        (safetensors, config.json, tokenizer, generation config and model card, for Hugging Face transformers), or such a folder
        with its quantized maps as `compressed-tensors`, `gptq`, `gptq_v2` or `awq` have them.
      dtype: of matrices, embeddings and biases.
      command: the command line, for the model card.
    Raises:
      ConfigError: nothing that resolves, a folder in use, or a model that the format cannot express.
    """
    check_choice("--format", format, FORMATS)
    located = resolve(name)
    model = load(name, dtype=dtype)
    if format == "model" and located.kind == "run" and model.config.weights:
        check(dtype == "float32", "--dtype", dtype, "a run is packed as it was trained, in float32")
        return {"model": name, "format": format, "dtype": dtype, **export_run(located.path, out)}
    if format != "model":
        store = "" if format == "hf" else format
        exported = export_hf.write_hf(model, out, store=store, command=command, results=measured(located.path))
        print("\n".join(export_hf.describe(model.config, exported, out)))
        about = {"family": exported.family, "files": exported.files, "notes": exported.notes, "bytes": exported.weight_bytes}
    else:
        model_folder.save(model, out)
        about = {"bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(model.values))}
        print(f"{out}: {about['bytes']:,} bytes of weights in {dtype}")
    require_same_values(model, load(out, dtype=dtype), out)
    print("read back: every parameter is the same bit for bit")
    return {"model": name, "out": str(out), "format": format, "dtype": dtype, **about}


def measured(path: Path) -> list[tuple[str, str]]:
    """What a run measured at its end, as rows of a table; none where the model is no run."""
    if not (path / "result.json").is_file():
        return []
    try:
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ConfigError(f"{path / 'result.json'}: not JSON ({problem})") from problem
    found, baselines = result.get("results", {}), result.get("baselines", {})
    rows = []
    if "bits_per_byte" in found:
        error = found.get("bits_per_byte_error", float("nan"))
        rows.append(("held-out bits per byte", f"{found['bits_per_byte']:.4f} +- {error:.4f}"))
    rows += [(f"the same of a {name} model", f"{value:.4f}") for name, value in baselines.items()]
    if "loss" in found and "loss_error" in found:
        rows.append(("held-out loss (nats)", f"{found['loss']:.4f} +- {found['loss_error']:.4f}"))
    rows += [("parameters", f"{found['parameters']:,}")] if "parameters" in found else []
    return rows


def require_same_values(model: Model, again: Model, where: str) -> None:
    """Raise unless both models hold the same parameters bit for bit; of quantized ones the numbers that they stand for."""
    ours, theirs = (jax.tree_util.tree_flatten_with_path(m.values, is_leaf=_is_quantized)[0] for m in (model, again))
    same_places = [path for path, _ in ours] == [path for path, _ in theirs]
    differing = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, a), (_, b) in zip(ours, theirs, strict=False)
        if a.dtype != b.dtype or not np.array_equal(_numbers(a), _numbers(b), equal_nan=True)
    ]
    if not same_places or differing:
        raise ConfigError(f"{where}: what was written does not read back the same: {', '.join(differing[:8])}")


def _is_quantized(value: Any) -> bool:
    return isinstance(value, QTensor)


def _numbers(value: Any) -> np.ndarray:
    return np.asarray(_dequantized(value) if _is_quantized(value) else value)


_dequantized = jax.jit(QTensor.dequantize)
