"""The key-value cache of one attention layer: how new keys are kept, which are attended to, and what memory that reads.

A cache grows by `append` and is read through its format, `model.attention.cache_format`:

    encode(k, v)                 what is stored of new keys and values (a quantized format packs them here)
    decode(store, head)          the keys and values that stored arrays stand for
    as_read(k, v)                both at once: what queries see of keys and values that were stored
    select(q, cache, attend)     the result of attend(keys) over the keys it chooses (sparse attention chooses fewer)

so that a format or a sparse selection is one small class and no attention layer knows of it. Stored arrays have slots on
axis 2: a head's keys lie together, which is the order in which attention reads them. Attention that fills no cache (a text that
is scored, a training step) reads its keys by `as_read`, so that a model computes the same whichever way it is run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparsejax import plugs
from sparsejax.ops.attend import trace_platform
from sparsejax.ops.formats.grids import ELEMENTS, LOGARITHMS
from sparsejax.ops.formats.quantize import fake
from sparsejax.ops.formats.spec import PUBLISHED, FormatSpec
from sparsejax.plugs import check
from sparsejax.quantized_arrays import QTensor, qtensor

Store = dict[str, Array]

_PARTS = ("codes", "scale", "zero")  # of a QTensor that is stored
RING_ALIGNMENT = 64  # a ring holds its window rounded up to this
SHORTEST_READ = 256  # slots read: the first of 256, 512, 1024, ... that covers what is filled


class Keys(NamedTuple):
    """Keys and values [B, G, S, K] with the position and segment of each slot [B, S]; segment 0 is an empty slot."""

    k: Array
    v: Array
    positions: Array
    segment_ids: Array


class Head(NamedTuple):
    """What stored arrays do not tell: numbers K of a key, and the dtype in which keys are computed with."""

    size: int
    dtype: Any


class CacheFormat(Protocol):
    """See the module's docstring."""

    def encode(self, k: Float[Array, "B G T K"], v: Float[Array, "B G T K"]) -> Store: ...

    def decode(self, store: Store, head: Head) -> tuple[Float[Array, "B G S K"], Float[Array, "B G S K"]]: ...

    def as_read(self, k: Float[Array, "B T G K"], v: Float[Array, "B T G K"]) -> tuple[Array, Array]: ...

    def select(self, q: Float[Array, "B T H K"], cache: KVCache, attend: Callable[[Keys], Array]) -> Array: ...


@plugs.register("cache", "dense")
@dataclass(frozen=True)
class Dense:
    """Keys and values in the compute dtype, all of them attended to."""

    def encode(self, k: Array, v: Array) -> Store:
        return {"k": k, "v": v}

    def decode(self, store: Store, head: Head) -> tuple[Array, Array]:
        return store["k"], store["v"]

    def as_read(self, k: Array, v: Array) -> tuple[Array, Array]:
        return k, v

    def select(self, q: Array, cache: KVCache, attend: Callable[[Keys], Array]) -> Array:
        return over_filled(cache, attend)


