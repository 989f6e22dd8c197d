"""How fast training is: ms per step, tokens/s, MFU, compile and trace seconds, the host's gap, the cost of watching.

Variants take turns on the same device in the same process, so that a machine whose speed drifts treats them alike; figures are
medians over rounds with their spread. The floor is `experiments.minimal_trainer` where it has the config's shape.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import minimal_trainer
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.pipeline import build_data
from sparsejax.models.sizes import flops_per_token
from sparsejax.parallel import launch
from sparsejax.train import metrics
from sparsejax.train.setup import examples_to_tokens, prepare

Advance = Callable[[Any, Any], tuple[Any, Any]]


@dataclasses.dataclass
class Variant:
    """A training step with its state; `run` times a stretch of steps."""

    name: str
    state: Any
    advance: Advance

    def run(self, batches: list[Any], steps: int) -> float:
        """Seconds per step over `steps` steps, dispatched without waiting."""
        jax.block_until_ready(self.state)
        start = time.perf_counter()
        for i in range(steps):
            self.state, found = self.advance(self.state, batches[i % len(batches)])
        jax.block_until_ready((self.state, found))
        return (time.perf_counter() - start) / steps


def bench_train(config: ExperimentConfig, *, steps: int, rounds: int) -> dict[str, Any]:
    """Time the training step of a config, with and without watching, beside the hand-written floor; prints a table.

    Args:
      config: finalized; its batches are real, prepared before the clock starts.
      steps: per round and variant.
      rounds: turns that the variants take.
    """
    if not config.log.watch_every:
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, watch_every=20))
    data = build_data(config.data, model_kind=config.model.kind, batch_size=config.batch_size, seed=config.seed)
    config = finalize(
        config, vocab_size=data.vocab_size, num_classes=data.num_classes, image_shape=data.image_shape,
        device_count=jax.device_count(),
    )
    setup = prepare(config, data.batch_spec())
    host = [data.batch(step) for step in range(8)]
    batches = [launch.global_batch(batch, setup.mesh, config.batch_size) for batch in host]
    variants = [
        Variant("sparsejax", setup.init(), setup.train(setup.stage(0), False)),
        Variant("sparsejax, watching every step", setup.init(), setup.train(setup.stage(0), True)),
    ]
    floor = jax.device_count() == 1 and minimal_trainer.supports(config)
    if floor:
        state, step = minimal_trainer.make(config)
        variants.append(Variant("hand-written floor", state, step))
    for variant in variants:
        variant.run(batches, 2)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(rounds):
        for variant in variants:
            seconds[variant.name].append(variant.run(batches, steps))
    result = _result(config, setup, seconds)
    result["host_gap_ms"] = host_gap(setup, batches, steps)
    print(_table(result))
    return result


def host_gap(setup: Any, batches: list[Any], steps: int) -> float:
    """Milliseconds of host work between one step's dispatch and the next, the wait for the step before left out.

    As long as this is shorter than a step, the device always has the next one queued.
    """
    stream = metrics.MetricStream()
    state, compiled = setup.init(), setup.train(setup.stage(0), False)
    spent: list[float] = []
    ready = 0.0

    def fetch(tree: Any) -> Any:
        nonlocal ready
        jax.block_until_ready(tree)
        ready = time.perf_counter()
        return jax.device_get(tree)

    original, metrics.fetch = metrics.fetch, fetch
    try:
        for i in range(steps):
            state, found = compiled(state, batches[i % len(batches)])
            if stream.push(i, found) is not None:
                spent.append(time.perf_counter() - ready)
    finally:
        metrics.fetch = original
    return 1e3 * statistics.median(spent)


def _result(config: ExperimentConfig, setup: Any, seconds: dict[str, list[float]]) -> dict[str, Any]:
    tokens = config.batch_size * examples_to_tokens(config)
    flops = flops_per_token(config.model, examples_to_tokens(config))
    device = setup.mesh.devices.flat[0]
    peak = metrics.peak_flops(device.device_kind, config.model.dtype, config.log.peak_flops)
    rows: list[dict[str, Any]] = []
    for name, found in seconds.items():
        median = statistics.median(found)
        rows.append(
            {
                "variant": name,
                "ms_per_step": 1e3 * median,
                "ms_lowest": 1e3 * min(found),
                "ms_highest": 1e3 * max(found),
                "tokens_per_second": tokens / median,
                "mfu": metrics.mfu(flops, tokens / median, setup.mesh.size, peak),
                "tflops_per_second": flops * tokens / median / 1e12,
            }
        )
    plain, watched = rows[0]["ms_per_step"], rows[1]["ms_per_step"]
    compilation = next(
        found for name, found in setup.compilations.items() if name.startswith("train") and "watched" not in name
    )
    result = {
        "config": config.name,
        "device": f"{setup.mesh.size} x {device.device_kind}",
        "jax": jax.__version__,
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "variants": rows,
        "trace_and_lower_seconds": compilation.trace_seconds + compilation.lower_seconds,
        "compile_seconds": compilation.compile_seconds,
        "watch_every": config.log.watch_every,
        "watch_alone": watched / plain,
        "watch_amortised": 1 + (watched / plain - 1) / config.log.watch_every,
    }
    if len(rows) > 2:
        ratios = np.array(seconds["hand-written floor"]) / np.array(seconds["sparsejax"])
        result["speed_over_floor"] = {
            "median": float(np.median(ratios)),
            "lowest": float(ratios.min()),
            "highest": float(ratios.max()),
        }
    return result


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['config']} on {result['device']}, jax {result['jax']}, {result['tokens_per_step']:,} tokens per step"]
    lines.append(f"{'variant':32} {'ms/step':>9} {'lowest':>9} {'highest':>9} {'tokens/s':>10} {'Tflop/s':>8} {'MFU':>6}")
    for row in result["variants"]:
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] == row["mfu"] else "nan"
        lines.append(
            f"{row['variant']:32} {row['ms_per_step']:9.2f} {row['ms_lowest']:9.2f} {row['ms_highest']:9.2f} "
            f"{row['tokens_per_second']:10,.0f} {row['tflops_per_second']:8.3f} {mfu:>6}"
        )
    lines.append(
        f"trace + lower {result['trace_and_lower_seconds']:.2f} s, compile {result['compile_seconds']:.2f} s, "
        f"host work per step {result['host_gap_ms']:.3f} ms"
    )
    lines.append(
        f"watching: {result['watch_alone']:.3f} x a step alone, {result['watch_amortised']:.4f} x "
        f"at every {result['watch_every']} steps"
    )
    if "speed_over_floor" in result:
        ratio = result["speed_over_floor"]
        lines.append(
            f"speed over the floor: {ratio['median']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f} over rounds)"
        )
    return "\n".join(lines)
