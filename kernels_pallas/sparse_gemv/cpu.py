"""sparse_gemv in plain JAX for CPU: a loop over the rows of w that count for any row of x, several of them at a time.

How many rows there are is data: nothing is padded, nothing is copied out of w, and any number is exact. Rows that share scales
are summed first, so that scales and zeros cost nothing per row; packed codes are multiplied lane by lane (even and odd columns
of 4-bit codes in sums of their own) and put in order once, at the end.
"""

import jax.numpy as jnp
from jax import lax

from kernels_pallas.sparse_gemv.rows import float_rows

UNROLL = 8  # numbers of a column in one turn: rows times lanes, since each is compiled


def sparse_gemv_loop(x, mask, w, *, preferred_element_type=None):
    """As `sparse_gemv`; w may be `rows.Rows`, a mask of None keeps all. Integers are summed in the dtype of x."""
    rows = w if hasattr(w, "read") else float_rows(w)
    features, outputs = rows.shape
    x, lead, out_dtype = x.reshape(-1, features), x.shape[:-1], preferred_element_type or x.dtype
    wide = x.dtype if jnp.issubdtype(x.dtype, jnp.integer) else jnp.promote_types(x.dtype, jnp.float32)
    kept = jnp.ones(x.shape, bool) if mask is None else mask.reshape(-1, features)
    y = _loop(jnp.where(kept, x, 0).astype(wide), jnp.any(kept, axis=0), rows)
    return rows.join(y).astype(out_dtype).reshape(*lead, outputs)


def _loop(x, counts, rows):
    """float[B, n] by lane: the sum over rows k where `counts` of x[:, k] times row k."""
    features, unroll = rows.shape[0], min(rows.group, max(2, UNROLL // rows.width[0]))
    index = jnp.arange(features)
    before = jnp.cumsum(counts)
    # Channels that count, in order; those of group g stand from starts[g] to starts[g + 1].
    kept = jnp.zeros(features, index.dtype).at[jnp.where(counts, before - 1, features)].set(index, mode="drop")
    borders = jnp.minimum(jnp.arange(-(-features // rows.group) + 1) * rows.group, features)
    starts = jnp.concatenate([jnp.zeros(1, before.dtype), before])[borders]
    groups = len(borders) - 1
    sums = jnp.pad(x, ((0, 0), (0, groups * rows.group - features))).reshape(-1, groups, rows.group).sum(-1)

    def group(g, y):
        first, end = starts[g], starts[g + 1]

        def turn(number, total):
            for step in range(unroll):
                at = first + number * unroll + step
                k = kept[jnp.minimum(at, end - 1)]  # what fills the last turn is the last of them again, with value 0
                value = jnp.where(at < end, x[:, k], 0)[:, None]
                total = [lane + value * numbers[None] for lane, numbers in zip(total, rows.read(k), strict=True)]
            return tuple(total)

        total = lax.fori_loop(0, (end - first + unroll - 1) // unroll, turn, tuple(jnp.zeros_like(lane) for lane in y))
        return tuple(lane + share for lane, share in zip(y, rows.finish(g, total, sums[:, g]), strict=True))

    lanes, width = rows.width
    y = (jnp.zeros((x.shape[0], width), x.dtype),) * lanes
    return group(0, y) if groups == 1 else lax.fori_loop(0, groups, group, y)