@dataclass(frozen=True)
class Quantized(Dense):
    """Keys and values in a number format, each token of each head by itself, packed at the true bits.

    The store has for `k` and `v` the arrays of a QTensor: `k.codes` [B, G, S, bytes], `k.scale` [B, G, S, groups], `k.zero`.
    """

    spec: FormatSpec

    def __post_init__(self) -> None:
        spec = self.spec
        own = spec.granularity == "token" or (spec.granularity == "group" and spec.axis == -1)
        check(own, "granularity", spec.granularity, "shares scales among tokens, and a cache grows by one token at a time; "
              "allowed are token, and group=SIZE,axis=-1 along a head")  # fmt: skip
        check(spec.second == "none", "second", spec.second, "needs all tokens at once; allowed is none")
        check(not spec.static, "static", True, "keys and values have no calibrated scales; leave it out")
        check(spec.rounding != "stochastic", "round", spec.rounding, "needs random numbers; allowed are even, away, half_up")
        check(spec.element not in LOGARITHMS, "element", spec.element, "has no negative numbers, keys and values have")

    def encode(self, k: Array, v: Array) -> Store:
        tensors = {"k": qtensor(k, self.spec), "v": qtensor(v, self.spec)}
        parts = ((f"{name}.{part}", getattr(tensor, part)) for name, tensor in tensors.items() for part in _PARTS)
        return {name: array for name, array in parts if array is not None}

    def decode(self, store: Store, head: Head) -> tuple[Array, Array]:
        return self._restored(store, "k", head), self._restored(store, "v", head)

    def _restored(self, store: Store, name: str, head: Head) -> Array:
        codes, scale, zero = (store.get(f"{name}.{part}") for part in _PARTS)
        assert codes is not None and scale is not None
        return QTensor(codes, scale, self.spec, (codes.shape[-2], head.size), head.dtype, zero).dequantize()

    def as_read(self, k: Array, v: Array) -> tuple[Array, Array]:
        return fake(k, self.spec), fake(v, self.spec)  # scales lie along the last axis: [T, G] before it or [G, T] is the same


def cache_format(text: str, head_dim: int = 0, field: str = "model.attention.cache_format") -> CacheFormat:
    """The format that a config names: a number format (`ops.formats.spec`) or a spec of registry kind "cache", e.g. "dense".

    Args:
      text: e.g. "int4:asym,token,zero=min" or "int8:asym,group=32,axis=-1".
      head_dim: K, which groups must divide unless they are ragged; 0: not known yet.
      field: where it was found, for messages.
    Raises:
      ConfigError: no such format, or one whose scales belong to several tokens.
    """
    if str(text).strip().partition(":")[0] not in (*ELEMENTS, *PUBLISHED):
        return plugs.resolve("cache", text, field)
    spec = FormatSpec.parse(text, field)
    try:
        form = Quantized(spec)
        if head_dim:
            spec.block((1, head_dim))
    except plugs.ConfigError as error:
        raise plugs.ConfigError(f"{field} = {text!r}: {error}") from error
    return form


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["store", "positions", "segment_ids", "length"],
    meta_fields=["format", "head", "window"],
)
@dataclass
class KVCache:
    """Keys and values of one layer (or of stacked layers, when a scan carries it).

    store: what the format keeps, slots on axis 2. positions, segment_ids: int32[B, S] of the slots; segment 0: empty.
    length: int32[], tokens appended so far, padding included; all rows are written at one slot.
    window: 0 keeps every token; else slots are a ring that keeps at least the last `window` tokens.
    """

    store: Store
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]
    format: Any
    head: Head
    window: int

    @property
    def slots(self) -> int:
        return self.positions.shape[-1]

    @property
    def wraps(self) -> bool:
        """Whether a long sequence comes back to the first slot."""
        return self.window > 0

    def append(
        self, k: Float[Array, "B T G K"], v: Float[Array, "B T G K"], positions: Int[Array, "B T"], segments: Array | None
    ) -> KVCache:
        """With the keys and values of T more tokens; `segments` as in a batch, None: all are tokens of one document.

        A cache that does not wrap must have room: slots are checked where lengths are known, on the host.
        """
        count = k.shape[1]
        segments = jnp.ones(positions.shape, jnp.int32) if segments is None else segments
        new = self.format.encode(k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))
        write = functools.partial(_write, start=self.length, ring=self.wraps)
        return KVCache(
            store={name: write(old, new[name], axis=2) for name, old in self.store.items()},
            positions=write(self.positions, positions, axis=1),
            segment_ids=write(self.segment_ids, segments, axis=1),
            length=self.length + count,
            format=self.format,
            head=self.head,
            window=self.window,
        )

    def read(self, slots: int) -> Keys:
        """The first `slots` slots, decoded."""
        part = {name: jax.lax.slice_in_dim(array, 0, slots, axis=2) for name, array in self.store.items()}
        k, v = self.format.decode(part, self.head)
        return Keys(k, v, self.positions[:, :slots], self.segment_ids[:, :slots])

    def attend(self, q: Float[Array, "B T H K"], attend: Callable[[Keys], Array]) -> Array:
        """What `attend(keys)` gives over the keys that the format selects for q, the T tokens appended last.

        Raises:
          ValueError: so many tokens that a ring has already overwritten keys the first of them sees.
        """
        if self.wraps and q.shape[1] > max(1, self.slots - self.window + 1):
            raise ValueError(
                f"{q.shape[1]} tokens at once: a ring of {self.slots} slots with a window of {self.window} decodes at most "
                f"{self.slots - self.window + 1}"
            )
        return self.format.select(q, self, attend)


