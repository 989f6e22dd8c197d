"""Generation from toy models whose distribution is known: a bigram table, and one whose cache is the whole past."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate import generate as module
from sparsejax.evaluate.generate import Decoder, bucket, generate, stream
from sparsejax.evaluate.sampling import Sampling, sample
from sparsejax.evaluate.text_stream import TextStream, generate_text, stream_text
from sparsejax.plugs import ConfigError

V = 7
GREEDY = Sampling(temperature=0)


def bigram_apply(table, batch, cache):
    return table[batch["tokens"][:, -1]], cache


def no_cache(batch, length):
    return ()


BIGRAM = Decoder(bigram_apply, no_cache)


def past_apply(table, batch, cache):
    """Logits from a decayed sum over all earlier tokens: wrong if a slot, a position or a padding is wrong."""
    start = cache[0]
    new = batch["tokens"], batch["positions"], batch.get("segment_ids", jnp.ones_like(batch["tokens"]))
    held = [jax.lax.dynamic_update_slice_in_dim(a, b, start, axis=1) for a, b in zip(cache[1:], new, strict=True)]
    age = batch["positions"][:, -1:] - held[1]
    weight = jnp.where((age >= 0) & (held[2] > 0), 0.9 ** jnp.maximum(age, 0), 0.0)
    return jnp.einsum("bs,bsv->bv", weight, table[held[0]]), (start + new[0].shape[1], *held)


def past_cache(batch, length):
    return (jnp.int32(0), *[jnp.zeros((batch, length), jnp.int32)] * 3)


PAST = Decoder(past_apply, past_cache)


def cycle():
    return jnp.log(jnp.roll(jnp.eye(V), 1, axis=1) + 1e-9)  # 0 -> 1 -> 2 ...


@pytest.fixture(scope="module")
def table():
    return jax.random.normal(jax.random.key(0), (V, V)) * 2


def test_greedy_follows_the_argmax_of_the_table(table):
    result = generate(BIGRAM, table, [[3]], 12, GREEDY)
    expected = [3]
    for _ in range(12):
        expected.append(int(np.argmax(np.asarray(table)[expected[-1]])))
    assert result.tokens[0].tolist() == expected and result.lengths.tolist() == [13]


def test_sampled_transitions_have_the_frequencies_of_the_softmax(table):
    result = generate(BIGRAM, table, [[0]] * 128, 100)
    counts = np.zeros((V, V))
    np.add.at(counts, (result.tokens[:, :-1].ravel(), result.tokens[:, 1:].ravel()), 1)
    probability = np.asarray(jax.nn.softmax(table))
    visits = counts.sum(1, keepdims=True)
    error = np.sqrt(probability * (1 - probability) / np.maximum(visits, 1)) + 1 / np.maximum(visits, 1)
    often = visits[:, 0] > 200
    assert often.sum() >= 3
    assert (np.abs(counts / np.maximum(visits, 1) - probability)[often] < 5 * error[often]).all()


def draw(logits, keys, sampling):
    return sample(logits, keys, sampling.steps, sampling.numbers)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([0.2, 0.5, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    st.sampled_from([0.5, 2.0]),
)
def test_only_the_candidates_of_top_k_top_p_and_min_p_are_drawn_with_renormalised_frequencies(
    seed, top_k, top_p, min_p, temperature
):
    logits = np.random.default_rng(seed).normal(size=V) * 2
    probability = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    order = np.argsort(-probability)[: top_k or V]
    ranked = probability[order] / probability[order].sum()
    kept = order[(np.cumsum(ranked) - ranked < top_p) & (ranked >= min_p * ranked[0] * (1 - 1e-6))]
    expected = np.zeros(V)
    expected[kept] = probability[kept] / probability[kept].sum()
    draws = 2048
    keys = jax.random.split(jax.random.key(seed), draws)
    tokens = draw(jnp.tile(jnp.asarray(logits, jnp.float32), (draws, 1)), keys, Sampling(temperature, top_k, top_p, min_p))
    frequency = np.bincount(np.asarray(tokens), minlength=V) / draws
    assert (frequency[expected == 0] == 0).all()
    assert (np.abs(frequency - expected) <= 6 * np.sqrt(expected * (1 - expected) / draws) + 1e-6).all()


def test_top_k_keeps_exactly_k_of_tied_candidates():
    keys = jax.random.split(jax.random.key(0), 500)
    tokens = draw(jnp.zeros((500, V)), keys, Sampling(top_k=2))
    assert set(np.asarray(tokens).tolist()) == {0, 1}


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=5)])
def test_ragged_prompts_together_equal_each_prompt_alone(table, sampling):
    prompts = [[1, 2, 3, 4, 5], [6], [2, 0, 2, 1, 1]]
    together = generate(PAST, table, prompts, 6, sampling, seed=[11, 12, 13])
    assert together.lengths.tolist() == [11, 7, 11]
    for row, prompt in enumerate(prompts):
        alone = generate(PAST, table, [prompt], 6, sampling, seed=11 + row)
        length = together.lengths[row]
        assert together.tokens[row, :length].tolist() == alone.tokens[0, :length].tolist()
        assert (together.tokens[row, length:] == 0).all()


def test_cached_decoding_equals_a_full_forward_at_every_step(table):
    tokens = [4, 1]
    while len(tokens) < 10:
        batch = {"tokens": jnp.array([tokens]), "positions": jnp.arange(len(tokens))[None]}
        tokens.append(int(jnp.argmax(past_apply(table, batch, past_cache(1, 10))[0][0])))
    assert generate(PAST, table, [[4, 1]], 8, GREEDY).tokens[0].tolist() == tokens


def test_a_row_stops_at_an_end_token_and_the_others_go_on():
    result = generate(BIGRAM, cycle(), [[3], [0]], 5, GREEDY, ends=[5])
    assert result.tokens.tolist() == [[3, 4, 5, 0, 0, 0], [0, 1, 2, 3, 4, 5]] and result.lengths.tolist() == [3, 6]
    result = generate(BIGRAM, cycle(), [[3], [0]], 5, GREEDY, ends=[5, 1])
    assert result.lengths.tolist() == [3, 2]


def test_an_end_token_inside_the_prompt_does_not_stop_it():
    result = generate(BIGRAM, cycle(), [[5, 5, 0], [1]], 2, GREEDY, ends=[5])
    assert result.tokens.tolist() == [[5, 5, 0, 1, 2], [1, 2, 3, 0, 0]]


def test_the_loop_ends_early_when_every_row_is_done_and_the_chunk_under_way_does_nothing():
    calls = []

    def counting_apply(table, batch, cache):
        jax.debug.callback(lambda _: calls.append(1), batch["tokens"])
        return bigram_apply(table, batch, cache)

    generate(Decoder(counting_apply, no_cache), cycle(), [[0]], 100, GREEDY, ends=[3])
    jax.effects_barrier()
    assert len(calls) == 3


@pytest.mark.parametrize("most", [1, 2, 8, 9, 10, 23])
def test_chunks_end_where_max_new_tokens_ends(table, most):
    chunks = list(stream(PAST, table, [[1, 2], [3]], most, GREEDY, chunk=4))
    assert [len(chunk.tokens[0]) for chunk in chunks] == [1] + [4] * -(-(most - 1) // 4)
    assert sum(chunk.counts for chunk in chunks).tolist() == [most, most]
    together = [np.concatenate([c.tokens[row, : c.counts[row]] for c in chunks]).tolist() for row in range(2)]
    whole = generate(PAST, table, [[1, 2], [3]], most, GREEDY)
    assert together == [whole.tokens[0, 2:].tolist(), whole.tokens[1, 1 : 1 + most].tolist()]


def test_a_seed_fixes_the_sample_and_another_seed_changes_it(table):
    run = lambda seed: generate(BIGRAM, table, [[0]], 40, seed=seed).tokens.tolist()  # noqa: E731
    assert run(5) == run(5) != run(6)


def test_buckets_grow_by_a_half_and_a_third():
    assert [bucket(n) for n in (1, 32, 33, 48, 49, 64, 65, 97, 200, 1537)] == [32, 32, 48, 48, 64, 64, 96, 128, 256, 2048]
    assert all(n <= bucket(n) <= max(32, 1.5 * n) for n in range(1, 3000))


def test_one_program_serves_all_lengths_of_a_bucket_new_weights_temperatures_seeds_and_ends(table):
    def fresh_apply(table, batch, cache):
        return past_apply(table, batch, cache)

    fresh = Decoder(fresh_apply, past_cache)
    before = module._prefill._cache_size(), module._decode._cache_size()
    for prompt, weights, temperature, seed, ends, most in (
        ([1], table, 0.5, 0, [], 5), ([1, 2, 3], -table, 0.9, 1, [3], 9), ([2] * 32, table, 1.5, 2, [3, 4], 200)
    ):
        generate(fresh, weights, [prompt], most, Sampling(temperature, top_p=0.9), seed, ends)
    assert (module._prefill._cache_size(), module._decode._cache_size()) == (before[0] + 1, before[1] + 1)
    generate(fresh, table, [[2] * 33], 5, Sampling(0.5, top_p=0.9))  # the next bucket: prefill alone is compiled again
    assert (module._prefill._cache_size(), module._decode._cache_size()) == (before[0] + 2, before[1] + 1)


class Letters:
    def encode(self, text):
        return [ord(c) - ord("a") for c in text]

    def decode(self, tokens):
        return "".join(chr(ord("a") + t) for t in tokens)


def test_text_comes_back_without_prompt_end_token_and_stop_string():
    decoder = BIGRAM
    assert generate_text(decoder, cycle(), Letters(), ["ab", "d"], 3, GREEDY, ends=[5]) == ["cde", "e"]
    assert generate_text(decoder, cycle(), Letters(), ["ab", "d"], 5, GREEDY, stop=["ef", "ga"]) == ["cd", ""]
    assert generate_text(decoder, cycle(), Letters(), ["ab", "d"], 5, GREEDY, stop=["ga"]) == ["cdefg", "ef"]


def test_decoding_stops_soon_after_every_row_met_a_stop_string():
    found = list(stream_text(BIGRAM, cycle(), Letters(), [[0], [1]], 1000, GREEDY, stop=["d"]))
    assert len(found) == 3 and sum(counts[0] for _, counts in found) == 5  # the first token, one chunk, what is held back


class Utf8:
    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


@settings(max_examples=60)
@given(
    text=st.text(st.sampled_from("ab\u00e9\u4e16\U0001f600 "), max_size=12),
    stop=st.lists(st.text(st.sampled_from("ab\u00e9 "), min_size=1, max_size=3), max_size=2),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    prompt=st.sampled_from(["", "a", "\u4e16\u4e16\u4e16 b"]),
)
def test_streamed_text_is_whole_characters_up_to_the_first_stop_string(text, stop, cuts, prompt):
    data = text.encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    row = TextStream(Utf8(), Utf8().encode(prompt), stop)
    parts = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        parts.append(row.push(data[low:high]))
        assert "\ufffd" not in parts[-1] and text.startswith(row.text)
    parts.append(row.finish())
    first = min((index for index in (text.find(string) for string in stop) if index >= 0), default=len(text))
    assert "".join(parts) == text[:first] == row.text and row.stopped == any(string in text for string in stop)


def test_text_is_given_out_as_soon_as_it_is_settled():
    row = TextStream(Utf8(), [97], ["STOP"])
    assert [row.push(part) for part in (b"one S", b"TO", b"ry", b"\xe4\xb8", b"\x96", b"ST", b"OP more")] == [
        "one ", "", "STOry", "", "\u4e16", "", ""
    ]
    assert row.stopped and row.finish() == ""
    row = TextStream(Utf8(), [97], ["STOP"])
    assert row.push(b"ST\xe4") == "" and row.finish() == "ST\ufffd"


def test_unusable_requests_are_refused_by_name(table):
    for prompts, arguments, message in [
        ([[1], []], {}, r"prompts\[1\] = \[\]"),
        ([], {}, "prompts"),
        ([[1]], {"seed": [1, 2]}, "seed"),
        ([[1]], {"seed": -1}, "seed"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        with pytest.raises(ConfigError, match=message):
            stream(BIGRAM, table, prompts, **{"max_new_tokens": 2, **arguments})
    for field, value in [("temperature", -1.0), ("top_k", -2), ("top_p", 0.0), ("min_p", 1.5)]:
        with pytest.raises(ConfigError, match=field):
            Sampling(**{field: value})
    with pytest.raises(ConfigError, match=r"stop\[0\]"):
        TextStream(Letters(), [1], [""])
