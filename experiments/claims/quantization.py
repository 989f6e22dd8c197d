"""Claims of post-training quantization, on SmolLM2. Its weights were 4-bit once: what stands here as dense is their dequantized
form, on another grid than any of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from experiments.claims.bench import Bench, gap
from experiments.claims.claim import Claim, Outcome
from experiments.claims.training_free import NEEDS, below, ratio_at_most
from sparsejax.evaluate.perplexity import paired_difference

SEEDS = (0, 1, 2)  # of the calibration


def no_worse(ours: str, others: Sequence[str], within: float) -> Callable[[Bench], Outcome]:
    """The loss of ours is at most `within` nats above that of each other one, in the mean over `SEEDS`, on every text."""

    def measure(bench: Bench) -> Outcome:
        rows = {recipe: [bench.compressed(recipe, seed=seed) for seed in SEEDS] for recipe in (ours, *others)}
        holds, parts, numbers = True, [], {}
        for text in bench.texts:
            parts.append(f"{text}: dense {rows[ours][0].dense_perplexity(text):.2f}, {ours} {_each(rows[ours], text)}")
            for other in others:
                gaps = [gap(a, b, text).mean for a, b in zip(rows[ours], rows[other], strict=True)]
                holds &= float(np.mean(gaps)) <= within
                parts.append(f"{other} {_each(rows[other], text)} ({np.mean(gaps):+.3f} nats; by seed "
                             + ", ".join(f"{one:+.3f}" for one in gaps) + ")")  # fmt: skip
                numbers[f"{text}: {ours} - {other}"] = gaps
        return Outcome(holds, "; ".join(parts), numbers)

    return measure


def _each(rows: Sequence, text: str) -> str:
    return "/".join(f"{row.perplexity(text):.2f}" for row in rows)


GROUPED, ALONE = "int{}:asym,group=64", "int{}:asym"


def groups_before_methods(bench: Bench) -> Outcome:
    """At 4 bits groups of 64 instead of whole columns gain more than GPTQ instead of rounding to nearest, on every text."""
    names = {"nearest": f"rtn:{ALONE.format(4)}", "grouped": f"rtn:{GROUPED.format(4)}", "gptq": f"gptq:{ALONE.format(4)}"}
    rows = {name: bench.compressed(recipe) for name, recipe in names.items()}
    gains = {text: {name: -gap(rows[name], rows["nearest"], text).mean for name in ("grouped", "gptq")} for text in bench.texts}
    told = [f"{text}: of {rows['nearest'].rise(text).mean:.3f} nats that {names['nearest']} loses groups gain "
            f"{one['grouped']:.3f}, GPTQ {one['gptq']:.3f}" for text, one in gains.items()]
    return Outcome(all(one["grouped"] > one["gptq"] for one in gains.values()), "; ".join(told), gains)


def methods_separate(bench: Bench) -> Outcome:
    """What GPTQ gains over rounding to nearest in groups of 64 is at 3 bits three times that at 4, at 2 more again."""
    gains: dict[str, dict[int, float]] = {text: {} for text in bench.texts}
    for bits in (4, 3, 2):
        solved, nearest = (bench.compressed(f"{name}:{GROUPED.format(bits)}") for name in ("gptq", "rtn"))
        for text in bench.texts:
            gains[text][bits] = -gap(solved, nearest, text).mean
    told = [f"{text}: " + ", ".join(f"{bits} bits {gain:.3f} nats" for bits, gain in one.items())
            for text, one in gains.items()]
    holds = all(one[3] >= 3 * one[4] and one[2] > one[3] for one in gains.values())
    return Outcome(holds, "; ".join(told), gains)


def losses_add(first: str, second: str, both: str, within: float) -> Callable[[Bench], Outcome]:
    """What two recipes lose together is within so many nats of the sum of what each loses, or below it, on every text."""

    def measure(bench: Bench) -> Outcome:
        rows = {recipe: bench.compressed(recipe) for recipe in (first, second, both)}
        holds, parts, numbers = True, [], {}
        for text in bench.texts:
            summed = rows[first].losses(text) + rows[second].losses(text) - rows[first].dense_losses(text)
            excess = paired_difference(rows[both].losses(text), summed)
            holds &= excess.mean <= within
            each = ", ".join(f"{recipe} +{row.rise(text).mean:.3f} (x {row.ratio(text):.3f})" for recipe, row in rows.items())
            parts.append(f"{text}: {each}; {excess.mean:+.3f} +- {excess.error:.3f} nats beside the sum")
            numbers[text] = excess._asdict()
        sizes = ", ".join(f"{recipe} {row.bytes:.3f}" for recipe, row in rows.items())
        return Outcome(holds, "; ".join([*parts, f"bytes per token {sizes}"]), numbers)

    return measure


INT4 = GROUPED.format(4)
SPARSE = "isocline:0.5"

CLAIMS = [
    Claim("w8a8", "W8A8 (Krishnamoorthi, 1806.08342)", "int8 weights with a scale per output, int8 activations with one per "
          "token", "at most 1.01 times dense", ratio_at_most(1.01, "smoothquant:off"), 2, needs=NEEDS),
    Claim("kv8", "KV cache (COMET, 2410.12168; QoQ, 2405.04532)", "an int8 cache is free", "at most 1.005 times dense",
          ratio_at_most(1.005, "kv_cache:int8"), 2, needs=NEEDS),
    Claim("kv4", "KV cache (COMET, 2410.12168; QoQ, 2405.04532)", "an int4 cache is nearly free", "at most 1.05 times dense",
          ratio_at_most(1.05, "kv_cache:int4"), 2, needs=NEEDS),
    Claim("w4_bar", "GPTQ (2210.17323), AWQ (2306.00978)", "4-bit weights in groups of 64", "at most 1.04 times dense",
          ratio_at_most(1.04, f"gptq:{INT4}", f"awq:{INT4}", f"rtn:{INT4}"), 12, needs=NEEDS),
    Claim("quarot_activations", "QuaRot (Ashkboos et al., 2024, arXiv 2404.00456)", "rotations make 4-bit activations with a "
          "scale per token possible (int8 weights)", "below no rotation, by .2 nats",
          below("quarot:int8/rtn/int4/r1+r2+r4", "quarot:int8/rtn/int4/none", margin=0.2), 4, needs=NEEDS),
    Claim("quarot_nvfp4", "QuaRot (2404.00456) against NVFP4", "weights in groups of 16 with FP8 scales are worse off rotated",
          "plain below rotated, by two standard errors", below("rtn:nvfp4", "quarot:nvfp4/rtn/none/r1+r2+r4"), 4, needs=NEEDS),
    Claim("lorc_weighted", "ZeroQuant-V2 (2303.08302), LoRC", "the error of 3-bit weights as a product of rank 8, weighted by "
          "what enters", "below the plain one, by two standard errors",
          below("lorc:int3:asym/8/weighted", "lorc:int3:asym/8/plain"), 5, needs=NEEDS),
    Claim("awq_gptq", "AWQ (2306.00978), GPTQ (2210.17323)", "GPTQ after AWQ's scales and clipping, 4 bits in groups of 64, "
          "3 calibration seeds", "at most .01 nats above either",
          no_worse(f"awq:{INT4}/gptq", (f"gptq:{INT4}", f"awq:{INT4}"), 0.01), 45, needs=NEEDS),
    Claim("groups_before_methods", "ZeroQuant-V2 (2303.08302)", "grouping matters more than method at 4 bits",
          "groups of 64 gain more than GPTQ does", groups_before_methods, 6, needs=NEEDS),
    Claim("methods_separate", "GPTQ (2210.17323)", "methods separate at 3 and 2 bits", "GPTQ's gain over nearest at 3 bits "
          "three times that at 4, and more at 2", methods_separate, 14, needs=NEEDS),
    Claim("sparse_int4", "Isocline (this project) on GPTQ", "50 % activation sparsity on top of int4 weights, one recipe",
          "loses at most .1 nats more than the sum of both alone",
          losses_add(f"gptq:{INT4}", SPARSE, f"compose:gptq:{INT4}+{SPARSE}", 0.1), 12, needs=NEEDS),
]
