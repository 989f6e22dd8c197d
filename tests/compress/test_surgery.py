"""Fitted ops at sites: they act as their equations say, keep the scan, and leave what was there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.compress.blocks import INPUTS, Blocks
from sparsejax.compress.surgery import Placed, place, rules_from, sites_of
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError
from tests.compress.tiny import tiny_model

TOKENS = np.arange(48).reshape(2, 24) * 11 % 251


def logits(model, sparsify=None):
    def run(values):
        return merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill", sparsify=sparsify))[0]

    return np.asarray(jax.jit(run)(model.values))


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


def thresholds(config, value):
    sites = sites_of(config, "inputs", "blocks.*.{attn,mlp}.*")
    return {site: Placed("threshold", {"threshold": jnp.float32(value)}) for site in sites}


def test_a_threshold_that_keeps_all_is_the_dense_model_bit_for_bit_and_zero_drops_exact_zeros_alone(dense):
    for value in (-1.0, 0.0):
        np.testing.assert_array_equal(logits(place(dense, "inputs", thresholds(dense.config, value))), logits(dense))


def test_layers_with_other_thresholds_share_one_scanned_program(dense):
    plan = {f"blocks.{i}.mlp.down": Placed("threshold", {"threshold": jnp.float32(t)}) for i, t in enumerate((-1, 0.2, 1e9))}
    fitted = place(dense, "inputs", plan)
    assert fitted.config.inputs == ("blocks.*.mlp.down=threshold",) and fitted.module().blocks.plan == ((1, 3),)
    blocks, h = Blocks(fitted), Blocks(dense).embed(TOKENS)
    kept = [np.mean(blocks.tensors(i, h, "mlp.hidden")[1]["mlp.hidden"] != 0) for i in range(3)]
    assert kept[0] == 1 and 0 < kept[1] < 1 and kept[2] == 0


def test_a_fitted_count_keeps_exactly_that_many_entries_of_the_weighted_score(dense):
    scale = jnp.linspace(0.1, 3, 64)
    plan = {f"blocks.{i}.mlp.down": Placed("topk:fitted=true,score=weighted", {"count": jnp.float32(k), "scale": scale})
            for i, k in enumerate((5, 17, 64))}
    fitted = place(dense, "inputs", plan)
    assert fitted.module().blocks.plan == ((1, 3),)
    h = Blocks(dense).embed(TOKENS)
    for layer, k in enumerate((5, 17, 64)):
        found = Blocks(fitted).tensors(layer, h, "mlp.hidden")[1]["mlp.hidden"]
        whole = Blocks(dense).tensors(layer, h, "mlp.hidden")[1]["mlp.hidden"]
        rank = np.argsort(np.argsort(-np.abs(whole) * np.asarray(scale), axis=-1, kind="stable"), axis=-1)
        np.testing.assert_allclose(found, np.where(rank < k, whole, 0), rtol=1e-6, atol=1e-7)


def test_ops_are_added_behind_those_that_are_there_and_other_sites_stay(dense):
    first = place(dense, "inputs", {"blocks.1.mlp.down": Placed("topk:0.5")})
    assert first.config.inputs == ("blocks.1.mlp.down=topk:0.5",)
    plan = {f"blocks.{i}.mlp.down": Placed("threshold", {"threshold": jnp.float32(0.1 * i)}) for i in range(3)}
    second = place(first, "inputs", plan)
    assert second.config.inputs == (
        "blocks.0.mlp.down=threshold", "blocks.1.mlp.down=topk:0.5|threshold", "blocks.2.mlp.down=threshold")
    assert float(second.parameter("blocks.1.mlp.down.inputs.1.threshold")) == pytest.approx(0.1)


def test_tokens_out_of_scope_are_dense(dense):
    fitted = place(dense, "inputs", thresholds(dense.config, 1e9))
    first = 10
    sparsify = jnp.broadcast_to(jnp.arange(24) >= first, (2, 24))
    found, whole = logits(fitted, sparsify=sparsify), logits(dense)
    np.testing.assert_array_equal(found[:, :first], whole[:, :first])
    assert not np.allclose(found[:, first:], whole[:, first:])


def test_an_identity_on_the_skip_paths_changes_nothing_and_is_stored(dense, tmp_path):
    sites = sites_of(dense.config, "residuals", "blocks.*.residual.*")
    assert len(sites) == 6
    fitted = place(dense, "residuals", {site: Placed("threshold", {"threshold": jnp.float32(-1)}) for site in sites})
    np.testing.assert_array_equal(logits(fitted), logits(dense))
    silent = place(dense, "residuals", {"blocks.2.residual.mlp": Placed("threshold", {"threshold": jnp.float32(1e9)})})
    assert not np.allclose(logits(silent), logits(dense))
    model_folder.save(silent, tmp_path / "out")
    np.testing.assert_array_equal(logits(model_folder.load(tmp_path / "out")), logits(silent))


def test_one_rule_serves_all_layers_that_agree():
    chains = {f"blocks.{i}.attn.q": ("topk:0.5",) for i in range(3)} | {"blocks.0.attn.k": ("a",), "blocks.1.attn.k": ()}
    assert rules_from(chains) == ("blocks.*.attn.q=topk:0.5", "blocks.0.attn.k=a")


def test_unknown_sites_and_missing_arrays_are_refused_by_name(dense):
    with pytest.raises(ConfigError, match=r"blocks\.9\.mlp\.down"):
        place(dense, "inputs", {"blocks.9.mlp.down": Placed("topk:0.5")})
    with pytest.raises(ConfigError, match=r"inputs\.0\.threshold.*no value"):
        place(dense, "inputs", {"blocks.0.mlp.down": Placed("threshold")})
    with pytest.raises(ConfigError, match=r"are no parameters"):
        place(dense, "inputs", {"blocks.0.mlp.down": Placed("topk:0.5", {"count": jnp.float32(1)})})
    with pytest.raises(ConfigError, match="names no site.*blocks"):
        sites_of(dense.config, "inputs", "blocks.*.mlp.dwon")


def test_blocks_run_one_by_one_are_the_model(dense):
    blocks, module = Blocks(dense), dense.module()
    h = blocks.embed(TOKENS)
    for layer in range(len(blocks)):
        left, tensors = blocks.tensors(layer, h, *INPUTS, "mlp.gate_out", "mlp.up_out")
        np.testing.assert_allclose(tensors["mlp.gate_out"] * tensors["mlp.up_out"], tensors["mlp.down"], rtol=1e-5, atol=1e-6)
        h = left
    np.testing.assert_allclose(module.logits(module.norm(h)), logits(dense), rtol=1e-5, atol=1e-5)
    for layer, entering in blocks.stream(TOKENS):
        assert entering.shape == (2, 24, 32) and layer < 3
