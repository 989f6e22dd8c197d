"""Llama, Mistral, Qwen, Gemma, GPT-2, OPT, GPT-NeoX against logits of `transformers` (golden/pretrained/record_decoders.py)."""

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax import config_rules, nnx_compat
from sparsejax.context import Context
from sparsejax.io.family import family_of
from sparsejax.io.name_map import Interleaved, Transposed
from sparsejax.io.safetensors_file import open_safetensors, write_safetensors
from sparsejax.io.tensors import TensorInfo
from sparsejax.io.weights import load_values
from sparsejax.io.weights_out import export_tensors, plan_tensors
from sparsejax.models.config import ModelConfig
from sparsejax.models.families.inverse import meaning
from sparsejax.models.families.keys import shortest_period
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError

GOLDEN = Path(__file__).parents[2] / "golden" / "pretrained" / "decoders"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())


class Arrays(NamedTuple):
    """A checkpoint in memory."""

    arrays: dict
    path: Path = Path("memory")

    @property
    def tensors(self):
        return {name: TensorInfo(array.shape, array.dtype) for name, array in self.arrays.items()}

    def read(self, name):
        return self.arrays[name]


def published(case):
    return json.loads((GOLDEN / case / "config.json").read_text(encoding="utf-8"))


def to_config(keys):
    return family_of(keys, "config.json").to_config(keys)


@functools.cache
def loaded(case, dtype="float32"):
    """(family, config, source, structure, values) of a recorded checkpoint."""
    keys = published(case)
    family = family_of(keys, case)
    config, source = family.to_config(keys), open_safetensors(GOLDEN / case)
    return family, config, source, *load_values(config, family, source, dtype=dtype)


@functools.cache
def reference(case):
    with np.load(GOLDEN / case / "reference.npz") as stored:
        return stored["tokens"], stored["logits"]


def forward(structure, values, tokens):
    """Logits; op by op, which shares what it compiles among models of one size."""
    with jax.disable_jit():
        return np.asarray(run(structure, values, tokens))


