"""Exports models for the live comparison: what we write must be loaded by `transformers` and give the logits that we compute.

    PYTHONPATH=. python tests/golden/pretrained/export_live.py FOLDER [MODEL ...]
    reference/bin/python tests/golden/pretrained/compare_live.py FOLDER

Run the first with sparsejax, the second where torch and transformers are (see record_decoders.py). Without MODEL all recorded
decoders are exported; a MODEL is what `--model` takes. Each becomes FOLDER/NAME: a checkpoint and ours.npz with tokens, our
float32 logits, and our logits in bfloat16. A model with a tokenizer reads this file, the recorded ones read random tokens.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from sparsejax import nnx_compat
from sparsejax.context import Context
from sparsejax.io.family import family_of
from sparsejax.io.load import load
from sparsejax.io.model import Model
from sparsejax.io.safetensors_file import write_safetensors
from sparsejax.io.weights_out import plan_tensors

RECORDED = Path(__file__).parent / "decoders"
BATCH, LENGTH = 2, 24


def export(source: str, target: Path) -> None:
    """Import a model, write it as a checkpoint, and compute its logits."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        model = load(source, dtype=dtype)
        config, family = model.config, family_of(model.source["config"], source)
        tokens = example(model)
        results[dtype] = logits(model.structure, model.values, tokens)
        if dtype == "float32":
            write_safetensors(target, plan_tensors(config, family, model.structure, model.values))
    written = {"architectures": [family.architecture], "torch_dtype": "float32", **family.to_published(config)}
    (target / "config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    np.savez(target / "ours.npz", tokens=tokens, **results)
    print(target)


def example(model: Model) -> np.ndarray:
    """int32[B, T]."""
    if model.tokenizer is None:
        return np.random.default_rng(1).integers(0, model.config.vocab_size, (BATCH, LENGTH), dtype=np.int32)
    ids = model.tokenizer.encode(Path(__file__).read_text(encoding="utf-8"))
    return np.asarray(ids, np.int32)[None, :512]


def logits(structure: nnx_compat.Structure, values: dict, tokens: np.ndarray) -> np.ndarray:
    """float32 [B, T, V]."""

    def run(values, tokens):
        return nnx_compat.merge(structure, values)({"tokens": tokens}, Context(mode="prefill"))[0]

    return np.asarray(jax.jit(run)(values, tokens))


if __name__ == "__main__":
    folder, *models = sys.argv[1:]
    recorded = sorted(path for path in RECORDED.iterdir() if path.is_dir())
    for model in map(Path, models or recorded):
        export(str(model), Path(folder) / model.stem)
