"""Published tensors into a model: every number in its place, on any mesh, and nothing accepted that does not fit."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sparsejax.io.family import family_of
from sparsejax.io.load import load
from sparsejax.io.safetensors_file import open_safetensors
from sparsejax.io.weights import load_values
from sparsejax.io.weights_out import export_tensors
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError
from tests.io import tiny_llama


def values_of(folder, **options):
    family = family_of(tiny_llama.CONFIG, "config.json")
    config = family.to_config(tiny_llama.CONFIG)
    return config, family, *load_values(config, family, open_safetensors(folder), **options)


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    return str(caught.value)


def test_layers_are_stacked_in_order_and_matrices_transposed(tmp_path):
    arrays = tiny_llama.tensors()
    *_, values = values_of(tiny_llama.write(tmp_path / "m", arrays))
    stacked = values["blocks"]["segments"]["0"]["0"]
    for layer in range(3):
        expected = arrays[f"model.layers.{layer}.mlp.down_proj.weight"].T
        np.testing.assert_array_equal(stacked["mlp"]["down"]["kernel"][layer], expected)
    np.testing.assert_array_equal(values["embed"]["table"], arrays["model.embed_tokens.weight"])


def test_export_gives_back_every_tensor(tmp_path):
    arrays = tiny_llama.tensors()
    exported = dict(export_tensors(*values_of(tiny_llama.write(tmp_path / "m", arrays))))
    assert exported.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(exported[name], array)


@pytest.mark.parametrize("mesh", [dict(fsdp=4, tensor=2), dict(data=8), dict(tensor=4, data=2)])
def test_a_mesh_gets_the_same_numbers_in_shards(tmp_path, mesh):
    folder = tiny_llama.write(tmp_path / "m")
    *_, whole = values_of(folder)
    *_, cut = values_of(folder, mesh=make_mesh(MeshConfig(**mesh)))
    jax.tree.map(np.testing.assert_array_equal, whole, cut)
    kernel = cut["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
    ways = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size * ways == kernel.size


def test_bfloat16_rounds_matrices_and_leaves_norms(tmp_path):
    arrays = tiny_llama.tensors()
    *_, values = values_of(tiny_llama.write(tmp_path / "m", arrays), dtype="bfloat16")
    expected = arrays["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.asarray(values["embed"]["table"]), expected)
    assert values["norm"]["gain"].dtype == jnp.float32


def test_missing_and_unknown_tensors_are_listed(tmp_path):
    arrays = tiny_llama.tensors()
    del arrays["model.layers.1.mlp.up_proj.weight"], arrays["model.norm.weight"]
    message = refusal(tiny_llama.write(tmp_path / "missing", arrays))
    assert "missing" in message and "model.layers.1.mlp.up_proj.weight" in message and "model.norm.weight" in message
    arrays = {**tiny_llama.tensors(), "model.layers.3.mlp.up_proj.weight": np.zeros((24, 16), np.float32)}
    assert "no part of a llama model reads: model.layers.3.mlp.up_proj" in refusal(tiny_llama.write(tmp_path / "more", arrays))


def test_wrong_shapes_and_types_are_listed_before_anything_is_read(tmp_path):
    arrays = tiny_llama.tensors()
    arrays["model.layers.0.self_attn.k_proj.weight"] = np.zeros((16, 16), np.float32)
    arrays["model.norm.weight"] = np.zeros(16, np.int32)
    message = refusal(tiny_llama.write(tmp_path / "m", arrays))
    assert "model.layers.0.self_attn.k_proj.weight [16, 16] for blocks.0.attn.k.kernel [16, 8]" in message
    assert "model.norm.weight is int32" in message


def test_a_file_with_fewer_tensors_than_layers_is_refused_at_once(tmp_path):
    assert "layers = 10000000" in refusal(tiny_llama.write(tmp_path / "m", num_hidden_layers=10**7))


def test_nan_is_found_by_name(tmp_path):
    arrays = tiny_llama.tensors()
    arrays["model.layers.2.mlp.gate_proj.weight"][3, 4] = np.nan
    assert "NaN in: model.layers.2.mlp.gate_proj.weight" in refusal(tiny_llama.write(tmp_path / "m", arrays))


def test_a_repeated_head_must_equal_the_embedding_it_is_tied_to(tmp_path):
    arrays = tiny_llama.tensors()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    same = load(str(tiny_llama.write(tmp_path / "same", arrays)))
    assert "head" not in same.values
    arrays["lm_head.weight"][0, 0] += 1
    assert "lm_head.weight" in refusal(tiny_llama.write(tmp_path / "other", arrays))
    untied = load(str(tiny_llama.write(tmp_path / "untied", arrays, tie_word_embeddings=False)))
    np.testing.assert_array_equal(untied.values["head"]["kernel"], arrays["lm_head.weight"].T)


def test_the_base_model_alone_leaves_its_prefix_out(tmp_path):
    arrays = {name.removeprefix("model."): array for name, array in tiny_llama.tensors().items()}
    bare, full = (load(str(tiny_llama.write(tmp_path / n, a))) for n, a in (("bare", arrays), ("full", None)))
    jax.tree.map(np.testing.assert_array_equal, bare.values, full.values)