def run(structure, values, tokens):
    return nnx_compat.merge(structure, values)({"tokens": tokens}, Context(mode="prefill"))[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_reference(case):
    *_, structure, values = loaded(case)
    tokens, expected = reference(case)
    logits = np.asarray(jax.jit(functools.partial(run, structure))(values, tokens))
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_bfloat16_keeps_the_predictions_and_a_float32_residual_stream_more_so():
    # Random models have many near ties: the bar of 99 % equal predictions is for trained ones.
    divergence = {"": [], "float32": []}
    agreement = []
    for case in ("llama", "gemma2", "opt_post_norm", "gpt_neox"):
        family, config, source, *_ = loaded(case)
        tokens, exact = reference(case)
        for residual, found in divergence.items():
            mixed = dataclasses.replace(config, dtype="bfloat16", residual_dtype=residual)
            structure, values = load_values(mixed, family, source, dtype="bfloat16")
            ours = np.asarray(jax.jit(functools.partial(run, structure))(values, tokens))
            log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (exact.astype(np.float64), ours))
            found.append((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
            agreement.append((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    assert max(divergence[""]) <= 1e-3 and np.mean(agreement) >= 0.97
    assert np.mean(divergence["float32"]) < 0.9 * np.mean(divergence[""])


# What each recorded model would compute if one thing were read wrongly.
MISREADINGS = [
    ("llama_scaled_biased", "positions.rope.scaling", "none"),
    ("llama_scaled_biased", "positions.rope.theta", 10_000.0),
    ("llama", "norm.epsilon", 0.1),
    ("llama", "ffn.activation", "geglu"),
    ("mistral", "attention.window", 8),
    ("qwen2_window", "attention_pattern", ("local",)),
    ("qwen2_window", "attention.window", 4),
    ("gemma2", "attention.softcap", 0.0),
    ("gemma2", "head_softcap", 0.0),
    ("gemma2", "attention.scale", 0.0),
    ("gemma2", "attention_pattern", ("global", "local")),
    ("gemma2", "embedding_scale", False),
    ("gemma2", "norm.plus_one", False),
    ("gemma2", "ffn.activation", "geglu"),
    ("gemma3_text", "positions.rope.local_theta", 700.0),
    ("gemma3_text", "positions.rope.scaling", "none"),
    ("gemma3_text", "attention.window", 7),
    ("gpt2", "ffn.activation", "gelu"),
    ("opt", "ffn.activation", "relu2"),
    ("gpt_neox", "positions.rope.fraction", 1.0),
    ("gpt_neox", "block", "pre"),
    ("gpt_neox_sequential", "block", "parallel"),
    ("gpt_neox", "ffn.activation", "gelu_tanh"),
]


@pytest.mark.parametrize(("case", "field", "wrong"), MISREADINGS, ids=lambda value: str(value))
def test_the_reference_logits_would_show_a_misreading(case, field, wrong):
    family, config, source, *_ = loaded(case)
    misread = with_field(config, field, wrong)
    structure, values = load_values(misread, family, source)
    tokens, logits = reference(case)
    assert np.abs(forward(structure, values, tokens) - logits).max() > 1e-4


def with_field(config, field, value):
    changed = copy.deepcopy(config)
    *path, leaf = field.split(".")
    setattr(functools.reduce(getattr, path, changed), leaf, value)
    return changed


@pytest.mark.parametrize("case", CASES)
def test_exported_tensors_are_the_imported_ones_bit_for_bit(case):
    family, config, source, structure, values = loaded(case)
    exported = dict(export_tensors(config, family, structure, values))
    assert set(exported) == set(source.tensors)
    for name, array in exported.items():
        assert array.dtype == source.read(name).dtype
        np.testing.assert_array_equal(array, source.read(name), err_msg=name)


@pytest.mark.parametrize("case", ["gpt2", "gpt_neox", "gemma3_text"])
def test_an_exported_checkpoint_is_imported_bit_for_bit_in_bfloat16_too(case, tmp_path):
    family, config, _, structure, values = loaded(case, "bfloat16")
    write_safetensors(tmp_path / "model", plan_tensors(config, family, structure, values), max_shard_bytes=20_000)
    source = open_safetensors(tmp_path / "model")
    assert {info.dtype for info in source.tensors.values()} == {np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)}
    _, again = load_values(config, family, source, dtype="bfloat16")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), values, again)


def test_what_is_planned_is_what_is_exported():
    family, config, _, structure, values = loaded("gpt_neox")
    exported = dict(export_tensors(config, family, structure, values))
    for name, shape, dtype, produce in plan_tensors(config, family, structure, values):
        array = produce()
        assert (array.shape, array.dtype) == (shape, dtype)
        np.testing.assert_array_equal(array, exported[name])


def test_packed_parameters_are_not_exported():
    family, config, _, structure, values = loaded("llama")
    packed = copy.deepcopy({**values, "embed": {"table": object()}})
    with pytest.raises(ConfigError, match=r"llama checkpoint holds plain arrays.*embed\.table"):
        list(export_tensors(config, family, structure, packed))


@pytest.mark.parametrize("case", CASES)
def test_a_config_read_back_describes_the_same_model(case):
    config = to_config(published(case))
    written = family_of(published(case), case).to_published(config)
    assert json.loads(json.dumps(written)) == written
    assert meaning(to_config(written)) == meaning(config)


@pytest.mark.parametrize("case", CASES)
def test_a_config_from_a_file_keeps_every_rule_of_our_configs(case):
    _, config, _, structure, values = loaded(case)
    config_rules.check_model(config)
    assert parameter_counts(config)["total"] == sum(array.size for array in jax.tree.leaves(values))
    zeros = (config.attention.head_dim, config.attention.num_kv_heads, config.ffn.hidden, config.vocab_size, config.max_length)
    assert all(zeros)


OLD_SPELLINGS = {
    "llama_scaled_biased": {
        "rope_theta": 500.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 16},
    },
    "qwen2": {"rope_theta": 1000000.0, "rope_scaling": None},
    "gemma3_text": {
        "rope_theta": 700.0, "rope_local_base_freq": 90.0, "rope_scaling": {"type": "linear", "factor": 4.0},
        "sliding_window_pattern": 3, "layer_types": None,
    },
    "gpt_neox": {"rotary_emb_base": 300, "rotary_pct": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_SPELLINGS)
def test_the_spelling_of_older_files_means_the_same(case):
    new = published(case)
    old = {key: value for key, value in new.items() if key not in ("rope_parameters", "dtype")}
    old |= OLD_SPELLINGS[case] | {"torch_dtype": "float32"}
    assert to_config(old) == to_config(new)


def test_the_text_part_of_a_model_of_images_is_read_under_both_of_its_spellings():
    family, config, source, _, values = loaded("gemma3_text")
    text = published("gemma3_text")
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "image_token_index": 63}
    assert to_config(whole) == config
    assert family.to_published(config)["model_type"] == "gemma3_text"
    for prefix, vision in (("language_model.model.", "vision_tower."), ("model.language_model.", "model.vision_tower.")):
        arrays = {name.replace("model.", prefix, 1): source.read(name) for name in source.tensors}
        arrays |= {f"{vision}encoder.weight": np.zeros((2, 2), np.int8), "multi_modal_projector.x": np.zeros(1, np.float32)}
        _, again = load_values(config, family_of(whole, "config.json"), Arrays(arrays))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), values, again)


