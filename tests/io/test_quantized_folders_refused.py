"""Quantized Hugging Face folders that are damaged or not understood are refused by tensor and key."""

import json

import numpy as np
import pytest

from sparsejax.io.export_hf import write_hf
from sparsejax.io.load import load
from sparsejax.io.safetensors_file import open_safetensors
from sparsejax.plugs import ConfigError
from tests.io import tiny_llama
from tests.io.quantized import quantized

MAP = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(str(tiny_llama.write(tmp_path_factory.mktemp("plain") / "m")))


def test_a_plain_model_and_an_unknown_store_are_refused(plain, tmp_path):
    with pytest.raises(ConfigError, match="quantized maps = 0"):
        write_hf(plain, tmp_path / "m", store="awq")
    with pytest.raises(ConfigError, match="--format = 'gptqs': allowed are 'compressed-tensors', 'gptq'"):
        write_hf(plain, tmp_path / "m", store="gptqs")


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


def test_activations_that_are_not_rounded_by_token_as_they_come_are_refused_by_key(plain, tmp_path):
    write_hf(quantized(plain, "int8"), tmp_path / "m", store="compressed-tensors")
    path = tmp_path / "m" / "config.json"
    document = json.loads(path.read_text())
    by_token = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
    group = document["quantization_config"]["config_groups"]["group_0"]
    for key, value in {"dynamic": False, "strategy": "tensor", "num_bits": 4, "symmetric": False, "group_size": 32}.items():
        group["input_activations"] = {**by_token, key: value}
        path.write_text(json.dumps(document))
        assert f"config_groups.group_0: input_activations: {key} = {value!r}: allowed" in refusal(tmp_path / "m")
    group |= {"input_activations": None, "output_activations": by_token}
    path.write_text(json.dumps(document))
    assert "quantized outputs of maps; allowed is null" in refusal(tmp_path / "m")
