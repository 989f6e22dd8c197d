"""Quantized Hugging Face folders: loaded as they are stored, exported so that they read back the same, refused by name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import nnx_compat
from sparsejax.compress.export_model import export_model, require_same_values
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.io.codecs.bitsandbytes import BitsAndBytes
from sparsejax.io.export_hf import write_hf
from sparsejax.io.load import config_of, load
from sparsejax.io.safetensors_file import open_safetensors
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor
from tests.compress.tiny import tiny_model
from tests.io import tiny_llama
from tests.io.quantized import quantized

TOKENS = jnp.arange(8)[None]
MAP = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(str(tiny_llama.write(tmp_path_factory.mktemp("plain") / "m")))


def logits(model):
    run = jax.jit(lambda values: nnx_compat.merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


@pytest.mark.parametrize(
    ("store", "text", "parts"),
    [
        ("gptq", "int4:full15,group=8", {"qweight": "int32[3, 16]", "qzeros": "int32[3, 2]", "scales": "float16[3, 16]"}),
        ("gptq_v2", "int4:asym,scale=f16", {"qzeros": "int32[1, 2]", "g_idx": "int32[24]"}),
        ("awq", "int4:asym,group=8", {"qweight": "int32[24, 2]", "qzeros": "int32[3, 2]", "scales": "float16[3, 16]"}),
        ("compressed-tensors", "int4:asym,group=8", {"weight_packed": "int32[16, 3]", "weight_zero_point": "int32[2, 3]"}),
        ("compressed-tensors", "int8", {"weight": "int8[16, 24]", "weight_scale": "float32[16, 1]"}),
        ("compressed-tensors", "fp8_e4m3", {"weight": "float8_e4m3fn[16, 24]", "weight_scale": "float32[16, 1]"}),
    ],
)  # fmt: skip
def test_a_quantized_model_is_exported_and_read_back_bit_for_bit(plain, tmp_path, store, text, parts):
    model = quantized(plain, text, "" if store == "gptq" else "down")
    assert write_hf(model, tmp_path / "out", store=store).notes
    stored = open_safetensors(tmp_path / "out").tensors
    for suffix, described in parts.items():
        info = stored[f"{MAP}.{suffix}"]
        assert f"{info.dtype}{list(info.shape)}" == described
    assert "model.embed_tokens.weight" in stored and (f"{MAP}.weight" in stored) == ("weight" in parts)
    again = load(str(tmp_path / "out"))
    down = again.values["blocks"]["segments"]["0"]["0"]["mlp"]["down"]["kernel"]
    assert isinstance(down, QTensor) and down.codes.shape[0] == 3 and down.dtype == jnp.float32
    assert again.config == plain.config == dataclasses.replace(config_of(str(tmp_path / "out")), residual_dtype="float32")
    require_same_values(model, again, store)


@pytest.mark.parametrize(
    ("text", "kind", "op"), [("int8:full15", "int", "int8:full15,token"), ("fp8_e4m3", "float", "fp8_e4m3:token")]
)
def test_activations_that_are_rounded_by_token_come_as_rules(plain, tmp_path, text, kind, op):
    model = quantized(plain, text)
    write_hf(model, tmp_path / "m", store="compressed-tensors")
    path = tmp_path / "m" / "config.json"
    document = json.loads(path.read_text())
    activations = {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token", "symmetric": True, "group_size": None,
                   "observer": None, "observer_kwargs": {}}  # fmt: skip
    document["quantization_config"]["config_groups"]["group_0"]["input_activations"] = activations
    path.write_text(json.dumps(document))
    again = load(str(tmp_path / "m"))
    names = [f"attn.{name}" for name in "qkvo"] + [f"mlp.{name}" for name in ("gate", "up", "down")]
    assert sorted(again.config.inputs) == sorted(f"blocks.*.{name}=rounded:{op}" for name in names)
    ruled = model.with_rules({}, inputs=again.config.inputs)
    np.testing.assert_allclose(logits(again), logits(ruled), atol=1e-5)
    assert np.abs(logits(again) - logits(model)).max() > 1e-4


def nibble(stored, place):
    return int(stored) >> 4 * place & 15


def gptq_weight(t, k, n):
    zero = nibble(t["qzeros"][k // 8, n // 8], n % 8) + 1
    return (nibble(t["qweight"][k // 8, n], k % 8) - zero) * float(t["scales"][k // 8, n])


def awq_weight(t, k, n):
    place = [0, 4, 1, 5, 2, 6, 3, 7][n % 8]
    difference = nibble(t["qweight"][k, n // 8], place) - nibble(t["qzeros"][k // 8, n // 8], place)
    return difference * float(t["scales"][k // 8, n])


def compressed_weight(t, k, n):
    difference = nibble(t["weight_packed"][n, k // 8], k % 8) - nibble(t["weight_zero_point"][n // 8, k // 8], n % 8)
    return difference * float(t["weight_scale"][n, k // 8])


@pytest.mark.parametrize(
    ("store", "text", "weight"),
    [
        ("gptq", "int4:full15,group=8", gptq_weight),
        ("awq", "int4:asym,group=8", awq_weight),
        ("compressed-tensors", "int4:asym,group=8", compressed_weight),
    ],
)
def test_what_is_written_says_the_same_to_a_reader_written_from_the_card(plain, tmp_path, store, text, weight):
    model = quantized(plain, text, "down")
    write_hf(model, tmp_path / "m", store=store)
    source = open_safetensors(tmp_path / "m")
    parts = {name.removeprefix(f"{MAP}."): source.read(name) for name in source.tensors if name.startswith(MAP)}
    kernel = model.values["blocks"]["segments"]["0"]["0"]["mlp"]["down"]["kernel"]
    expected = np.asarray(jax.tree.map(lambda part: part[1], kernel).dequantize())
    found = [[weight(parts, k, n) for n in range(16)] for k in range(24)]
    np.testing.assert_array_equal(np.float32(found), expected)


def test_the_verb_exports_what_our_own_folder_holds_packed(plain, tmp_path):
    model_folder.save(quantized(plain, "int4:full15,group=8"), tmp_path / "ours")
    result = export_model(str(tmp_path / "ours"), str(tmp_path / "out"), format="gptq")
    assert result["family"] == "llama" and result["format"] == "gptq" and "README.md" in result["files"]
    with pytest.raises(ConfigError, match="--format = 'gptq_v3'"):
        export_model(str(tmp_path / "ours"), str(tmp_path / "other"), format="gptq_v3")
    before, again = load(str(tmp_path / "ours")), load(str(tmp_path / "out"))
    np.testing.assert_array_equal(logits(again), logits(before))


def test_formats_may_differ_by_map_in_compressed_tensors_alone(plain, tmp_path):
    model = quantized(plain, {"up": "nvfp4", "down": "int4:group=8"})
    write_hf(model, tmp_path / "ct", store="compressed-tensors")
    document = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert document["format"] == "mixed-precision" and document["ignore"] == ["lm_head"]
    formats = [group["format"] for group in document["config_groups"].values()]
    assert sorted(formats) == ["int-quantized", "nvfp4-pack-quantized", "pack-quantized"]
    require_same_values(model, load(str(tmp_path / "ct")), "ct")
    with pytest.raises(ConfigError, match="gptq has one format for all maps"):
        write_hf(model, tmp_path / "gptq", store="gptq")
    assert not (tmp_path / "gptq").exists()


def test_maps_that_stay_plain_are_named_where_the_store_has_a_place_for_them(plain, tmp_path):
    model = quantized(plain, "int4:full15,group=8", "mlp")
    write_hf(model, tmp_path / "gptq", store="gptq")
    document = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert document["modules_in_block_to_quantize"] == [["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]]
    write_hf(model, tmp_path / "awq", store="awq")
    kept = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "lm_head" in kept and "model.layers.2.self_attn.k_proj" in kept
    for name in ("gptq", "awq"):
        require_same_values(model, load(str(tmp_path / name)), name)


def test_experts_are_maps_of_their_own(tmp_path):
    mixture = tiny_model(layers=1, width=16, feed_pattern=("moe:experts=4,k=2,hidden=24",))
    model = quantized(mixture, "int4:asym,group=8", "experts")
    write_hf(model, tmp_path / "m", store="gptq_v2")
    document = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    (inside,) = document["modules_in_block_to_quantize"]
    assert len(inside) == 12 and all(".experts." in name for name in inside)
    require_same_values(model, load(str(tmp_path / "m")), "m")


def test_bitsandbytes_is_read(plain, tmp_path):
    model = quantized(plain, "nf4:group=8,double", "down")
    maps = {f"model.layers.{n}.mlp.down_proj": (n, "down") for n in range(3)}
    kernel = model.values["blocks"]["segments"]["0"]["0"]["mlp"]["down"]["kernel"]
    arrays = {name: array for name, array in tiny_llama.tensors().items() if name.removesuffix(".weight") not in maps}
    for module, (layer, _) in maps.items():
        parts = BitsAndBytes().encode(module, jax.tree.map(lambda part, layer=layer: part[layer], kernel))
        arrays |= {f"{module}.{suffix}": np.ascontiguousarray(part) for suffix, part in parts.items()}
    folder = tiny_llama.write(tmp_path / "bnb", arrays, quantization_config=BitsAndBytes().document())
    again = load(str(folder)).values["blocks"]["segments"]["0"]["0"]["mlp"]["down"]["kernel"]
    assert str(again.spec) == str(kernel.spec)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(kernel))


def test_parts_of_a_map_are_cut_over_a_mesh_and_computed_with_in_any_type(plain, tmp_path):
    write_hf(quantized(plain, "int4:full15,group=8"), tmp_path / "m", store="gptq")
    folder = str(tmp_path / "m")
    kernels = [load(folder, mesh=mesh).values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
               for mesh in (None, make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))]  # fmt: skip
    assert kernels[1].codes.addressable_shards[0].data.size < kernels[1].codes.size
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, kernels))
    half = load(folder, dtype="bfloat16").values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
    assert half.dtype == jnp.bfloat16 and half.dequantize().dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.codes, kernels[0].codes)
