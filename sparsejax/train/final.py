"""What a run says of itself at its end: held-out quality beside counting baselines, counted sparsity, a sample, a page."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax.config_text import to_json
from sparsejax.data.pipeline import DataPipeline
from sparsejax.evaluate.generate import Params, decoder
from sparsejax.evaluate.likelihood import Likelihood, summarise
from sparsejax.evaluate.ngram import NgramBaselines, ngram_baselines
from sparsejax.evaluate.sampling import Sampling
from sparsejax.evaluate.text_stream import generate_text
from sparsejax.parallel import launch, rules
from sparsejax.train import metrics
from sparsejax.train.loop import Trainer, evaluation_row
from sparsejax.train.run_page import read_result, write_page
from sparsejax.train.state import cast_for_compute

HELD_OUT = "held_out.npz"
BASELINE_BYTES = 16 * 2**20  # of training text that the n-gram models count
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def finish(trainer: Trainer, command: str, config_diff: list[str], seconds: dict[str, float]) -> dict[str, Any]:
    """Evaluate the trained model on held-out data, write `result.json`, `held_out.npz` and `index.html`, return the result.

    `held_out.npz` has the sums of every held-out sequence (`evaluate.likelihood.gather`): runs are compared pair by pair.
    """
    config, data, folder = trainer.config, trainer.data, trainer.folder
    sums = trainer.held_out_sums(config.evaluate.batches)
    found = summarise(sums)
    results: dict[str, Any] = {**found._asdict(), **counted_sparsity(trainer)}
    trained, frozen = (sum(leaf.size for leaf in jax.tree.leaves(v)) for v in (trainer.state.trainable, trainer.state.frozen))
    results["parameters"] = trained + frozen
    if frozen:
        results["trained_parameters"] = trained
    corrupted = {name: _corrupted(trainer, name) for name in config.evaluate.corruptions}
    if corrupted:
        results["corrupted"] = corrupted
    results |= seconds if seconds["steps_run"] else {**seconds, **_timings_before(folder, seconds)}
    # What was not measured (bits per byte of symbols, the rate of no step) is left out.
    results = {name: value for name, value in results.items() if not isinstance(value, float) or math.isfinite(value)}
    device = trainer.setup.mesh.devices.flat[0]
    result: dict[str, Any] = {
        "name": config.name,
        "command": command,
        "device": f"{trainer.setup.mesh.size} x {device.device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "data": data.fingerprint,
        "config_diff": config_diff,
        "results": results,
    }
    if data.tokenizer is not None and config.data.task == "causal_lm":
        baselines = held_out_baselines(trainer)
        result["baselines"] = {"unigram": baselines.entropy, "bigram": baselines.bigram}
        result["bytes_per_token"] = found.bytes / found.tokens
    prompt = config.evaluate.sample_prompt or "\n"
    room = room_after(trainer, prompt)
    if room > 0:
        result["sample"] = {"prompt": prompt, "text": sample_text(trainer, prompt, room)}
    elif config.evaluate.sample_tokens and launch.is_main():
        print(f"no sample: evaluate.sample_prompt fills the model's {config.model.max_length} learned positions")
    if launch.is_main():
        if seconds["steps_run"]:
            _log_last_evaluation(trainer, found)
        metrics.replace_arrays(folder / HELD_OUT, sums)
        metrics.replace_text(folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
        write_page(folder)
    return result


def _corrupted(trainer: Trainer, corruption: str) -> dict[str, float]:
    """What classifiers are measured by, on corrupted images."""
    found = summarise(trainer.held_out_sums(trainer.config.evaluate.batches, corruption))._asdict()
    names = ("loss", "loss_error", "accuracy", "accuracy_error", "calibration_error")
    return {name: found[name] for name in names if math.isfinite(found[name])}


def _log_last_evaluation(trainer: Trainer, found: Likelihood) -> None:
    """The last held-out values as a row of the metrics, unless the loop has just written them."""
    config, step = trainer.config, trainer.config.steps
    if config.evaluate.every and step % config.evaluate.every == 0:
        return
    with metrics.Writers(trainer.folder, config.log.writers, to_json(config), step + 1) as writers:
        writers.write(step, evaluation_row(found))


def _timings_before(folder: Path, seconds: dict[str, float]) -> dict[str, float]:
    """The timings in the folder's result, for a run that had finished before and is only evaluated anew."""
    before = read_result(folder).get("results", {})
    return {name: before[name] for name in seconds if name in before}


