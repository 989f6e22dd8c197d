"""sparse_gemv by its definition, and by gathering: in plain JAX, for any backend."""

import functools

import jax
import jax.numpy as jnp

GRANULE = 128  # capacities are multiples of it


def sparse_gemv_reference(x, mask, w, *, preferred_element_type=None):
    """The specification of `sparse_gemv`: zeros are multiplied."""
    return jnp.matmul(jnp.where(mask, x, 0), w.astype(x.dtype), preferred_element_type=preferred_element_type or x.dtype)


def sparse_gemv_gather(x, mask, w, *, most=None, preferred_element_type=None):
    """As `sparse_gemv`: rows of w are copied out, up to a capacity, and multiplied; where more count, the reference is taken.

    The capacity is `most`, or half of K where that is unknown: the copy is written and read again, so that beyond a third of
    the rows XLA's gather saves no traffic, and at half it costs the time of the dense product and more.
    """
    features, out_dtype = x.shape[-1], preferred_element_type or x.dtype
    capacity = min(features, most if most is not None else -(-(features // 2) // GRANULE) * GRANULE)
    one = functools.partial(_gathered, w=w, capacity=capacity)
    rows, masks = x.reshape(-1, features), mask.reshape(-1, features)

    def gathered(rows, masks):
        return jax.vmap(one)(rows, masks).astype(out_dtype)

    def whole(rows, masks):
        return sparse_gemv_reference(rows, masks, w, preferred_element_type=out_dtype)

    if most is not None:
        y = gathered(rows, masks)
    else:
        y = jax.lax.cond(jnp.max(jnp.sum(masks, axis=-1)) <= capacity, gathered, whole, rows, masks)
    return y.reshape(*x.shape[:-1], w.shape[1])


def _gathered(x, mask, *, w, capacity):
    # What fills up is the last row that counts again, with value 0.
    last = jnp.max(jnp.where(mask, jnp.arange(x.shape[0]), 0))
    (kept,) = jnp.nonzero(mask, size=capacity, fill_value=last)
    values = jnp.where(jnp.arange(capacity) < jnp.sum(mask), x[kept], 0)
    return jnp.matmul(values, w[kept].astype(x.dtype), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