def test_a_text_part_leaves_out_what_is_as_usual():
    given = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
             "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}  # fmt: skip
    config = to_config({"model_type": "gemma3", "text_config": given})
    assert (config.vocab_size, config.attention.num_heads, config.attention.head_dim) == (262208, 8, 256)
    assert config.attention_pattern == ("local",) * 5 + ("global",)
    assert (config.positions.rope.theta, config.positions.rope.local_theta) == (1e6, 1e4)
    assert config.positions.rope.scaling == "linear:8.0"


@pytest.mark.parametrize("case", ["gpt2", "llama", "opt", "gpt_neox"])
def test_a_checkpoint_of_the_base_model_alone_and_buffers_beside_it_are_read(case):
    family, config, source, _, values = loaded(case)
    tied = config.tied_embeddings
    arrays = {name.removeprefix(family.prefix) if tied else name: source.read(name) for name in source.tensors}
    lead = "" if tied else family.prefix
    rotary = "layers.1.self_attn.rotary_emb.inv_freq"
    buffers = {"gpt2": "h.0.attn.bias", "llama": rotary, "gpt_neox": "layers.0.attention.bias"}
    if case in buffers:
        arrays[f"{lead}{buffers[case]}"] = np.ones((1, 1), np.bool_)
    _, again = load_values(config, family, Arrays(arrays))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), values, again)


def test_a_head_under_its_old_and_its_new_name_is_ambiguous():
    family, config, source, *_ = loaded("gpt_neox")
    arrays = {name: source.read(name) for name in source.tensors}
    arrays["lm_head.weight"] = arrays["embed_out.weight"] = np.zeros((64, 16), np.float32)
    with pytest.raises(ConfigError, match="an old and a new name: .*lm_head.weight"):
        load_values(config, family, Arrays(arrays))


