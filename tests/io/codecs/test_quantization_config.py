"""`quantization_config`: what is understood is read back as it was written, everything else is refused by its key."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.io.codecs.stores import EXPORTS, READERS, store_of
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.plugs import ConfigError

MODULE = "model.layers.0.mlp.up_proj"
WRITTEN = [
    EXPORTS["gptq"]({MODULE: FormatSpec.parse("int4:full15,group=128")}, ()).document(),
    EXPORTS["gptq_v2"]({MODULE: FormatSpec.parse("int3:asym,scale=f16")}, ("model.layers.0.mlp.gate_proj",)).document(),
    EXPORTS["awq"]({MODULE: FormatSpec.parse("int4:asym,group=64")}, ("lm_head",)).document(),
    *(EXPORTS["compressed-tensors"]({MODULE: FormatSpec.parse(text)}, ("lm_head",)).document()
      for text in ("int4:group=128", "int8:asym", "fp8_e4m3:block=128x128,scale=f32", "mxfp4", "nvfp4")),
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8"},
]  # fmt: skip
PUBLISHED = [
    # As AutoGPTQ, GPTQModel, AutoAWQ, llm-compressor and transformers write them
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "damp_percent": 0.1, "desc_act": False, "static_groups": False,
     "sym": True, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": "model"},
    {"quant_method": "gptq", "bits": 4, "dynamic": None, "group_size": 128, "desc_act": False, "sym": True, "lm_head": False,
     "checkpoint_format": "gptq_v2", "pack_dtype": "int32", "meta": {"quantizer": ["gptqmodel:2.0"], "damp_percent": 0.1}},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "backend": "autoawq",
     "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None, "modules_to_fuse": None,
     "modules_to_not_convert": None},
    {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
     "ignore": ["lm_head"], "global_compression_ratio": 1.9, "kv_cache_scheme": None, "config_groups": {"group_0": {
         "targets": ["Linear"], "input_activations": None, "output_activations": None,
         "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False,
                     "actorder": "weight", "block_structure": None, "observer": "minmax", "observer_kwargs": {}}}}},
    # W8A8 and FP8_DYNAMIC of llm-compressor
    *({"quant_method": "compressed-tensors", "format": name, "ignore": ["lm_head"], "config_groups": {"group_0": {
        "targets": ["Linear"], "output_activations": None,
        "input_activations": {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "group_size": None,
                              "dynamic": True, "actorder": None, "block_structure": None, "observer": None},
        "weights": {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
                    "actorder": None, "observer": "minmax"}}}} for name, kind in (("int-quantized", "int"),
                                                                                  ("float-quantized", "float"))),
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True},
    {"quant_method": "bitsandbytes", "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
     "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True,
     "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": None,
     "llm_int8_threshold": 6.0, "load_in_8bit": False},
]  # fmt: skip


@pytest.mark.parametrize("document", [*WRITTEN, *PUBLISHED])
def test_what_is_written_here_and_elsewhere_is_read(document):
    store = READERS[document["quant_method"]](document, "c")
    again = READERS[document["quant_method"]](store.document(), "c")
    assert again == store or document["quant_method"] == "awq"  # which keeps the names of plain maps for readers elsewhere
    assert store_of({}, "c") is None and store_of({"quantization_config": document}, "c") == store


@pytest.mark.parametrize(
    ("number", "keys", "message"),
    [
        (0, {"bits": 4.0}, "bits = 4.0: allowed: 2, 3, 4, 8"),
        (0, {"group_size": 0}, "group_size = 0: expected -1 or a positive number"),
        (0, {"dynamic": {"-:.*down": {}}}, "dynamic = .*allowed: None, {}"),
        (2, {"version": "gemv"}, "version = 'gemv': allowed: 'gemm', 'GEMM'"),
        (2, {"zero_point": False}, "zero_point = False: allowed: True"),
        (2, {"bits": 3}, "bits = 3: allowed: 4"),
        (3, {"format": "marlin-24"}, "group_0: format = 'marlin-24': allowed are"),
        (3, {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        (3, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format = 'sparse-24-bitmask': allowed: 'dense'"),
        (3, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        (3, {"ignore": ["re:("]}, "ignore = 're:.': no pattern"),
        (3, {"config_groups": {}}, "config_groups = {}: expected an object of groups"),
        (8, {"load_in_8bit": True}, "load_in_8bit = True"),
        (8, {"bnb_4bit_quant_type": "af4"}, "bnb_4bit_quant_type = 'af4': allowed: 'nf4', 'fp4'"),
    ],
)
def test_what_is_not_understood_is_refused_by_its_key(number, keys, message):
    document = {**WRITTEN[number], **keys}
    for group in document.get("config_groups", {}).values() if "format" in keys else []:
        document["config_groups"] = {"group_0": {key: value for key, value in group.items() if key != "format"}}
    with pytest.raises(ConfigError, match=message):
        store_of({"quantization_config": document}, "folder")


def places(node, path=()):
    """Every place of a JSON value but its root."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats(0, 9) | st.sampled_from(["", "int", "group", "re:(", "gptq"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["format", "weights"]), inner, max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_damaged_config_is_read_or_refused_and_nothing_else(data):
    document = copy.deepcopy(data.draw(st.sampled_from([*WRITTEN, *PUBLISHED])))
    *path, last = data.draw(st.sampled_from(list(places(document))))
    node = document
    for key in path:
        node = node[key]
    node[last] = data.draw(JSON)
    try:
        store = store_of({"quantization_config": document}, "folder")
    except ConfigError as error:
        assert "folder: config.json: quantization_config" in str(error)
        return
    assert store.document()["quant_method"] == document["quant_method"]