def describe(result: dict[str, Any], folder: Path) -> list[str]:
    """The result as lines for a person."""
    found, lines = result["results"], []
    loss, error = found.get("loss", math.nan), found.get("loss_error", math.nan)
    accuracy = f", accuracy {found['accuracy']:.4f}" if "accuracy" in found else ""
    lines.append(f"held-out loss {loss:.4f} +- {error:.4f} nats over {found['sequences']:,} sequences{accuracy}")
    if "calibration_error" in found:
        lines.append(f"expected calibration error {found['calibration_error']:.4f}")
    for name, under in found.get("corrupted", {}).items():
        lines.append(f"under {name}: " + ", ".join(f"{what.replace('_', ' ')} {value:.4f}" for what, value in under.items()))
    if "baselines" in result:
        unigram, bigram = result["baselines"]["unigram"], result["baselines"]["bigram"]
        bits = found.get("bits_per_byte", math.nan)
        lines.append(
            f"held-out bits per byte {bits:.4f}; unigram entropy of the same text {unigram:.4f} ({unigram - bits:+.4f} above "
            f"the model), bigram model {bigram:.4f} ({bigram - bits:+.4f} above the model)"
        )
    if "zero_fraction" in found:
        lines.append(
            f"FFN hidden vector: {found['zeros']:,.0f} of {found['entries']:,.0f} entries are exactly zero "
            f"({100 * found['zero_fraction']:.2f} %), by layer "
            + " ".join(f"{100 * value:.1f}" for value in found["zero_fraction_by_layer"])
        )
    if "sample" in result:
        lines.append(f"sample after {result['sample']['prompt']!r}:\n{result['sample']['text']}")
    lines.append(f"open {folder / 'index.html'}")
    return lines


def counted_sparsity(trainer: Trainer, batches: int = 4) -> dict[str, Any]:
    """Exact zeros of the FFN hidden vector over the first held-out batches, counted entry by entry, all and by layer."""
    step = trainer.setup.evaluate(trainer.setup.stage(trainer.step), True)
    parameters = trainer.evaluated_parameters()
    token_bytes = trainer.token_bytes()
    counts = jax.device_get([step(parameters, token_bytes, batch)["counts"] for batch in trainer.held_out(batches)])
    zeros, entries = (np.sum([np.float64(count[name]) for count in counts], axis=0) for name in ("zeros", "entries"))
    return {
        "zero_fraction": float(zeros.sum() / entries.sum()),
        "zeros": float(zeros.sum()),
        "entries": float(entries.sum()),
        "zero_fraction_by_layer": [float(value) for value in zeros / entries],
    }


def held_out_baselines(trainer: Trainer) -> NgramBaselines:
    """Unigram and bigram models on the very bytes that the model was scored on."""
    return ngram_baselines(
        _training_bytes(trainer.data), list(_scored_bytes(trainer)), vocab_size=256
    )


def _training_bytes(data: DataPipeline) -> list[np.ndarray]:
    documents, total = [], 0
    for text in data.documents("train"):
        documents.append(np.frombuffer(text.encode(), np.uint8))
        total += len(documents[-1])
        if total > BASELINE_BYTES:
            break
    return documents


def _scored_bytes(trainer: Trainer) -> Iterator[np.ndarray]:
    """The text of every segment of the held-out batches."""
    rows = slice(0, trainer.config.batch_size)
    tokenizer = trainer.data.tokenizer
    assert tokenizer is not None
    for batch in trainer.data.evaluation_batches(trainer.config.evaluate.batches, rows):
        used = batch["weights"].any(axis=-1)  # the last batch is completed with rows that do not count
        for tokens, segments in zip(batch["tokens"][used], batch["segment_ids"][used], strict=True):
            for segment in np.unique(segments[segments > 0]):
                yield np.frombuffer(tokenizer.decode(tokens[segments == segment]).encode(), np.uint8)


def room_after(trainer: Trainer, prompt: str) -> int:
    """Tokens to sample after the prompt: as many as the config asks for and learned positions leave room for."""
    config, tokenizer = trainer.config, trainer.data.tokenizer
    if tokenizer is None or config.model.positions.kind != "learned":
        return config.evaluate.sample_tokens
    return min(config.evaluate.sample_tokens, config.model.max_length - len(tokenizer.encode(prompt)))


def sample_text(trainer: Trainer, prompt: str, tokens: int, temperature: float = 0.8) -> str:
    """Text that the model continues a prompt with."""
    structure, config = trainer.setup.structure, trainer.config
    # A run's parameters lie on its mesh; every host samples the one sequence from its own copy.
    whole = jax.jit(lambda v: v, out_shardings=rules.replicated(trainer.setup.mesh))(trainer.evaluated_parameters())
    values = jax.tree.map(lambda a: a.addressable_data(0), whole)
    tokenizer = trainer.data.tokenizer
    assert tokenizer is not None
    params = Params(cast_for_compute(structure, values, config.model.dtype))
    sampling = Sampling(temperature=temperature)
    ends = [tokenizer.eos_id]
    return generate_text(decoder(structure), params, tokenizer, [prompt], tokens, sampling, seed=config.seed, ends=ends)[0]
