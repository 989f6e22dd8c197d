"""Measure the quality of a model by fixed protocols: perplexity and bits per byte of texts, accuracy on multiple choice.

    python -m experiments.evaluate --model smollm2-135m --data wikitext2,arc_easy --window 1024 --limit 8
    python -m experiments.evaluate --model runs/pruned --baseline smollm2-135m --data wikitext2:PATH,text:PATH,jsonl:PATH

Texts: wikitext2[:PATH], c4_sample[:calibration|evaluation], stdlib[:calibration|evaluation], text:PATH (any UTF-8 file). They
are cut into non-overlapping windows of --window tokens; perplexity = exp(mean loss over windows), with its standard error.
Tasks (local JSONL): arc_challenge, arc_easy, boolq, copa, hellaswag, lambada, openbookqa, piqa, winograd, winogrande, and
jsonl:PATH for any other, in the shapes {query, choices, gold}, {context, continuation}, {context_options, continuation, gold}.
A name alone is looked up in the data folder: --data-dir, else $SPARSEJAX_DATA, ./shared/data, ../shared/data.
With --baseline both models score the same windows, and the mean paired difference stands beside each result.
Activation sparsity acts at all tokens unless --scope and --keep-first say otherwise; then only targets that are predicted from
sparse positions count, also for the baseline. A compressed model is not scored on what it was calibrated on.
"""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

from experiments import entry
from sparsejax.plugs import check

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "tokenizers")


@dataclass
class Flags:
    model: str = entry.flag("", "name or path of the model")
    baseline: str = entry.flag("", "name or path of the model it is compared with")
    data: tuple[str, ...] = entry.flag((), "what to evaluate on: NAME or NAME:PATH, several separated by commas or repeated")
    window: int = entry.flag(2048, "tokens per window of a text")
    limit: int = entry.flag(0, "windows of each text, rows of each task; 0: all")
    scope: str = entry.flag("all", "tokens at which activation sparsity acts: all, from:FRACTION or decode")
    keep_first: int = entry.flag(0, "so many first tokens are dense in any case")
    allow_overlap: bool = entry.flag(False, "score a compressed model also on text that it was calibrated on")
    batch: int = entry.flag(0, "windows or rows per forward pass; 0: chosen by length and device")
    dtype: str = entry.flag("float32", entry.DTYPE)
    data_dir: str = entry.flag("", "data folder")


def main(call: entry.Call[Flags]) -> dict[str, Any]:
    flags = call.flags
    check(flags.model, "--model", "", "give the name or path of a model")
    entry.computing_in(flags.dtype)
    check(flags.window >= 2, "--window", flags.window, "must be at least 2: one token is given, the next is predicted")
    for name in ("limit", "batch"):
        check(getattr(flags, name) >= 0, f"--{name}", getattr(flags, name), "must be 0 or more")
    from sparsejax.compress.provenance import check_overlap
    from sparsejax.data.sources import data_directories
    from sparsejax.evaluate.report import describe
    from sparsejax.evaluate.scope import Scope
    from sparsejax.evaluate.suite import evaluate, open_data
    from sparsejax.io.load import load

    scope = Scope(flags.scope, flags.keep_first)
    sources = open_data(flags.data, data_directories(flags.data_dir))
    model = load(flags.model, dtype=flags.dtype)
    baseline = load(flags.baseline, dtype=flags.dtype) if flags.baseline else None

    def refuse_overlap(name: str, tokens: Any) -> None:
        for one in (model, baseline):
            if one is not None and not flags.allow_overlap:
                check_overlap(one, tokens, name)

    results = evaluate(
        model, sources, baseline=baseline, scope=scope, window=flags.window, limit=flags.limit, batch=flags.batch,
        inspect=refuse_overlap,
    )  # fmt: skip
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    protocol = {
        "model": flags.model,
        "baseline": flags.baseline,
        "limit": flags.limit,
        "scope": flags.scope,
        "keep_first": flags.keep_first,
        "dtype": flags.dtype,
        "device": _device(),
        "versions": versions,
        "command": call.command,
    }
    beside = f", baseline {flags.baseline}" if flags.baseline else ""
    sparse = "" if scope == Scope() else f", scope {scope.tokens}, first {scope.keep_first} tokens dense"
    print(f"{flags.model}{beside}, {flags.dtype}{sparse}, {protocol['device']}, jax {versions['jax']}\n")
    print(describe(results))
    return {**protocol, "results": results}


def _device() -> str:
    import jax

    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"


if __name__ == "__main__":
    entry.run(main, Flags, config=False)
