"""Generation: prompts are prefilled together, then decoded against a cache in chunks that never wait for the host.

The model is any function

    apply(params, batch, cache) -> (logits [B, V] of the last token, cache)

of a batch {"tokens", "positions", "segment_ids"} int32[B, T] that appends T tokens to the cache; `decoder` makes it of a
Transformer. Prompts stand at the right end of a common length (a bucket, so that few lengths are compiled), with padding of
segment 0 before the shorter ones: all rows are written at one slot, and the last column is every row's last token.

Decoding is a loop on the device over `chunk` tokens. The next chunk is dispatched before the last one is read, so that the
host shows text while the device works, and learns one chunk late that nobody wants more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import nnx_compat
from sparsejax.arrays import EXECUTORS
from sparsejax.context import Context
from sparsejax.evaluate.sampling import Sampling, Steps, sample
from sparsejax.models.transformer import Transformer
from sparsejax.nnx_compat import Structure
from sparsejax.plugs import check, check_choice

Apply = Callable[[Any, dict[str, jax.Array], Any], tuple[jax.Array, Any]]
EmptyCache = Callable[[int, int], Any]

SMALLEST_BUCKET = 32  # tokens; the cache's slots go in steps of SLOTS
SLOTS = 256
CHUNK = 4  # tokens per dispatch: measured on 2 CPU cores, 21.6 tokens/s (20.1 one by one, 23.1 at 32 a dispatch)


class Decoder(NamedTuple):
    """A model as generation needs it; the same objects from call to call, since they key the compilation.

    apply: see above. empty_cache: (batch, length) -> a cache; called inside jit.
    """

    apply: Apply
    empty_cache: EmptyCache


class Params(NamedTuple):
    """What a Transformer's `apply` reads: its parameters and, of an encoder-decoder, the encoded prompts."""

    values: Any
    memory: Any = None
    memory_segment_ids: Any = None


def decoder(structure: Structure, executor: str = "masked") -> Decoder:
    """The Transformer of `structure` as a Decoder whose params are `Params`.

    executor: of sparse products while decoding, one of `arrays.EXECUTORS`.
    """
    check_choice("executor", executor, EXECUTORS)

    def apply(params: Params, batch: dict[str, jax.Array], cache: Any) -> tuple[jax.Array, Any]:
        model: Transformer = nnx_compat.merge(structure, params.values)
        mode = "prefill" if batch["tokens"].shape[1] > 1 else "decode"
        ctx = Context(mode=mode, memory=params.memory, memory_segment_ids=params.memory_segment_ids)
        ctx = ctx._replace(executor=executor if mode == "decode" else "masked")
        h, _, cache = model.features(batch, ctx, cache)
        return model.logits(h[:, -1]), cache

    def empty_cache(batch: int, length: int) -> Any:
        return nnx_compat.merge(structure, structure.map(lambda weight: weight.get_value())).empty_cache(batch, length)

    return Decoder(apply, empty_cache)


def encode_prompts(structure: Structure, values: Any, prompts: Sequence[Sequence[int]]) -> Params:
    """Params of an encoder-decoder with encoded prompts; what is generated are continuations of its decoder's start tokens."""
    width = bucket(max(len(prompt) for prompt in prompts))
    tokens, segments = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], segments[row, : len(prompt)] = prompt, 1
    memory = jax.jit(functools.partial(_encode, structure))(values, tokens, segments)
    return Params(values, memory, jnp.asarray(segments))


def _encode(structure: Structure, values: Any, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    batch = {"encoder_tokens": tokens, "encoder_segment_ids": segments}
    ctx, _ = nnx_compat.merge(structure, values).encode(batch, Context(mode="prefill"))
    return ctx.memory


def bucket(length: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The least of `smallest` times 1, 1.5, 2, 3, 4, 6, ... that holds `length`: at most a third of it is padding."""
    size = smallest
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def cache_slots(prompt: int, max_new_tokens: int) -> int:
    """Slots of a cache for prompts of `prompt` tokens (rounded up to their bucket) and their continuations."""
    return bucket(bucket(prompt) + max_new_tokens, SLOTS)


class Chunk(NamedTuple):
    """New tokens int32[B, n] of each row, and how many of them count, int[B]; after its end token a row has none."""

    tokens: np.ndarray
    counts: np.ndarray


class Generated(NamedTuple):
    """Prompts with their continuations: row b is `tokens[b, :lengths[b]]`, an end token included; zeros follow."""

    tokens: np.ndarray  # int32 [B, P + max_new_tokens]
    lengths: np.ndarray  # int32 [B]


class _State(NamedTuple):
    """Between chunks: the newest token of each row [B], new tokens drawn so far, rows that ended [B], the cache."""

    token: jax.Array
    drawn: jax.Array
    done: jax.Array
    cache: Any


class _Loop(NamedTuple):
    column: jax.Array
    tokens: jax.Array  # [B, chunk]
    ends: jax.Array  # [B], columns of each row that count
    state: _State


def _draw(state: _State, logits: jax.Array, rules: dict[str, Any], steps: Steps) -> _State:
    """The next token of every row; a row's n-th depends on its own seed and n alone, not on the company it is sampled in."""
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), state.drawn))(rules["seeds"])
    token = jnp.where(state.done, 0, sample(logits, keys, steps, rules["numbers"]))
    ended = jnp.any(token[:, None] == rules["ends"][None], axis=-1)
    drawn = state.drawn + 1
    return state._replace(token=token, drawn=drawn, done=state.done | ended | (drawn >= rules["most"]))


