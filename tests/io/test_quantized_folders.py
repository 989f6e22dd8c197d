"""Quantized Hugging Face folders: loaded as they are stored, exported so that they read back the same, refused by name."""

import dataclasses
import functools
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
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import QTensor, qtensor
from tests.io import tiny_llama

TOKENS = jnp.arange(8)[None]
MAP = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(str(tiny_llama.write(tmp_path_factory.mktemp("plain") / "m")))


@functools.cache
def quantizer(text):
    return jax.jit(lambda w: qtensor(w, FormatSpec.parse(text)))


def quantized(model, text, sites=""):
    """The model with the kernels of its blocks in a format, by the map's name where it is a dict."""
    values: dict = {}
    for path in model.structure.paths:
        value, name = nnx_compat.at(model.values, path), ".".join(path)
        if name.endswith("kernel") and name.startswith("blocks") and sites in name:
            value = quantizer(text if isinstance(text, str) else text.get(path[-2], "int8"))(value)
        nnx_compat.put(values, path, value)
    return dataclasses.replace(model, values=values)


def logits(model):
    run = jax.jit(lambda values: nnx_compat.merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


def changed(folder, **keys):
    """The folder with other keys in its `quantization_config`; None takes one out."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"] |= keys
    path.write_text(json.dumps(document))
    return str(folder)


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
    model = quantized(plain, text)
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


def test_a_plain_model_and_an_unknown_store_are_refused(plain, tmp_path):
    with pytest.raises(ConfigError, match="quantized maps = 0"):
        write_hf(plain, tmp_path / "m", store="awq")
    with pytest.raises(ConfigError, match="--format = 'gptqs'.*Did you mean|--format = 'gptqs'"):
        write_hf(plain, tmp_path / "m", store="gptqs")


def test_bitsandbytes_is_read(plain, tmp_path):
    model = quantized(plain, "nf4:group=8,double")
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


@pytest.fixture(scope="module")
def gptq(plain, tmp_path_factory):
    """Stored tensors and config of a GPTQ checkpoint."""
    folder = tmp_path_factory.mktemp("gptq") / "m"
    write_hf(quantized(plain, "int4:full15,group=8"), folder, store="gptq")
    source = open_safetensors(folder)
    document = json.loads((folder / "config.json").read_text())["quantization_config"]
    return {name: np.array(source.read(name)) for name in source.tensors}, document


def refusal(folder):
    with pytest.raises(ConfigError) as caught:
        load(str(folder))
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quant_method": "gptqs"}, "quant_method = 'gptqs': allowed are"),
        ({"quant_method": "eetq"}, "allowed are 'gptq', 'awq', 'compressed-tensors', 'bitsandbytes'"),
        ({"bits": 5}, "bits = 5: allowed: 2, 3, 4, 8"),
        ({"sym": "yes"}, "sym = 'yes'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format = 'marlin': allowed: 'gptq', 'gptq_v2'"),
        ({"group_size": 16}, "expected (1, 3)"),
        ({"rotation": "hadamard"}, "rotation = 'hadamard': is not known and may change what the tensors mean"),
    ],
)
def test_a_quantization_config_that_is_not_understood_is_refused_by_key(gptq, tmp_path, keys, message):
    arrays, document = gptq
    found = refusal(tiny_llama.write(tmp_path / "m", arrays, quantization_config={**document, **keys}))
    assert message in found and str(tmp_path) in found


def test_tensors_that_do_not_fit_are_refused_by_name(gptq, tmp_path):
    arrays, document = gptq
    without = {name: array for name, array in arrays.items() if name != f"{MAP}.scales"}
    assert f"{MAP}.scales is missing" in refusal(tiny_llama.write(tmp_path / "a", without, quantization_config=document))
    scales = arrays[f"{MAP}.scales"].copy()
    scales[0, 0] = np.nan
    damaged = {**arrays, f"{MAP}.scales": scales}
    assert f"NaN in: {MAP}.weight" in refusal(tiny_llama.write(tmp_path / "b", damaged, quantization_config=document))
    mixed = {name: array for name, array in arrays.items() if not name.startswith(f"{MAP}.")}
    mixed[f"{MAP}.weight"] = np.zeros((16, 24), np.float32)
    message = refusal(tiny_llama.write(tmp_path / "c", mixed, quantization_config=document))
    assert f"{MAP}.weight (plain, and model.layers.0.mlp.down_proj.weight, of the same stack" in message
    narrow = {**arrays, f"{MAP}.qweight": arrays[f"{MAP}.qweight"][:, :8]}
    assert "wrong shape" in refusal(tiny_llama.write(tmp_path / "d", narrow, quantization_config=document))


def test_biases_of_zeros_that_no_map_has_are_dropped_and_others_are_not(gptq, tmp_path):
    arrays, document = gptq
    zeros = {**arrays, f"{MAP}.bias": np.zeros(16, np.float16)}
    load(str(tiny_llama.write(tmp_path / "a", zeros, quantization_config=document)))
    ones = {**arrays, f"{MAP}.bias": np.ones(16, np.float16)}
    assert f"reads: {MAP}.bias" in refusal(tiny_llama.write(tmp_path / "b", ones, quantization_config=document))


def test_quantized_activations_are_refused(plain, tmp_path):
    write_hf(quantized(plain, "int8"), tmp_path / "m", store="compressed-tensors")
    groups = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
    changed(tmp_path / "m", config_groups=groups)
    assert "config_groups.group_0: input_activations" in refusal(tmp_path / "m")


def test_parts_of_a_map_are_cut_over_a_mesh(gptq, tmp_path):
    arrays, document = gptq
    folder = str(tiny_llama.write(tmp_path / "m", arrays, quantization_config=document))
    kernels = [load(folder, mesh=mesh).values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
               for mesh in (None, make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))]  # fmt: skip
    assert kernels[1].codes.addressable_shards[0].data.size < kernels[1].codes.size
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, kernels))