def empty_cache(
    form: CacheFormat, batch: int, length: int, *, heads: int, head_dim: int, dtype: Any, window: int = 0
) -> KVCache:
    """A cache with room for `length` tokens (for at least `window` of them where that is not 0).

    Args:
      form: how keys and values are stored, see `cache_format`.
      heads, head_dim: G and K of the layer's keys.
      dtype: in which keys and values are computed.
    """
    ring = -(-window // RING_ALIGNMENT) * RING_ALIGNMENT
    wraps = 0 < ring < length
    slots = ring if wraps else length
    tokens = jax.ShapeDtypeStruct((batch, heads, slots, head_dim), dtype)
    stored = jax.eval_shape(form.encode, tokens, tokens)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return KVCache(
        store={name: jnp.zeros(array.shape, array.dtype) for name, array in stored.items()},
        positions=empty,
        segment_ids=empty,
        length=jnp.zeros((), jnp.int32),
        format=form,
        head=Head(head_dim, jnp.dtype(dtype)),
        window=window if wraps else 0,
    )


def token_bytes(form: CacheFormat, *, heads: int, head_dim: int, dtype: Any) -> int:
    """Bytes that one more token adds to a layer's cache, scales and fill included; positions and segments are not counted."""
    token = jax.ShapeDtypeStruct((1, heads, 1, head_dim), dtype)
    return sum(array.size * array.dtype.itemsize for array in jax.eval_shape(form.encode, token, token).values())


def over_filled(cache: KVCache, attend: Callable[[Keys], Array]) -> Array:
    """`attend` over the shortest of a few prefixes of the slots that covers all filled ones.

    On CPU 2048 slots of which 100 are filled cost 4 ms a token this way and 16 ms whole (30 layers of 3 heads x 64, fp32).
    A GPU waits for the index of a branch on the host, so there all slots are read.
    """
    sizes = read_sizes(cache.slots) if trace_platform() == "cpu" else [cache.slots]
    if len(sizes) == 1:
        return attend(cache.read(cache.slots))
    index = jnp.searchsorted(jnp.asarray(sizes), jnp.minimum(cache.length, cache.slots))
    return jax.lax.switch(index, [lambda c, n=size: attend(c.read(n)) for size in sizes], cache)


def read_sizes(slots: int) -> list[int]:
    """The prefixes that `over_filled` chooses from."""
    sizes = [SHORTEST_READ]
    while sizes[-1] < slots:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], slots]


def _write(old: Array, new: Array, *, start: Array, ring: bool, axis: int) -> Array:
    """`old` with `new` in the slots from `start` on, along `axis`."""
    new = new.astype(old.dtype)
    slots, count = old.shape[axis], new.shape[axis]
    if not ring:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start, axis)
    if count >= slots:  # token n of the sequence lives in slot n % slots
        return jnp.roll(jax.lax.slice_in_dim(new, count - slots, count, axis=axis), (start + count) % slots, axis)
    if count == 1:
        return jax.lax.dynamic_update_slice_in_dim(old, new, start % slots, axis)
    return old.at[(*[slice(None)] * axis, (start + jnp.arange(count)) % slots)].set(new)
