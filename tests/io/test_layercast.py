"""LayerCast: linear maps in bfloat16, everything computed in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import entry
from sparsejax import nnx_compat
from sparsejax.context import Context
from sparsejax.evaluate.generate import decoder
from sparsejax.io import model_folder
from sparsejax.io.load import load
from sparsejax.plugs import ConfigError
from tests.io import tiny_llama

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_llama.write(tmp_path_factory.mktemp("llama") / "m"))


def logits(model):
    def apply(values, tokens):
        module = nnx_compat.merge(model.structure, values)
        return module.logits(module.features({"tokens": tokens}, Context(mode="prefill"))[0])

    return np.asarray(jax.jit(apply)(model.values, TOKENS))


def rounded(model):
    """Its linear maps rounded to bfloat16, in float32."""
    def one(weight, value):
        return value.astype(jnp.bfloat16).astype(jnp.float32) if weight.role == "matrix" else value

    return dataclasses.replace(model, values=model.structure.map(one, model.values))


def test_it_is_the_float32_model_of_rounded_weights_bit_for_bit(folder, tmp_path):
    cast, whole = load(folder, dtype="layercast"), load(folder)
    assert cast.config == whole.config
    dtypes = {path[-1]: nnx_compat.at(cast.values, path).dtype for path in cast.structure.paths}
    assert dtypes == {"kernel": jnp.bfloat16, "table": jnp.float32, "gain": jnp.float32}
    expected = logits(rounded(whole))
    np.testing.assert_array_equal(logits(cast), expected)
    assert np.abs(logits(whole) - expected).max() > 1e-4
    model_folder.save(whole, tmp_path / "m")
    np.testing.assert_array_equal(logits(load(str(tmp_path / "m"), dtype="layercast")), expected)


def test_generation_keeps_a_float32_cache(folder):
    model = load(folder, dtype="layercast")
    cache = jax.eval_shape(lambda: decoder(model.structure).empty_cache(1, 16))
    assert {leaf.dtype for leaf in jax.tree.leaves(cache) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {jnp.dtype("float32")}


def test_a_verb_multiplies_in_full_precision(monkeypatch):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    entry.computing_in("bfloat16")
    assert not changed
    entry.computing_in("layercast")
    assert changed == {"jax_default_matmul_precision": "float32"}
    with pytest.raises(ConfigError, match="--dtype = 'float16': allowed are .*layercast"):
        entry.computing_in("float16")