@functools.partial(jax.jit, static_argnames=("decoder", "slots", "steps"))
def _prefill(
    params: Any, tokens: jax.Array, lengths: jax.Array, rules: dict[str, Any], *, decoder: Decoder, slots: int, steps: Steps
) -> _State:
    rows, width = tokens.shape
    index = jnp.arange(width)[None] - (width - lengths)[:, None]
    batch = {
        "tokens": tokens,
        "positions": jnp.maximum(index, 0).astype(jnp.int32),
        "segment_ids": (index >= 0).astype(jnp.int32),
    }
    logits, cache = decoder.apply(params, batch, decoder.empty_cache(rows, slots))
    start = _State(jnp.zeros(rows, jnp.int32), jnp.int32(0), jnp.zeros(rows, bool), cache)
    return _draw(start, logits, rules, steps)


@functools.partial(jax.jit, static_argnames=("decoder", "chunk", "steps"), donate_argnums=1)
def _decode(
    params: Any, state: _State, lengths: jax.Array, rules: dict[str, Any], *, decoder: Decoder, chunk: int, steps: Steps
) -> tuple[_State, jax.Array, jax.Array, jax.Array]:
    """(state, new tokens [B, chunk], how many of each row count, whether all rows are done)."""
    rows = state.token.shape[0]

    def body(loop: _Loop) -> _Loop:
        state = loop.state
        position = lengths + state.drawn - 1
        batch = {"tokens": state.token[:, None], "positions": position[:, None]}
        logits, cache = decoder.apply(params, batch, state.cache)
        after = _draw(state._replace(cache=cache), logits, rules, steps)
        tokens = jax.lax.dynamic_update_index_in_dim(loop.tokens, after.token, loop.column, axis=1)
        return _Loop(loop.column + 1, tokens, jnp.where(state.done, loop.ends, loop.column + 1), after)

    start = _Loop(jnp.int32(0), jnp.zeros((rows, chunk), jnp.int32), jnp.zeros(rows, jnp.int32), state)
    loop = jax.lax.while_loop(lambda loop: (loop.column < chunk) & ~loop.state.done.all(), body, start)
    return loop.state, loop.tokens, loop.ends, loop.state.done.all()


def stream(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int | Sequence[int] = 0,
    ends: Sequence[int] = (),
    chunk: int = CHUNK,
    slots: int = 0,
) -> Iterator[Chunk]:
    """New tokens as they are decoded: the first alone, when the prompts are prefilled, then `chunk` at a time.

    Args and errors are those of `generate`, raised at the call; stop early by closing the iterator.
      chunk: tokens per dispatch.
      slots: of the cache, where more are wanted than `cache_slots` finds.
    """
    check(len(prompts) > 0, "prompts", prompts, "at least one is needed")
    for index, prompt in enumerate(prompts):
        check(len(prompt) > 0, f"prompts[{index}]", list(prompt), "must hold a token (a begin token or a line break will do)")
    check(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be positive")
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    check(all(0 <= s < 2**32 for s in seeds), "seed", seed, "must lie in 0 .. 2**32 - 1")
    check(len(seeds) == len(prompts), "seed", seed, f"must be a number, or one for each of the {len(prompts)} prompts")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(lengths.max()))), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    slots = max(slots, cache_slots(tokens.shape[1], max_new_tokens))
    # Ids of ends are padded by one that no token has, so that their number keys no compilation.
    stops = np.array([*ends, *[-1] * (-len(ends) % 8 or 8 * (not ends))], np.int32)
    rules = {"seeds": np.asarray(seeds, np.uint32), "ends": stops, "most": np.int32(max_new_tokens)}
    return _chunks(decoder, params, tokens, lengths, {**rules, "numbers": sampling.numbers}, sampling.steps, chunk, slots)


def _chunks(
    decoder: Decoder,
    params: Any,
    tokens: np.ndarray,
    lengths: np.ndarray,
    rules: dict[str, Any],
    steps: Steps,
    chunk: int,
    slots: int,
) -> Iterator[Chunk]:
    state = _prefill(params, tokens, lengths, rules, decoder=decoder, slots=slots, steps=steps)
    first, done = np.array(state.token)[:, None], bool(state.done.all())
    pending = None if done else _decode(params, state, lengths, rules, decoder=decoder, chunk=chunk, steps=steps)
    yield Chunk(first, np.ones(len(lengths), np.int64))
    while pending is not None:
        state, new, counts, finished = pending
        following = _decode(params, state, lengths, rules, decoder=decoder, chunk=chunk, steps=steps)
        yield Chunk(*jax.device_get((new, counts)))
        pending = None if bool(finished) else following


def generate(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int | Sequence[int] = 0,
    ends: Sequence[int] = (),
) -> Generated:
    """Continue prompts by at most `max_new_tokens` tokens each.

    Args:
      decoder: the model, see above.
      params: weights, an argument of the jitted functions.
      prompts: token ids, each at least one.
      max_new_tokens: per prompt.
      sampling: greedy is `Sampling(temperature=0)`.
      seed: one per prompt, or a number s for s, s + 1, ... Row b equals what its prompt alone gives with its seed (up to the
        rounding of the model, which sees other shapes).
      ends: ids that end a row; with none rows run to `max_new_tokens`.
    Raises:
      ConfigError: an empty prompt, no prompts, or seeds that do not match them in number.
    """
    found = list(stream(decoder, params, prompts, max_new_tokens, sampling, seed, ends))
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), int(lengths.max()) + max_new_tokens), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        for chunk in found:
            new = chunk.tokens[row, : chunk.counts[row]]
            tokens[row, lengths[row] : lengths[row] + len(new)] = new
            lengths[row] += len(new)
    return Generated(tokens, lengths.astype(np.int32))
