"""sparse_gemv in plain JAX for CPU: a loop over the rows of w that count, UNROLL of them at a time.

How many rows there are is data: nothing is padded, nothing is copied out of w, and any number is exact. One row of x, ms per
product over 30 matrices in turn, 2 shared cores, best of 15 (dense: XLA's product; gathered: the rows copied, then multiplied):

                            dense  kept: all   60 %   50 %   35 %   10 %   gathered at 50 %
    576 x 1536 float32       .196       .201   .122   .106   .086   .022              1.485
    1536 x 576 float32       .345       .220   .157   .161   .117   .053              1.976
    576 x 576 float32        .097       .113   .101   .040   .039   .014               .081
    576 x 1536 bfloat16     2.667       .146   .104   .088   .062   .022              1.502
    1536 x 576 bfloat16     4.443       .230   .161   .135   .103   .026              2.080
"""

import jax.numpy as jnp
from jax import lax

UNROLL = 8


def sparse_gemv_loop(x, mask, w, *, preferred_element_type=None):
    """As `sparse_gemv`."""
    features, out_dtype = x.shape[-1], preferred_element_type or x.dtype
    rows = [_row(*row, w) for row in zip(x.reshape(-1, features), mask.reshape(-1, features), strict=True)]
    return jnp.stack(rows).astype(out_dtype).reshape(*x.shape[:-1], w.shape[1])


def _row(x, mask, w):
    features, wide = x.shape[0], jnp.promote_types(x.dtype, jnp.float32)
    count, index = jnp.sum(mask), jnp.arange(features)
    # Kept channels in order; what fills the last turn is the last of them again, with value 0.
    place = jnp.where(mask, jnp.cumsum(mask) - 1, features + UNROLL)
    last = jnp.max(jnp.where(mask, index, 0))
    kept = jnp.full(features + UNROLL, last).at[place].set(index, mode="drop")
    values = jnp.where(jnp.arange(features + UNROLL) < count, x.astype(wide)[kept], 0)

    def turn(number, y):
        for step in range(UNROLL):
            at = number * UNROLL + step
            y += values[at] * lax.dynamic_index_in_dim(w, kept[at], keepdims=False).astype(wide)
        return y

    return lax.fori_loop(0, (count + UNROLL - 1) // UNROLL, turn, jnp.zeros(w.shape[1], wide))
