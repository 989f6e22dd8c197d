"""At which tokens sparsity acts: which targets count, and that masks in one forward are real decoding, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax.io.load
from experiments import entry, evaluate
from sparsejax import nnx_compat
from sparsejax.compress.surgery import Placed, place
from sparsejax.context import Context
from sparsejax.evaluate.scope import Scope
from sparsejax.evaluate.scoring import Row, Scorer
from sparsejax.plugs import ConfigError
from tests.evaluate.tiny_model import random_model, slow_log_probabilities, tokenizer

WINDOW = 20
TEXT = "Colourless green ideas sleep furiously. " * 4


def sparse_model(dense):
    sites = [f"blocks.{layer}.{site}" for layer in range(2) for site in ("attn.q", "attn.o", "mlp.up", "mlp.down")]
    return place(dense, "inputs", {site: Placed("threshold", {"threshold": jnp.float32(0.4)}) for site in sites})


@pytest.mark.parametrize(
    ("text", "keep_first", "sparse", "scored"),
    [("all", 0, 0, 0), ("all", 3, 3, 0), ("from:0.5", 0, 8, 8), ("from:0.25", 6, 6, 6), ("decode", 0, 8, 8)],
)
def test_what_a_scope_means_for_sixteen_tokens(text, keep_first, sparse, scored):
    scope = Scope(text, keep_first)
    assert (scope.first_sparse(16), scope.first_scored(16)) == (sparse, scored)
    mask = scope.sparse(16)
    assert mask is None if sparse == 0 else np.flatnonzero(mask).tolist() == list(range(sparse, 16))


@pytest.mark.parametrize("text", ["half", "from:1", "from:", "from:-0.1", "decode:1", "all:"])
def test_a_scope_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="--scope"):
        Scope(text)


def test_only_targets_predicted_from_sparse_positions_count_also_for_the_dense_baseline(tmp_path, monkeypatch):
    dense = random_model(name="dense")
    models = {"dense": dense, "sparse": sparse_model(dense)}
    monkeypatch.setattr(sparsejax.io.load, "load", lambda name, **_: models[name])
    (tmp_path / "text.txt").write_text(TEXT)
    argv = ["evaluate", "--model=sparse", "--baseline=dense", f"--data=text:{tmp_path / 'text.txt'}", f"--window={WINDOW}"]
    call, _ = entry.parse([*argv, "--limit=3", "--scope=from:0.5", "--keep-first=12"], evaluate.Flags, config=False)
    found = evaluate.main(call)
    record = found["results"][0]
    assert (found["scope"], record["scope"], record["keep_first"]) == ("from:0.5", "from:0.5", 12)
    assert record["tokens"] == 3 * (WINDOW - 1 - 12)
    windows = tokenizer().encode(TEXT)[: 3 * WINDOW].reshape(3, WINDOW)
    log_p = np.array([slow_log_probabilities(dense, row)[np.arange(WINDOW - 1), row[1:]] for row in windows])
    assert record["baseline"]["loss"] == pytest.approx(-log_p[:, 12:].mean(), rel=1e-4)
    assert abs(record["baseline"]["loss_difference"]) > 1e-3
    everything, _ = entry.parse([*argv, "--limit=3"], evaluate.Flags, config=False)
    assert evaluate.main(everything)["results"][0]["tokens"] == 3 * (WINDOW - 1)


def test_scope_decode_in_one_forward_is_decoding_token_by_token_after_a_dense_prompt():
    dense = random_model(max_length=64)
    sparse = sparse_model(dense)
    tokens = np.random.default_rng(0).integers(0, 256, 64)
    scope = Scope("decode")
    first = scope.first_sparse(64)
    masked = Scorer(sparse, scope=scope).score([Row(tokens, first + 1)]).nll[0]

    def start(values):
        model = nnx_compat.merge(dense.structure, values)
        h, _, cache = model.features({"tokens": tokens[None, :first]}, Context(mode="prefill"), model.empty_cache(1, 64))
        return h, cache

    def step(values, token, position, cache):
        model = nnx_compat.merge(sparse.structure, values)
        batch = {"tokens": token, "positions": position, "segment_ids": jnp.ones_like(token)}
        h, _, cache = model.features(batch, Context(mode="decode"), cache)
        return jax.nn.log_softmax(model.logits(h[:, -1])), cache

    _, cache = jax.jit(start)(dense.values)
    step, nll = jax.jit(step), 0.0
    for position in range(first, 63):
        log_p, cache = step(sparse.values, jnp.asarray([[tokens[position]]]), jnp.asarray([[position]]), cache)
        nll -= float(log_p[0, tokens[position + 1]])
    assert nll == pytest.approx(masked, rel=1e-5)
    assert abs(masked - Scorer(sparse).score([Row(tokens, first + 1)]).nll[0]) > 1e-2
