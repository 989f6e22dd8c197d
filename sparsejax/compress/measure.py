"""What a compression is judged by: quality and realised sparsity on texts, accuracy on tasks, bytes, decoding speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from sparsejax.compress import accounting
from sparsejax.compress.neuron_sets import decoding_model
from sparsejax.evaluate.decode_speed import Probe
from sparsejax.evaluate.sampling import Sampling
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.scoring import Scorer
from sparsejax.evaluate.suite import Encoded, Progress, Scored, Source, score
from sparsejax.evaluate.text_generator import TextGenerator
from sparsejax.io.model import Model

PROMPT_TOKENS = 64
TURNS = 3  # of which the median counts; one before them compiles
EXECUTED = {  # what `arrays.matmul` does with a SparseActivation
    "masked": "dense masked: zeros are multiplied",
    "gathered": "gathered: rows of weights that only zeros meet are not read",
}
SLICED = "dense products of the hidden units chosen for the prompt"
GREEDY = Sampling(temperature=0)


def scored(
    model: Model, sources: Sequence[Source], encoded: Sequence[Encoded], scope: Scope, batch: int, name: str, progress: Progress
) -> dict[str, Any]:
    """A model on all sources, zeros counted in the same forward passes, as JSON values.

    Returns:
      results: a record of `suite.score` for each source, with `values` (loss of each window, correctness of each question).
      sparsity: over all texts together (tasks where there is no text); and by source in each record.
    """
    scorer = Scorer(model, batch, scope, accounting.meter(model.config))
    results, sums = [], []
    for source, piece in zip(sources, encoded, strict=True):
        found = score(scorer, source, piece, f"{source.name} {name}", progress)
        measured = scorer.measured()
        realised = accounting.sparsity(model.config, measured)
        record = {**found.record, "values": found.values.tolist(), "model_sparsity": realised.model}
        results.append(record)
        sums.append((found.record["kind"] == "perplexity", measured))
    texts = [measured for is_text, measured in sums if is_text] or [measured for _, measured in sums]
    together = jax.tree.map(lambda *parts: sum(parts), *texts)
    return {
        "results": results,
        "tokens": float(together["tokens"]),
        "skipped": {name: np.asarray(total).tolist() for name, total in together["skipped"].items()},
    }


def realised(model: Model, found: dict[str, Any]) -> accounting.Sparsity:
    """The sparsity that `scored` has measured."""
    return accounting.sparsity(model.config, {"tokens": found["tokens"], "skipped": found["skipped"]})


def as_scored(record: dict[str, Any]) -> Scored:
    """A record of `scored` for `suite.compared`."""
    inner = ("values", "model_sparsity")
    return Scored({name: value for name, value in record.items() if name not in inner}, np.asarray(record["values"]))


def decoding(models: dict[str, tuple[Model, str]], prompt: Sequence[int], tokens: int) -> dict[str, dict[str, Any]]:
    """How fast each model decodes one prompt at batch 1 in its serving form, by name.

    Args:
      models: each with the executor of its sparse products.
      prompt: ids; the first `PROMPT_TOKENS` count.
      tokens: new ones of a turn, at least 2.
    Returns:
      rates in tokens per second, and the fraction of the memory's read rate at which all weights would have been read at that
      speed: above 1 where enough of them were not.
    """
    probe, found = Probe(), {}
    prompts = [list(map(int, prompt[:PROMPT_TOKENS]))]
    for name, (model, executor) in models.items():
        decodes = decoding_model(model, np.asarray(prompts))
        generator = TextGenerator(decodes, executor=executor)
        generator.check_room(prompts, tokens)
        turns = [generator.speed(prompts, tokens, GREEDY, tokens, probe) for _ in range(TURNS + 1)][1:]
        rates = [turn["decode_tokens_per_second"] for turn in turns]
        found[name] = {
            "tokens_per_second": statistics.median(rates),
            "lowest": min(rates),
            "highest": max(rates),
            "read_bandwidth": statistics.median(turn["read_bandwidth"] for turn in turns),
            "fraction_of_read_bandwidth": statistics.median(turn["fraction_of_read_bandwidth"] for turn in turns),
            "new_tokens": tokens,
            "prompt_tokens": len(prompts[0]),
            "batch": 1,
            "executor": EXECUTED[executor] if decodes is model else SLICED,
        }
    return found
