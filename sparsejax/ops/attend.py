"""Scaled dot-product attention on plain arrays, with the backend chosen by device, dtype, shape and features.

Backends: `xla` makes the whole B x H x T x S of logits (the specification); `blocked` works by blocks of queries
(attend_blocked.py); `cudnn` is NVIDIA's fused kernel (attend_cudnn.py). All agree on the mask (attend_visibility.py), and
a query that sees no key gives 0 with zero gradients.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparsejax.ops.attend_blocked import Bias, attention_weights, block_bias, blocked_attention
from sparsejax.ops.attend_cudnn import cudnn_attention, why_not_cudnn
from sparsejax.ops.attend_visibility import Span, Visibility
from sparsejax.plugs import check_choice

BACKENDS = ("auto", "blocked", "xla", "cudnn")


class BackendChoice(NamedTuple):
    """The backend that runs, and why."""

    name: str
    reason: str


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    *,
    causal: bool,
    scale: float,
    window: int = 0,
    query_segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    prefix: Bool[Array, "B S"] | None = None,
    bias: Bias | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
    block_size: int = 0,
    recompute: bool | None = None,
) -> Float[Array, "B T H V"]:
    """Softmax attention; logits and softmax are float32 (or wider) whatever the inputs are, the result has v's type.

    Args:
      q, k, v: G divides H; query head h reads key head h // (H / G), which is never repeated in memory.
      causal: a query sees keys at positions up to its own.
      scale: factor of the logits, usually K ** -0.5.
      window: keys that a causal query sees, itself included; without causal order |t - s| < window; 0: all.
      query_segment_ids, key_segment_ids: only equal ids attend to each other; 0 is padding, which nothing attends to. Keys' ids
        alone mask padding (cross-attention).
      query_positions, key_positions: positions that `causal`, `window` and a bias function compare; default the indices. Packed
        sequences in order need none, since index order agrees with positions inside a segment: giving them costs the
        blocks below the diagonal their saving. For a cache give both, with key ids of 0 where a slot is empty.
      prefix: keys that every query of their segment sees, also from before (prefix-LM).
      bias: added to the logits: an [H, T, S] or [B, H, T, S] array, or a function of a block's query and key positions, [Tb]
        and [Sb] (or [B, Tb] and [B, Sb] where positions were given), to [H, Tb, Sb] (or [B, H, Tb, Sb]).
      softcap: logits become softcap * tanh(logits / softcap) before bias and mask; 0: off.
      backend: auto | blocked | xla | cudnn; what cannot run falls back to blocked, see `explain_backend`.
      block_size: queries per block of `blocked`; 0 chooses by device and length.
      recompute: whether `blocked` recomputes probabilities in the backward pass; None decides by size.
    Raises:
      ConfigError: unknown backend.
      ValueError: shapes that do not fit, or an order between different lengths without positions.
    """
    _check_shapes(q, k, v)
    visibility = Visibility(
        q.shape[1], k.shape[1], causal, window, query_segment_ids, key_segment_ids, query_positions, key_positions, prefix
    )
    choice = _choose(q, k, v, visibility, bias is not None, softcap, backend)
    if choice.name == "cudnn":
        return cudnn_attention(q, k, v, visibility, scale=scale)
    whole = choice.name == "xla"
    return blocked_attention(
        q,
        k,
        v,
        visibility,
        bias=bias,
        softcap=softcap,
        scale=scale,
        block_size=q.shape[1] if whole else block_size or default_block_size(q.shape[1], trace_platform()),
        recompute=False if whole else recompute,
    )


def explain_backend(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool,
    window: int = 0,
    query_segment_ids: Array | None = None,
    key_segment_ids: Array | None = None,
    query_positions: Array | None = None,
    key_positions: Array | None = None,
    prefix: Array | None = None,
    bias: Bias | None = None,
    softcap: float = 0.0,
    backend: str = "auto",
) -> BackendChoice:
    """The backend that `attend` would use for these arguments (arrays or ShapeDtypeStructs) here, and the reason."""
    visibility = Visibility(
        q.shape[1], k.shape[1], causal, window, query_segment_ids, key_segment_ids, query_positions, key_positions, prefix
    )
    return _choose(q, k, v, visibility, bias is not None, softcap, backend)


def attention_entropy(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    *,
    causal: bool,
    scale: float,
    window: int = 0,
    query_segment_ids: Int[Array, "B T"] | None = None,
    key_segment_ids: Int[Array, "B S"] | None = None,
    query_positions: Int[Array, "B T"] | None = None,
    key_positions: Int[Array, "B S"] | None = None,
    prefix: Bool[Array, "B S"] | None = None,
    bias: Bias | None = None,
    softcap: float = 0.0,
    rows: int = 64,
) -> Float[Array, " H"]:
    """Mean entropy (nats) of the attention distribution per head, over at most `rows` evenly spaced query rows of the batch.

    The masks and logits are those of `attend`; rows that see no key are left out. The cost is rows x S, not T x S.
    """
    _check_shapes(q, k, k)
    batch_step, times = sample_rows(q.shape[0], q.shape[1], rows)
    every = slice(None, None, batch_step)
    if query_positions is None and key_positions is None and (causal or window) and q.shape[1] != k.shape[1]:
        raise ValueError(f"{q.shape[1]} queries and {k.shape[1]} keys: give query_positions and key_positions")
    positions = jnp.arange(q.shape[1])[None] if query_positions is None else query_positions[every]
    sampled = Visibility(
        len(times),
        k.shape[1],
        causal,
        window,
        None if query_segment_ids is None else query_segment_ids[every][:, times],
        None if key_segment_ids is None else key_segment_ids[every],
        positions[:, times],
        None if key_positions is None else key_positions[every],
        None if prefix is None else prefix[every],
    )
    if bias is not None and not callable(bias):
        bias = bias[..., times, :] if bias.ndim == 3 else bias[every][:, :, times]
    groups, heads = k.shape[2], q.shape[2]
    query = q[every][:, times].reshape(-1, len(times), groups, heads // groups, q.shape[-1]).transpose(0, 2, 3, 1, 4)
    block = Span(0, len(times)), Span(0, k.shape[1])
    weights, total, logits = attention_weights(
        query, k[every].transpose(0, 2, 1, 3), sampled.block(*block), block_bias(bias, sampled, *block), softcap, scale
    )
    seen = total[..., 0] > 0
    total = jnp.where(seen, total[..., 0], 1)
    entropy = jnp.log(total) - jnp.where(weights > 0, weights * logits, 0).sum(-1) / total
    per_head = (-1, heads, len(times))
    seen, entropy = seen.reshape(per_head), jnp.where(seen, entropy, 0).reshape(per_head)
    return entropy.sum((0, 2)) / jnp.maximum(seen.sum((0, 2)), 1)


def sample_rows(batch: int, length: int, rows: int) -> tuple[int, np.ndarray]:
    """A step over the batch and evenly spaced query indices (the last included), together at most `rows` rows."""
    batch_step = -(-batch // rows)
    count = min(length, max(1, rows // -(-batch // batch_step)))
    return batch_step, ((np.arange(count) + 1) * length) // count - 1


def default_block_size(length: int, platform: str) -> int:
    """Queries per block: 64 up to 512 queries on CPU (measured), then 128; 256 elsewhere."""
    if platform == "cpu":
        return 64 if length <= 512 else 128
    return 256


def trace_platform() -> str:
    """The platform that is being traced for: the ambient mesh's, else the default device's, else the default backend."""
    meshed = getattr(getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None), "platform", None)
    if meshed:
        return meshed
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default.platform
    return default or jax.default_backend()


def _choose(
    q: Array, k: Array, v: Array, visibility: Visibility, has_bias: bool, softcap: float, backend: str
) -> BackendChoice:
    check_choice("attention.backend", backend, BACKENDS)
    platform = trace_platform()
    if backend in ("blocked", "xla"):
        return BackendChoice(backend, "asked for")
    if platform not in ("gpu", "cuda"):
        choice = BackendChoice("blocked", f"cudnn needs an NVIDIA GPU, this is {platform}")
    else:
        reason = why_not_cudnn(q, k, v, visibility, has_bias=has_bias, softcap=softcap)
        choice = BackendChoice("blocked", f"not cudnn: {reason}") if reason else BackendChoice("cudnn", "fused on NVIDIA GPUs")
    if backend == "auto" and choice.name == "blocked" and _sequence_shards() > 1:
        return BackendChoice("xla", "the mesh splits the queries, and blocks of them would each live on one device")
    if backend == "cudnn" and choice.name != backend:
        _tell_once(choice.reason)
    return choice


def _sequence_shards() -> int:
    return jax.sharding.get_abstract_mesh().shape.get("sequence", 1)


@lru_cache(maxsize=64)
def _tell_once(reason: str) -> None:
    logging.getLogger(__name__).warning("attention.backend = 'cudnn' runs as 'blocked': %s", reason)


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k, v of shapes {q.shape}, {k.shape}, {v.shape}: [B, T, H, K], [B, S, G, K] and [B, S, G, V]")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {q.shape}, k {k.shape}, v {v.shape}: batch, key length, key heads or head size do not match")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads: a multiple of the {k.shape[2]} key heads")
