"""How long a product with a quantized weight takes, by shape and format, beside the bytes it reads and the rate of the memory.

Times are those of the product that a model computes (`arrays.matmul` of a float x and a QTensor), one of `WEIGHTS` in a row in
one program, each fed by the one before it: a program's start is shared, as it is in a model, and weights come from memory where
the device's caches do not hold them all. Formats take turns, so that a machine whose speed drifts treats them alike. The result
is a table of costs that `methods.quant.ohq` allocates bits by.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.arrays import matmul
from sparsejax.evaluate.decode_speed import Probe
from sparsejax.io.load import config_of
from sparsejax.methods.quant.ohq import CostTable, device_name, table_json
from sparsejax.models.sizes import linear_shapes
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor, qtensor

WEIGHTS = 8  # of each shape and format, in a row
FED_ON = 1e-30  # of a product's mean, to the next x: nothing, but no compiler may know it
DENSE = "float32"


def bench_formats(model: str, formats: Sequence[str], *, rows: int, rounds: int) -> dict[str, Any]:
    """Time every shape of a model's linear maps in every format; prints a table.

    Args:
      model: name or path; its config alone is read.
      formats: of `FormatSpec.parse`.
      rows: of x; 1 is decoding.
      rounds: turns of each format, at least two; times are medians over them.
    Raises:
      ConfigError: an unknown model or format, or one that does not fit a shape, before anything is timed.
    """
    check(rounds >= 2, "--rounds", rounds, "must be at least 2")
    shapes = list(dict.fromkeys(linear_shapes(config_of(model)).values()))
    specs = [FormatSpec.parse(text, "--formats") for text in formats]
    for spec in specs:
        check(spec.rounding != "stochastic" and not spec.static, "--formats", str(spec), "is not for stored weights")
        for shape in shapes:
            spec.block(shape)
    return bench_shapes(shapes, specs, rows=rows, rounds=rounds, probe=Probe(), model=model)


def bench_shapes(
    shapes: Sequence[tuple[int, int]], specs: Sequence[FormatSpec], *, rows: int, rounds: int, probe: Probe, model: str
) -> dict[str, Any]:
    """`bench_formats` of given shapes; probe: of the memory."""
    found, reads = [], []
    for shape in shapes:
        weights: dict[str, list[Any]] = {str(spec): _weights(shape, spec) for spec in specs}
        weights = {DENSE: [tensor.dequantize() for tensor in next(iter(weights.values()))], **weights}
        x = jax.random.normal(jax.random.key(0), (rows, shape[0]))
        reads.append(probe.read())
        found += _timed(shape, x, weights, rounds)
    read = statistics.median(reads)
    seconds = {(row["in"], row["out"], row["format"]): row["seconds"] for row in found if row["format"] != DENSE}
    table = CostTable(device_name(), jax.__version__, rows, seconds)
    for row in found:
        row["fraction_of_read_bandwidth"] = row["bytes"] / row["seconds"] / read
    result = {**table_json(table), "model": model, "rounds": rounds, "read_bandwidth": read, "measured": found}
    print(describe(result))
    return result


def _weights(shape: tuple[int, int], spec: FormatSpec) -> list[QTensor]:
    quantize = jax.jit(lambda key: qtensor(jax.random.normal(key, shape), spec))
    return [quantize(key) for key in jax.random.split(jax.random.key(1), WEIGHTS)]


@jax.jit
def _products(x: jax.Array, weights: list[Any]) -> jax.Array:
    for weight in weights:
        x = x + FED_ON * jnp.mean(matmul(x, weight))
    return x


def _timed(shape: tuple[int, int], x: jax.Array, weights: dict[str, list[Any]], rounds: int) -> list[dict[str, Any]]:
    for tensors in weights.values():
        jax.block_until_ready(_products(x, tensors))
    seconds: dict[str, list[float]] = {name: [] for name in weights}
    for _ in range(rounds):
        for name, tensors in weights.items():
            start = time.perf_counter()
            jax.block_until_ready(_products(x, tensors))
            seconds[name].append((time.perf_counter() - start) / WEIGHTS)
    moved = 4 * (x.size + len(x) * shape[1])
    stored = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tensors[0])) for name, tensors in weights.items()}
    return [{"in": shape[0], "out": shape[1], "format": name, "seconds": statistics.median(times), "lowest": min(times),
             "quartiles": statistics.quantiles(times)[::2], "bytes": stored[name] + moved}
            for name, times in seconds.items()]  # fmt: skip


def describe(result: dict[str, Any]) -> str:
    """The table for people; speed is beside the float32 product of the shape."""
    lines = [
        f"products of {result['rows']} rows on {result['device']}, jax {result['jax']}, median of {result['rounds']} rounds "
        f"of {WEIGHTS} in a row (quartiles); memory reads {result['read_bandwidth'] / 1e9:.1f} GB/s",
        f"{'in x out':>12} {'format':24} {'microseconds':>26} {'kB':>8} {'of read rate':>12} {'x float32':>9}",
    ]
    dense = {(row["in"], row["out"]): row["seconds"] for row in result["measured"] if row["format"] == DENSE}
    for row in result["measured"]:
        low, high = (1e6 * edge for edge in row["quartiles"])
        shape, share = f"{row['in']} x {row['out']}", f"{100 * row['fraction_of_read_bandwidth']:.0f} %"
        lines.append(
            f"{shape:>12} {row['format']:24} {1e6 * row['seconds']:10.1f} ({low:.1f} to {high:.1f})".ljust(65)
            + f" {row['bytes'] / 1e3:8.1f} {share:>12} {dense[row['in'], row['out']] / row['seconds']:9.2f}"
        )
    return "\n".join(lines)


