"""Sampling from a model that predicts the next token: prefill, then one jitted loop against a cache.

The model is any function

    apply(params, tokens int32[B, T], positions int32[B, T], cache) -> (logits [B, T or 1, V], cache)

that appends T tokens to the cache; only the logits of the last position are read. All rows of a call stand at the same
positions: prompts of different lengths are prefilled up to the shortest, and the rest of a longer one is fed token by token
while the others already sample. So a cache needs one write position, no row ever holds padding, and what holds for keys
and values holds for ring buffers and recurrent states as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparsejax.plugs import check

Apply = Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
InitCache = Callable[[int, int], Any]


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from its logits: temperature first, then top-k, then top-p of what is left.

    temperature: divides the logits; 0 takes the most likely token (greedy).
    top_k: exactly this many candidates are kept, ties by token id; 0: all.
    top_p: the fewest candidates whose probability together reaches top_p (Holtzman et al. 2020, arXiv 1904.09751).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check(self.temperature >= 0 and math.isfinite(self.temperature), "temperature", self.temperature, "must be 0 or more")
        check(self.top_k >= 0, "top_k", self.top_k, "must be 0 (all) or more")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")


def sample(logits: Float[Array, "B V"], keys: Array, sampling: Sampling) -> Int[Array, " B"]:
    """One token per row.

    Args:
      logits: unnormalised, any float type; computed in float32.
      keys: one random key per row, [B].
      sampling: how; top_k beyond V keeps all.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k == 0 and sampling.top_p == 1:
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    vocab_size = logits.shape[-1]
    ranked, tokens = jax.lax.top_k(logits, min(sampling.top_k or vocab_size, vocab_size))
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability  # mass of the likelier candidates: 0 for the first, which stays
    choice = jax.vmap(jax.random.categorical)(keys, jnp.where(before < sampling.top_p, ranked, -jnp.inf))
    return jnp.take_along_axis(tokens, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)


class Generated(NamedTuple):
    """Prompts with their continuations: row b is `tokens[b, :lengths[b]]`, an end token included; zeros follow."""

    tokens: np.ndarray  # int32 [B, P + max_new_tokens]
    lengths: np.ndarray  # int32 [B]


class _Loop(NamedTuple):
    column: jax.Array  # the next column to be filled
    tokens: jax.Array  # [B, S]
    ends: jax.Array  # [B], length of each row so far
    done: jax.Array  # [B]
    cache: Any


@functools.partial(jax.jit, static_argnames=("apply", "init_cache", "prefill", "max_new_tokens", "end", "sampling"))
def _generate(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    seeds: jax.Array,
    *,
    apply: Apply,
    init_cache: InitCache,
    prefill: int,
    max_new_tokens: int,
    end: int,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    batch, width = tokens.shape
    row_keys = jax.vmap(jax.random.key)(seeds)

    def fill(loop: _Loop, logits: jax.Array) -> _Loop:
        """Write column t: the prompt's token while the row's prompt lasts, else one sampled from the logits."""
        t = loop.column
        # A row's n-th new token depends on its own seed and n alone, not on the company it is sampled in.
        keys = jax.vmap(jax.random.fold_in)(row_keys, jnp.maximum(t - lengths, 0))
        given = jax.lax.dynamic_index_in_dim(loop.tokens, t, axis=1, keepdims=False)
        new = (t >= lengths) & ~loop.done
        token = jnp.where(t < lengths, given, jnp.where(new, sample(logits, keys, sampling), 0))
        ends = jnp.where(new, t + 1, loop.ends)
        done = loop.done | (new & ((token == end) | (ends >= lengths + max_new_tokens)))
        filled = jax.lax.dynamic_update_index_in_dim(loop.tokens, token, t, axis=1)
        return _Loop(t + 1, filled, ends, done, loop.cache)

    def body(loop: _Loop) -> _Loop:
        last = loop.column - 1
        token = jax.lax.dynamic_slice_in_dim(loop.tokens, last, 1, axis=1)
        logits, cache = apply(params, token, jnp.full((batch, 1), last, jnp.int32), loop.cache)
        return fill(loop._replace(cache=cache), logits[:, -1])

    positions = jnp.broadcast_to(jnp.arange(prefill, dtype=jnp.int32), (batch, prefill))
    logits, cache = apply(params, tokens[:, :prefill], positions, init_cache(batch, width))
    start = _Loop(jnp.int32(prefill), tokens, lengths, jnp.zeros(batch, bool), cache)
    loop = jax.lax.while_loop(lambda loop: (loop.column < width) & ~loop.done.all(), body, fill(start, logits[:, -1]))
    return loop.tokens, loop.ends


def generate(
    apply: Apply,
    init_cache: InitCache,
    params: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int | Sequence[int] = 0,
    end: int | None = None,
) -> Generated:
    """Continue prompts by at most `max_new_tokens` tokens each.

    Args:
      apply: the model, see above. It and `init_cache` key the compilation, so pass the same objects from call to call.
      init_cache: (batch size, length) -> an empty cache; called inside jit.
      params: weights, an argument of the jitted loop.
      prompts: token ids, each at least one.
      max_new_tokens: per prompt.
      sampling: greedy is `Sampling(temperature=0)`.
      seed: one per prompt, or a number s for s, s + 1, ... Row b equals what its prompt alone gives with its seed (up to the
        rounding of the model, which sees other batch shapes).
      end: the id that ends a row; None: rows run to `max_new_tokens`.
    Raises:
      ConfigError: an empty prompt, no prompts, or seeds that do not match them in number.
    """
    check(len(prompts) > 0, "prompts", prompts, "at least one is needed")
    for index, prompt in enumerate(prompts):
        check(len(prompt) > 0, f"prompts[{index}]", list(prompt), "must hold a token (a begin token or a line break will do)")
    check(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be positive")
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    check(all(0 <= s < 2**32 for s in seeds), "seed", seed, "must lie in 0 .. 2**32 - 1")
    check(len(seeds) == len(prompts), "seed", seed, f"must be a number, or one for each of the {len(prompts)} prompts")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), int(lengths.max()) + max_new_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    filled, ends = _generate(
        params,
        tokens,
        lengths,
        np.asarray(seeds, np.uint32),
        apply=apply,
        init_cache=init_cache,
        prefill=int(lengths.min()),
        max_new_tokens=max_new_tokens,
        end=-1 if end is None else end,
        sampling=sampling,
    )
    return Generated(*jax.device_get((filled, ends)))


class Tokenizer(Protocol):
    """What `generate_text` asks of a tokenizer."""

    def encode(self, text: str) -> Any: ...

    def decode(self, ids: Any, /) -> str: ...


def generate_text(
    apply: Apply,
    init_cache: InitCache,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    seed: int | Sequence[int] = 0,
    end: int | None = None,
) -> list[str]:
    """The continuations of text prompts, without the prompts and without the end token; arguments as in `generate`."""
    encoded = [list(map(int, tokenizer.encode(prompt))) for prompt in prompts]
    generated = generate(apply, init_cache, params, encoded, max_new_tokens, sampling, seed, end)
    texts = []
    for prompt, row, length in zip(encoded, generated.tokens, generated.lengths, strict=True):
        new = row[len(prompt) : length].tolist()
        texts.append(tokenizer.decode(new[:-1] if end is not None and new[-1:] == [end] else new))
    return texts