REFUSED = [
    ("llama", {"hidden_size": None}, "hidden_size is missing; a llama model needs it"),
    ("llama", {"hidden_size": "16"}, "hidden_size = '16': expected a whole number of at least 1"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide num_attention_heads = 4"),
    ("llama", {"head_dim": None, "num_attention_heads": 6}, "num_attention_heads = 6: must divide hidden_size = 16"),
    ("llama", {"head_dim": 3}, "head_dim = 3: rotary positions need heads of an even size"),
    ("llama", {"hidden_act": "silo"}, "hidden_act .* = 'silo': allowed are .* Did you mean 'silu'"),
    ("llama", {"rms_norm_eps": -1}, "rms_norm_eps = -1: expected a number above 0"),
    ("llama", {"attention_bias": 1}, "attention_bias = 1: expected true or false"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: rope_type .* = 'yarn': allowed are"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, "rope_scaling: rope_type .*'dynamic'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling = .*: rope_parameters is given too"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor = 0.5: expected at least 1"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: a rotation of a part of each head"),
    ("llama", {"rope_parameters": {"mrope_section": [2, 2]}}, "mrope_section = .2, 2.: is not known of a llama model"),
    ("llama", {"residual_multiplier": 0.5}, "residual_multiplier = 0.5: is not known of a llama model"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("mistral", {"attention_bias": True}, "attention_bias = True: is not known of a mistral model"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types = .*: at odds with sliding_window = 7"),
    ("qwen2_window", {"layer_types": ["sliding_attention"]}, "layer_types = .*: expected one name for each of 3 layers"),
    ("qwen2_window", {"layer_types": ["chunked_attention"] * 3}, "layer_types .* = 'chunked_attention': allowed are"),
    ("qwen2_window", {"use_sliding_window": False}, "there are sliding layers, but sliding_window is not in use"),
    ("gemma2", {"hidden_act": "relu"}, "hidden_act = 'relu': at odds with hidden_activation"),
    ("gemma2", {"sliding_window": None}, "sliding_window = None: layers of the type sliding_attention need one"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True: attention in both directions"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0: Gemma 3 has none"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
    ("gpt2", {"n_head": 5}, "n_head = 5: must divide n_embd = 16"),
    ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim = 8: embeddings of another width"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary_pct = None: rotates 3 of the 8 features"),
]


@pytest.mark.parametrize(("case", "change", "message"), REFUSED)
def test_what_cannot_be_computed_is_refused_by_its_key(case, change, message):
    with pytest.raises(ConfigError, match=message):
        to_config(published(case) | change)


def test_keys_that_no_computation_depends_on_are_ignored():
    extra = {"attention_dropout": 0.1, "bos_token_id": 1, "transformers.js_config": {"dtype": "q4"}, "rope_interleaved": False,
             "_attn_implementation_autoset": True, "pretraining_tp": 2, "use_cache": True, "is_llama_config": True}  # fmt: skip
    assert to_config(published("llama") | extra) == to_config(published("llama"))


def test_absent_keys_mean_what_they_mean_in_the_reference():
    absent = {
        "llama": ("tie_word_embeddings", "tied_embeddings", False),
        "gemma2": ("tie_word_embeddings", "tied_embeddings", True),
        "gpt2": ("tie_word_embeddings", "tied_embeddings", True),
        "opt": ("tie_word_embeddings", "tied_embeddings", True),
        "gpt_neox": ("tie_word_embeddings", "tied_embeddings", False),
        "mistral": ("sliding_window", "attention.window", 4096),
        "qwen3": ("head_dim", "attention.head_dim", 128),
    }
    for case, (key, field, value) in absent.items():
        keys = {name: given for name, given in published(case).items() if name != key}
        assert functools.reduce(getattr, field.split("."), to_config(keys)) == value, case
    softcaps = {name: given for name, given in published("gemma2").items() if not name.endswith("softcapping")}
    assert (to_config(softcaps).attention.softcap, to_config(softcaps).head_softcap) == (50.0, 30.0)


NOT_PUBLISHABLE = [
    ("llama", "attention.window", 4, "attention.window = 4"),
    ("llama", "attention.out_bias", True, "attention.out_bias = True"),
    ("llama", "block", "sandwich", "block = 'sandwich'"),
    ("llama", "ffn.activation", "relu", "ffn.activation .* = 'relu'"),
    ("qwen2", "attention.qk_norm", True, "attention.qk_norm = True"),
    ("gemma2", "attention.scale", 0.3, "attention.scale = 0.3"),
    ("gpt2", "attention.scale", 0.3, "attention.scale = 0.3"),
    ("opt", "norm.epsilon", 1e-6, "norm.epsilon = 1e-06"),
    ("opt", "positions.offset", 0, "positions.offset = 0"),
    ("gpt_neox", "ffn.bias", False, "ffn.bias = False"),
]


@pytest.mark.parametrize(("case", "field", "value", "message"), NOT_PUBLISHABLE)
def test_a_model_that_the_family_cannot_say_is_not_written(case, field, value, message):
    family, config, *_ = loaded(case)
    with pytest.raises(ConfigError, match=message):
        family.to_published(with_field(config, field, value))


def test_how_a_model_is_computed_does_not_hinder_writing_it():
    family, config, *_ = loaded("llama")
    same = dataclasses.replace(config, dtype="bfloat16", scan=False, remat="full", unroll=2, init="normal:0.02")
    assert family.to_published(same) == family.to_published(config)
    assert meaning(dataclasses.replace(config, num_layers=5)) != meaning(config)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(["local", "global"]), min_size=1, max_size=9))
def test_the_shortest_period_gives_the_pattern_back(pattern):
    period = shortest_period(pattern)
    assert [period[layer % len(period)] for layer in range(len(pattern))] == pattern
    shorter = (tuple(pattern[:size]) for size in range(1, len(period)))
    assert all([one[layer % len(one)] for layer in range(len(pattern))] != pattern for one in shorter)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_interleaved_maps_come_apart_head_by_head_and_together_again(heads, parts, size, width):
    fused = np.arange(heads * parts * size * width).reshape(heads * parts * size, width)  # torch's [out, in]
    layout = Interleaved(heads, parts, Transposed())
    ours = layout.load([fused])
    for part, kernel in enumerate(ours):
        rows = np.concatenate([fused[(head * parts + part) * size :][:size] for head in range(heads)])
        np.testing.assert_array_equal(kernel, rows.T)
    np.testing.assert_array_equal(layout.save(ours)[0], fused)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_damaged_config_is_read_or_refused_but_never_a_crash(data):
    keys = published(data.draw(st.sampled_from(CASES)))
    key = data.draw(st.sampled_from(sorted(set(keys) - {"model_type"})))
    plain = st.one_of(st.none(), st.booleans(), st.integers(-3, 100), st.floats(), st.text(max_size=3))
    junk = st.one_of(plain, st.lists(plain, max_size=3), st.dictionaries(st.text(max_size=3), plain, max_size=2))
    try:
        config = to_config(keys | {key: data.draw(junk)})
    except ConfigError as error:
        assert "config.json" in str(error) and len(str(error)) < 800
    else:
        assert isinstance(config, ModelConfig)
