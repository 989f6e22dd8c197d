"""Scores of rows: what padding, batching, chunks and buckets may not change, and what is never in memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate import scoring
from sparsejax.evaluate.scoring import Row, Scorer, plan_buckets, token_scores
from sparsejax.models.config import PositionConfig, VisionConfig
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import LENGTH, random_model, slow_score


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def scorer(model):
    return Scorer(model, batch=4)


def random_rows(seed, count, lengths=(2, 9, 20, 33, LENGTH + 1)):
    """Of few lengths, since the slow scorer compiles for each."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice(lengths, count)
    return [Row(rng.integers(0, 256, n).astype(np.int32), int(rng.integers(1, n))) for n in lengths]


@settings(max_examples=5)
@given(st.integers(0, 1000), st.sampled_from([1, 7, 11]))
def test_rows_together_score_as_each_alone_without_padding(model, scorer, seed, count):
    rows = random_rows(seed, count)
    found = scorer.score(rows)
    for row, nll, greedy in zip(rows, *found, strict=True):
        expected, hit = slow_score(model, row.tokens, row.start)
        np.testing.assert_allclose(nll, expected, rtol=2e-5)
        assert greedy == hit


@pytest.mark.parametrize("positions", ["rope", "relative", "none"])
def test_padding_is_not_seen_whatever_the_positions(positions):
    model = random_model(positions=PositionConfig(kind=positions), num_layers=1)
    rows = random_rows(5, 4, lengths=(9,))
    for row, nll in zip(rows, Scorer(model).score(rows).nll, strict=True):
        np.testing.assert_allclose(nll, slow_score(model, row.tokens, row.start)[0], rtol=2e-5)


def test_the_experts_of_a_mixture_do_not_see_the_padding():
    model = random_model(feed_pattern=("moe:experts=4,k=2,capacity=1.0",), num_layers=1)
    rows = random_rows(6, 5, lengths=(9,))
    for row, nll in zip(rows, Scorer(model, batch=5).score(rows).nll, strict=True):
        np.testing.assert_allclose(nll, slow_score(model, row.tokens, row.start)[0], rtol=2e-5)


def test_each_bucket_is_compiled_once_and_new_weights_compile_nothing(model, monkeypatch):
    monkeypatch.setitem(scoring.COMPILE_TOKENS, "cpu", 20)
    rows = random_rows(0, 30)
    scorer = Scorer(model, batch=3)
    buckets = plan_buckets(rows, 3, LENGTH, "cpu")
    assert len(buckets) > 1
    first = scorer.score(rows)
    assert sorted(scorer.compiled_shapes) == sorted((b.batch, b.length, b.scored) for b in buckets)
    scorer.model = dataclasses.replace(model, values=jax.tree.map(lambda a: -a, model.values))
    second = scorer.score(rows)
    assert len(scorer.compiled_shapes) == len(buckets)
    assert not np.allclose(first.nll, second.nll)


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(2, LENGTH + 1), st.integers(1, 60)), min_size=1, max_size=40),
    st.integers(0, 9),
    st.sampled_from([1, 100, 10_000]),
)
def test_buckets_hold_every_row_once_and_cost_no_more_than_one_bucket_or_one_per_length(shapes, batch, compile_tokens):
    rows = [Row(np.zeros(n, np.int32), min(start, n - 1)) for n, start in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scoring.COMPILE_TOKENS, "cpu", compile_tokens)
        buckets = plan_buckets(rows, batch, LENGTH, "cpu")
    assert sorted(i for bucket in buckets for i in bucket.rows) == list(range(len(rows)))
    for bucket in buckets:
        assert bucket.length <= LENGTH and bucket.batch <= (batch or bucket.batch)
        for row in (rows[i] for i in bucket.rows):
            assert len(row.tokens) - 1 <= bucket.length and len(row.tokens) - row.start <= bucket.scored
    needed = [min(-(-(len(row.tokens) - 1) // 16) * 16, LENGTH) for row in rows]
    cost = sum(len(bucket.rows) * bucket.length + compile_tokens for bucket in buckets)
    assert cost <= len(rows) * max(needed) + compile_tokens
    assert cost <= sum(needed) + compile_tokens * len(set(needed))


def test_pieces_of_the_head_give_what_the_whole_gives_ties_included(monkeypatch):
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.normal(size=(37, 5)), jnp.float32)
    table = jnp.asarray(np.round(rng.normal(size=(5, 19))), jnp.float32).at[:, 7].set(0).at[:, 11].set(0)
    targets = jnp.asarray(rng.integers(0, 19, 37))
    head = lambda x: jnp.round(x @ table)  # noqa: E731  (many equal logits)
    whole = token_scores(head, h, targets, 19)
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", 100)
    pieces = token_scores(head, h, targets, 19)
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-6)
    expected = np.asarray(head(h)).argmax(-1) == np.asarray(targets)
    assert expected.any()
    assert (np.asarray(whole[1]) == expected).all() and (np.asarray(pieces[1]) == expected).all()


def test_the_logits_of_a_batch_are_never_whole_and_weights_are_arguments(model, monkeypatch):
    monkeypatch.setitem(scoring.CHUNK_ELEMENTS, "cpu", 264 * 16)
    scorer = Scorer(model)
    tokens = np.zeros((2, LENGTH), np.int32)
    arguments = (model.values, tokens, tokens, tokens, np.ones(tokens.shape, bool))
    traced = jax.make_jaxpr(lambda *a: scorer._trace(*a, whole=True))(*arguments)
    assert max(sizes(traced.jaxpr)) < 2 * LENGTH * 264 / 2
    assert sum(np.size(c) for c in traced.consts) < 1000


def sizes(jaxpr):
    """Elements of every value inside, nested jaxprs included; the vocabulary table is the largest weight."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars)
        nested = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"))
        for inner in (getattr(value, "jaxpr", value) for value in nested):
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_progress_counts_every_token_once(scorer):
    rows, seen = random_rows(3, 9), []
    scorer.score(rows, seen.append)
    assert sum(seen) == sum(len(row.tokens) for row in rows) and len(seen) > 1


def test_no_rows_are_no_work(scorer):
    found = scorer.score([])
    assert len(found.nll) == len(found.greedy) == 0


def test_rows_that_cannot_be_scored_are_refused(scorer):
    tokens = np.zeros(LENGTH + 2, np.int32)
    for row, message in [(Row(tokens, 1), "row 0 = 50"), (Row(tokens[:4], 4), "no token"), (Row(tokens[:4], 0), "no token")]:
        with pytest.raises(ConfigError, match=message):
            scorer.score([row])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kind="encoder"), "kind 'encoder'"),
        (dict(num_classes=3), "a classifier"),
        (dict(head=False), "without an output head"),
        (dict(kind="vit", num_classes=3, vision=VisionConfig()), "a classifier"),
    ],
)
def test_models_that_do_not_predict_the_next_token_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"--model = 'tiny'.*{message}"):
        Scorer(random_model(**changes))
