"""Sampling from toy models whose distribution is known: a bigram table, and one whose cache is the whole past."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate.generate import Sampling, generate, generate_text, sample
from sparsejax.plugs import ConfigError

V = 7
GREEDY = Sampling(temperature=0)


def bigram_apply(table, tokens, positions, cache):
    return table[tokens], cache


def no_cache(batch, length):
    return ()


def past_apply(table, tokens, positions, cache):
    """Logits from a decayed sum over all earlier tokens, written at `positions`: wrong if a slot or a position is wrong."""
    cache = jax.lax.dynamic_update_slice_in_dim(cache, tokens, positions[0, 0], axis=1)
    slots = jnp.arange(cache.shape[1])
    age = positions[:, :, None] - slots[None, None, :]
    weight = jnp.where(age >= 0, 0.9 ** jnp.maximum(age, 0), 0.0)
    return jnp.einsum("bts,bsv->btv", weight, table[cache]), cache


def past_cache(batch, length):
    return jnp.full((batch, length), V - 1, jnp.int32)


@pytest.fixture(scope="module")
def table():
    return jax.random.normal(jax.random.key(0), (V, V)) * 2


def test_greedy_follows_the_argmax_of_the_table(table):
    result = generate(bigram_apply, no_cache, table, [[3]], 12, GREEDY)
    expected = [3]
    for _ in range(12):
        expected.append(int(np.argmax(np.asarray(table)[expected[-1]])))
    assert result.tokens[0].tolist() == expected and result.lengths.tolist() == [13]


def test_sampled_transitions_have_the_frequencies_of_the_softmax(table):
    result = generate(bigram_apply, no_cache, table, [[0]] * 128, 100)
    counts = np.zeros((V, V))
    np.add.at(counts, (result.tokens[:, :-1].ravel(), result.tokens[:, 1:].ravel()), 1)
    probability = np.asarray(jax.nn.softmax(table))
    visits = counts.sum(1, keepdims=True)
    error = np.sqrt(probability * (1 - probability) / np.maximum(visits, 1)) + 1 / np.maximum(visits, 1)
    often = visits[:, 0] > 200
    assert often.sum() >= 3
    assert (np.abs(counts / np.maximum(visits, 1) - probability)[often] < 5 * error[often]).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 1, 3]), st.sampled_from([0.2, 0.5, 0.9, 1.0]), st.sampled_from([0.5, 2.0]))
def test_only_the_candidates_of_top_k_and_top_p_are_drawn_with_renormalised_frequencies(seed, top_k, top_p, temperature):
    logits = np.random.default_rng(seed).normal(size=V) * 2
    probability = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-probability)[: top_k or V]
    ranked = probability[order] / probability[order].sum()
    kept = order[np.cumsum(ranked) - ranked < top_p]
    expected = np.zeros(V)
    expected[kept] = probability[kept] / probability[kept].sum()
    draws = 2048
    keys = jax.random.split(jax.random.key(seed), draws)
    tokens = sample(jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1)), keys, Sampling(temperature, top_k, top_p))
    frequency = np.bincount(np.asarray(tokens), minlength=V) / draws
    assert (frequency[expected == 0] == 0).all()
    assert (np.abs(frequency - expected) <= 6 * np.sqrt(expected * (1 - expected) / draws) + 1e-6).all()


def test_top_k_keeps_exactly_k_of_tied_candidates():
    keys = jax.random.split(jax.random.key(0), 500)
    tokens = sample(jnp.zeros((500, V)), keys, Sampling(top_k=2))
    assert set(np.asarray(tokens).tolist()) == {0, 1}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=5)])
def test_ragged_prompts_together_equal_each_prompt_alone(table, sampling):
    prompts = [[1, 2, 3, 4, 5], [6], [2, 0, 2, 1, 1]]
    together = generate(past_apply, past_cache, table, prompts, 6, sampling, seed=[11, 12, 13])
    assert together.lengths.tolist() == [11, 7, 11]
    for row, prompt in enumerate(prompts):
        alone = generate(past_apply, past_cache, table, [prompt], 6, sampling, seed=11 + row)
        length = together.lengths[row]
        assert together.tokens[row, :length].tolist() == alone.tokens[0, :length].tolist()
        assert (together.tokens[row, length:] == 0).all()


def test_cached_decoding_equals_a_full_forward_at_every_step(table):
    tokens = [4, 1]
    while len(tokens) < 10:
        padded = jnp.array([tokens + [0] * (10 - len(tokens))])  # causal: what follows does not matter
        logits, _ = past_apply(table, padded, jnp.arange(10)[None], past_cache(1, 10))
        tokens.append(int(jnp.argmax(logits[0, len(tokens) - 1])))
    assert generate(past_apply, past_cache, table, [[4, 1]], 8, GREEDY).tokens[0].tolist() == tokens


def test_a_row_stops_at_the_end_token_and_the_others_go_on():
    cycle = jnp.log(jnp.roll(jnp.eye(V), 1, axis=1) + 1e-9)  # 0 -> 1 -> 2 ...
    result = generate(bigram_apply, no_cache, cycle, [[3], [0]], 5, GREEDY, end=5)
    assert result.tokens.tolist() == [[3, 4, 5, 0, 0, 0], [0, 1, 2, 3, 4, 5]] and result.lengths.tolist() == [3, 6]


def test_an_end_token_inside_the_prompt_does_not_stop_it():
    cycle = jnp.log(jnp.roll(jnp.eye(V), 1, axis=1) + 1e-9)
    result = generate(bigram_apply, no_cache, cycle, [[5, 5, 0], [1]], 2, GREEDY, end=5)
    assert result.tokens.tolist() == [[5, 5, 0, 1, 2], [1, 2, 3, 0, 0]]


def test_the_loop_ends_early_when_every_row_is_done():
    calls = []

    def counting_apply(table, tokens, positions, cache):
        jax.debug.callback(lambda _: calls.append(1), tokens)
        return table[tokens], cache

    cycle = jnp.log(jnp.roll(jnp.eye(V), 1, axis=1) + 1e-9)
    generate(counting_apply, no_cache, cycle, [[0]], 100, GREEDY, end=3)
    jax.effects_barrier()
    assert len(calls) == 3


def test_a_seed_fixes_the_sample_and_another_seed_changes_it(table):
    run = lambda seed: generate(bigram_apply, no_cache, table, [[0]], 40, seed=seed).tokens.tolist()  # noqa: E731
    assert run(5) == run(5) != run(6)


def test_new_weights_do_not_compile_again(table):
    traces = []

    def traced_apply(table, tokens, positions, cache):
        traces.append(1)
        return table[tokens], cache

    first = generate(traced_apply, no_cache, table, [[0]], 4, GREEDY)
    count = len(traces)
    second = generate(traced_apply, no_cache, -table, [[0]], 4, GREEDY)
    assert len(traces) == count and first.tokens.tolist() != second.tokens.tolist()


class Letters:
    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, tokens):
        return "".join(chr(ord("a") + t) for t in tokens)


def test_text_comes_back_without_prompt_and_end_token():
    cycle = jnp.log(jnp.roll(jnp.eye(V), 1, axis=1) + 1e-9)
    texts = generate_text(bigram_apply, no_cache, cycle, Letters(), ["ab", "d"], 3, GREEDY, end=5)
    assert texts == ["cde", "e"]


def test_unusable_requests_are_refused_by_name(table):
    for prompts, arguments, message in [
        ([[1], []], {}, r"prompts\[1\] = \[\]"),
        ([], {}, "prompts"),
        ([[1]], {"seed": [1, 2]}, "seed"),
        ([[1]], {"seed": -1}, "seed"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            generate(bigram_apply, no_cache, table, prompts, **{"max_new_tokens": 2, **arguments})
    for field, value in [("temperature", -1.0), ("top_k", -2), ("top_p", 0.0)]:
        with pytest.raises(ConfigError, match=field):
            Sampling(**{field: value})
