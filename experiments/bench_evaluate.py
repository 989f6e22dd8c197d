"""What an evaluation costs beside the plain matmuls that it cannot do without.

A decoder of random weights in the shape of SmolLM2-135M scores windows of random tokens, as `experiments.evaluate` does. Around
it, in the same process, its linear maps are timed as bare float32 products of the same rows. Attention's own products, norms,
RoPE, softmax and the cross-entropy are in the evaluation and not in the matmuls: the ratio says what all of them add.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import nnx_compat
from sparsejax.evaluate.scoring import Row, Scorer, plan_buckets
from sparsejax.io.model import Model
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig, PositionConfig, RopeConfig
from sparsejax.models.sizes import linear_shapes
from sparsejax.models.transformer import Transformer

WINDOWS = (512, 2048)
TOKENS = 4096  # scored per round and window

Product = tuple[int, int, int, int]  # rows, in, out, how often


def smollm2_shape() -> ModelConfig:
    """SmolLM2-135M: 30 layers of width 576, 9 query and 3 key heads of 64, gated FFN of 1536, 49,152 tokens, tied."""
    return ModelConfig(
        num_layers=30,
        d_model=576,
        vocab_size=49_152,
        max_length=8192,
        attention=AttentionConfig(num_heads=9, num_kv_heads=3, head_dim=64),
        ffn=FFNConfig(hidden=1536, activation="swiglu"),
        positions=PositionConfig(rope=RopeConfig(theta=1e5)),
    )


def bench_evaluate(*, rounds: int) -> dict[str, Any]:
    """Time evaluation and plain matmuls in turns and print a table; the ratio is taken within each round.

    Args:
      rounds: turns; figures are medians over them.
    """
    config = smollm2_shape()
    structure, values = nnx_compat.split(jax.jit(lambda key: Transformer(config, key))(jax.random.key(0)))
    scorer = Scorer(Model("random weights, SmolLM2-135M's shape", config, structure, values))
    rng = np.random.default_rng(0)
    found = []
    for window in WINDOWS:
        rows = [Row(rng.integers(0, config.vocab_size, window).astype(np.int32), 1) for _ in range(TOKENS // window)]
        found.append(_bench_window(scorer, rows, rounds))
    device = jax.devices()[0]
    result = {"model": scorer.model.name, "device": f"{device.platform}: {device.device_kind}", "jax": jax.__version__,
              "rounds": rounds, "tokens": TOKENS, "rows": found}  # fmt: skip
    print(_table(result))
    return result


def _bench_window(scorer: Scorer, rows: list[Row], rounds: int) -> dict[str, Any]:
    config, window = scorer.model.config, len(rows[0].tokens)
    (bucket,) = plan_buckets(rows, scorer.batch, scorer.max_length, jax.default_backend())
    passes = len(rows) // bucket.batch
    products = plain_products(config, bucket.batch * bucket.length, passes)
    operands = [_operands(product) for product in products]
    start = time.perf_counter()
    scorer.score(rows)
    first = time.perf_counter() - start
    evaluations, plain = [], []
    for _ in range(rounds):
        before = sum(map(_seconds, products, operands))
        start = time.perf_counter()
        scorer.score(rows)
        evaluations.append(time.perf_counter() - start)
        # The machine may slow down while one is timed: the matmuls stand on both sides.
        plain.append((before + sum(map(_seconds, products, operands))) / 2)
    ratios = [e / p for e, p in zip(evaluations, plain, strict=True)]
    flops = sum(2 * math.prod(product) for product in products)
    return {
        "window": window,
        "windows": len(rows),
        "batch": bucket.batch,
        "first_seconds": first,
        "evaluation_seconds": statistics.median(evaluations),
        "matmul_seconds": statistics.median(plain),
        "matmul_gflops": flops / statistics.median(plain) / 1e9,
        "tokens_per_second": window * len(rows) / statistics.median(evaluations),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def plain_products(config: ModelConfig, rows: int, passes: int) -> list[Product]:
    """Every linear map of a model, by shape: those inside blocks and the head, for `passes` batches of `rows` tokens."""
    shapes = [*linear_shapes(config).values(), (config.d_model, config.vocab_size)]
    return [(rows, *shape, passes * shapes.count(shape)) for shape in dict.fromkeys(shapes)]


# Rows of the head's product at once: its float32 logits are as large as the evaluation's own pieces.
_HEAD_ROWS = 256


def _operands(product: Product) -> tuple[jax.Array, list[jax.Array]]:
    """x, and more than one w where the model has more, so that they come from memory as the model's do."""
    rows, width, out, times = product
    x = jnp.ones((min(rows, _HEAD_ROWS) if out > 32 * width else rows, width))
    return x, [jnp.full((width, out), 0.01 * (i + 1)) for i in range(min(times, 8))]


_matmul = jax.jit(jnp.matmul)


def _seconds(product: Product, operands: tuple[jax.Array, list[jax.Array]]) -> float:
    """Of the whole product, from the median over its weights (two or more)."""
    (rows, _, _, times), (x, weights) = product, operands
    jax.block_until_ready(_matmul(x, weights[0]))
    found = []
    for w in weights if len(weights) > 1 else weights * 2:
        start = time.perf_counter()
        jax.block_until_ready(_matmul(x, w))
        found.append(time.perf_counter() - start)
    return statistics.median(found) * times * rows / len(x)


def _table(result: dict[str, Any]) -> str:
    lines = [f"{result['model']} on {result['device']}, jax {result['jax']}, {result['tokens']:,} tokens"]
    lines.append(
        f"{'window':>6} {'batch':>5} {'first s':>8} {'eval s':>7} {'matmul s':>8} {'Gflop/s':>8} {'tokens/s':>9} {'ratio':>6} "
        f"(over {result['rounds']} rounds)"
    )
    for row in result["rows"]:
        lines.append(
            f"{row['window']:6,} {row['batch']:5} {row['first_seconds']:8.1f} {row['evaluation_seconds']:7.2f} "
            f"{row['matmul_seconds']:8.2f} {row['matmul_gflops']:8.1f} {row['tokens_per_second']:9,.0f} {row['ratio']:6.2f} "
            f"({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f})"
        )
    return "\n".join(lines)
