"""How fast a model decodes, in its serving form, in bfloat16 and as it was loaded, beside the rate at which memory is read.

Variants take turns in one process, and each turn stands between two probes of the memory, so that a machine whose speed drifts
(or that others use) treats them alike: `fraction` is the median over rounds of a turn's rate over that round's read rate.
"""

from __future__ import annotations

import statistics
from typing import Any

import jax

from sparsejax.evaluate.decode_speed import Probe
from sparsejax.evaluate.sampling import Sampling
from sparsejax.evaluate.text_generator import TextGenerator
from sparsejax.io.load import load

GREEDY = Sampling(temperature=0)
VARIANTS = {  # (dtype, whether in serving form)
    "serving form, float32": ("float32", True),
    "serving form, bfloat16": ("bfloat16", True),
    "as loaded, float32": ("float32", False),
}


def bench_decode(model: str, *, prompt_length: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time prefill and decode of one prompt at batch 1; prints a table.

    Args:
      model: name or path.
      prompt_length: tokens of the prompt.
      tokens: decoded per turn.
      rounds: turns of each variant.
    Raises:
      ConfigError: a model that does not generate, or has no room for prompt and tokens.
    """
    probe = Probe()
    generators = {name: TextGenerator(load(model, dtype=dtype), serving=serving) for name, (dtype, serving) in VARIANTS.items()}
    first = next(iter(generators.values()))
    prompt = [[token % first.model.config.vocab_size for token in range(1, prompt_length + 1)]]
    first.check_room(prompt, tokens)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in generators}
    copies = []
    for turn in range(rounds + 1):
        copies.append(probe.copy())
        for name, generator in generators.items():
            speed = generator.speed(prompt, tokens, GREEDY, tokens, probe)
            if turn:  # the first turn compiled
                found[name].append(speed)
    rows = [_row(name, turns) for name, turns in found.items()]
    reads = [turn["read_bandwidth"] for turns in found.values() for turn in turns]
    result = {
        "model": model,
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "prompt_length": prompt_length,
        "tokens": tokens,
        "rounds": rounds,
        "read_bandwidth": _spread(reads),
        "copy_bandwidth": _spread(copies),
        "variants": rows,
    }
    print(describe(result))
    return result


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _row(name: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    measured = ("decode_tokens_per_second", "prefill_tokens_per_second", "bytes_per_second", "fraction_of_read_bandwidth")
    bytes_read = turns[0]["weight_bytes"] + turns[0]["cache_bytes"]
    return {"variant": name, "bytes_per_token": bytes_read, **{key: _spread([turn[key] for turn in turns]) for key in measured}}


def describe(result: dict[str, Any]) -> str:
    """The table for people."""
    read, copy = result["read_bandwidth"], result["copy_bandwidth"]
    lines = [
        f"{result['model']} on {result['device']}, jax {result['jax']}: {result['tokens']} tokens after "
        f"{result['prompt_length']}, batch 1, median of {result['rounds']} rounds (lowest to highest)",
        f"memory: read {read['median'] / 1e9:.1f} GB/s ({read['lowest'] / 1e9:.1f} to {read['highest'] / 1e9:.1f}), "
        f"copy {copy['median'] / 1e9:.1f} GB/s, read and written",
        f"{'variant':24} {'decode tokens/s':>24} {'prefill tokens/s':>17} {'MB/token':>9} {'GB/s':>6} {'of read rate':>19}",
    ]
    for row in result["variants"]:
        rate, fraction = row["decode_tokens_per_second"], row["fraction_of_read_bandwidth"]
        decode = f"{rate['median']:.1f} ({rate['lowest']:.1f} to {rate['highest']:.1f})"
        share = f"{100 * fraction['median']:.0f} % ({100 * fraction['lowest']:.0f} to {100 * fraction['highest']:.0f})"
        lines.append(
            f"{row['variant']:24} {decode:>24} {row['prefill_tokens_per_second']['median']:17.0f} "
            f"{row['bytes_per_token'] / 1e6:9.1f} {row['bytes_per_second']['median'] / 1e9:6.1f} {share:>19}"
        )
    return "\n".join(lines)
