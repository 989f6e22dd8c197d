"""Attention by cuDNN's fused kernel through `jax.nn.dot_product_attention`, and the reasons for which it cannot be used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparsejax.ops.attend_visibility import Span, Visibility

# cuDNN takes segments and prefixes as an additive [B, 1, T, S] bias in the inputs' type: above this many bytes blocks are used.
_LARGEST_MASK_BYTES = 256 * 2**20


def why_not_cudnn(q: Array, k: Array, v: Array, visibility: Visibility, *, has_bias: bool, softcap: float) -> str:
    """The first reason for which these operands cannot go to cuDNN, or an empty string when they can."""
    batch, length, _, head_dim = q.shape
    keys = k.shape[1]
    masked = visibility.depends_on_data
    reasons = {
        f"dtypes {q.dtype}, {k.dtype}, {v.dtype}: bfloat16 or float16 throughout": not (
            q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
        ),
        f"head sizes {head_dim} and {v.shape[-1]}: equal, a multiple of 8 and at most 128": not (
            head_dim == v.shape[-1] and head_dim % 8 == 0 and head_dim <= 128
        ),
        "logits are soft-capped": bool(softcap),
        "an additive bias": has_bias,
        "positions are given": not visibility.ordered_by_index,
        "a window with segments, with a prefix or without causal order": bool(
            visibility.window and (masked or not visibility.causal)
        ),
        f"lengths {length} and {keys} with a mask: both even": masked and bool(length % 2 or keys % 2),
        f"a mask of {batch} x {length} x {keys}: at most {_LARGEST_MASK_BYTES} bytes": masked
        and 2 * batch * length * keys > _LARGEST_MASK_BYTES,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def cudnn_attention(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], v: Float[Array, "B S G K"], visibility: Visibility, *, scale: float
) -> Float[Array, "B T H K"]:
    """Attention of operands for which `why_not_cudnn` is empty."""
    causal = visibility.causal and visibility.prefix is None
    window = (visibility.window - 1, 0) if visibility.window else None
    whole = Span(0, q.shape[1]), Span(0, k.shape[1])
    visible = visibility.block(*whole) if visibility.depends_on_data else None
    if visible is not None:
        visible = jnp.broadcast_to(visible, (q.shape[0], q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if visible is None else visible[:, None],
        is_causal=causal,
        local_window_size=window,
        scale=scale,
        implementation="cudnn",
    )
    # cuDNN masks with a large finite number, so a row that sees no key averages all of them.
    return out if visible is None else jnp.where(visible.any(-1)[:, :, None, None], out, 0)
