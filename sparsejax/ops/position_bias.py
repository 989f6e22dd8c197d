"""Positions other than rotary: T5's relative bias, sinusoids, and learned image positions at a new resolution."""

from __future__ import annotations

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.plugs import check, check_choice


@lru_cache(maxsize=32)
def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 .. max_distance: exact below num_buckets / 2, then logarithmic.

    float32 in the order of Hugging Face's T5, so that distances on a boundary fall where its weights were trained.
    """
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(max_distance / exact))
    far = exact + (ratio * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, num_buckets - 1)).astype(np.int32)


def relative_position_buckets(
    relative_position: Int[Array, "*shape"], *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> Int[Array, "*shape"]:
    """The bucket of `key position - query position` (Raffel et al., 2020, arXiv 1910.10683; buckets of Hugging Face's T5).

    Bidirectional: half of the buckets for keys after the query. Otherwise those keys share bucket 0.
    Raises:
      ConfigError: fewer than 2 buckets a side, or a max_distance within the exact buckets.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    check(side >= 2, "relative_buckets", num_buckets, "at least 2 for each direction that is told apart")
    check(
        max_distance > side // 2, "relative_max_distance", max_distance, f"above {side // 2}, the distances of one bucket each"
    )
    buckets = jnp.asarray(_distance_buckets(side, max_distance))
    distance = jnp.abs(relative_position) if bidirectional else jnp.maximum(-relative_position, 0)
    near = buckets[jnp.minimum(distance, max_distance)]
    return near + jnp.where(relative_position > 0, side, 0) if bidirectional else near


def relative_bias(
    table: Float[Array, "N H"],
    query_positions: Int[Array, "*B T"],
    key_positions: Int[Array, "*B S"],
    *,
    bidirectional: bool,
    max_distance: int = 128,
) -> Float[Array, "*B H T S"]:
    """T5's bias of the logits: one learned value per bucket and head; pass it to `attend` with `table` bound.

    A product with one-hot rows rather than a gather, whose gradient is a scatter: slow, and unordered on GPU.
    """
    relative = key_positions[..., None, :] - query_positions[..., :, None]
    buckets = relative_position_buckets(
        relative, bidirectional=bidirectional, num_buckets=table.shape[0], max_distance=max_distance
    )
    rows = jax.nn.one_hot(buckets, table.shape[0], dtype=table.dtype)
    return jnp.einsum("...tsn,nh->...hts", rows, table, precision=jax.lax.Precision.HIGHEST)


def sinusoidal_positions(
    positions: Int[Array, "*shape"], size: int, *, max_period: float = 10_000.0
) -> Float[Array, "*shape D"]:
    """float32 [..., size]: feature 2i is sin and 2i + 1 is cos of position / max_period ** (2i / size).

    The interleaved order of "Attention is all you need" (Vaswani et al., 2017); Hugging Face's Marian puts all sines first.
    """
    check(size >= 2 and size % 2 == 0, "d_model", size, "sinusoidal positions need an even width")
    frequencies = (max_period ** (-np.arange(0, size, 2, dtype=np.float64) / size)).astype(np.float32)
    angles = positions.astype(jnp.float32)[..., None] * frequencies.reshape((1,) * positions.ndim + (-1,))
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, size)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Cubic convolution kernel with a = -0.75, torch's choice."""
    x, a = np.abs(distance), -0.75
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


_KERNELS = {"bicubic": (_cubic, 2), "linear": (lambda x: np.maximum(1 - np.abs(x), 0), 1)}


def resize_weights(old: int, new: int, method: str = "bicubic") -> np.ndarray:
    """float64 [new, old] interpolation weights: pixel centres at (i + .5) * old / new - .5, edges clamped, no antialiasing."""
    check_choice("method", method, _KERNELS)
    kernel, reach = _KERNELS[method]
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for row, centre in enumerate(centres):
        for tap in range(math.floor(centre) - reach + 1, math.floor(centre) + reach + 1):
            weights[row, min(max(tap, 0), old - 1)] += kernel(centre - tap)
    return weights


def interpolate_positions(
    table: Float[Array, "N D"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    class_tokens: int = 0,
    method: str = "bicubic",
) -> Float[Array, "M D"]:
    """Learned ViT positions for another image size (Dosovitskiy et al., 2021, arXiv 2010.11929, section 3.2).

    Args:
      table: `class_tokens` leading rows, kept as they are, then the old grid row by row.
      method: bicubic (as torch's `interpolate(mode="bicubic", align_corners=False)`) | linear.
    Raises:
      ConfigError: the table does not have class_tokens + rows * columns rows.
    """
    rows, columns = old_grid
    expected = class_tokens + rows * columns
    check(table.shape[0] == expected, "positions", tuple(table.shape), f"{class_tokens} + {rows} x {columns} = {expected} rows")
    if tuple(old_grid) == tuple(new_grid):
        return table
    grid = table[class_tokens:].reshape(rows, columns, -1).astype(jnp.float32)
    vertical = jnp.asarray(resize_weights(rows, new_grid[0], method), jnp.float32)
    horizontal = jnp.asarray(resize_weights(columns, new_grid[1], method), jnp.float32)
    resized = jnp.einsum("Yy,Xx,yxd->YXd", vertical, horizontal, grid, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([table[:class_tokens], resized.reshape(-1, table.shape[1]).astype(table.dtype)])
