"""Models to folders and back: ours with packed weights and rules, and Hugging Face's."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from sparsejax.arrays import QTensor
from sparsejax.compress.export import packed_values
from sparsejax.compress.export_model import export_model
from sparsejax.compress.hadamard import rotate_online
from sparsejax.context import Context
from sparsejax.data.tokenizers import Bytes, parse_tokenizer
from sparsejax.io import export_hf, model_folder
from sparsejax.io.load import load
from sparsejax.models.transformer import Transformer
from sparsejax.nnx_compat import merge, split
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from tests.io import tiny_llama

TOKENS = np.arange(24).reshape(2, 12) * 7 % 264
RULES = dict(inputs=("blocks.*.mlp.down=topk:0.5",), weights=("blocks.**=int8",))


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return np.asarray(run(model.values))


@pytest.fixture
def model(tmp_path):
    loaded = load(str(tiny_llama.write(tmp_path / "tiny")))
    return dataclasses.replace(loaded, tokenizer=Bytes().build(None, 0, ()), chat_template="{{ messages }}")


@pytest.fixture
def packed(model):
    ruled = model.with_rules(**RULES)
    return dataclasses.replace(ruled, values=packed_values(ruled.structure, ruled.values, "float32"))


def test_packed_weights_and_rules_come_back_and_give_the_same_bits(packed, tmp_path):
    model_folder.save(packed, tmp_path / "out")
    again = load(str(tmp_path / "out"))
    assert again.config == packed.config and again.chat_template == packed.chat_template
    assert again.tokenizer.fingerprint == packed.tokenizer.fingerprint
    kernel = again.values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
    assert isinstance(kernel, QTensor) and str(kernel.spec) == "int8"
    np.testing.assert_array_equal(logits(again), logits(packed))


@pytest.mark.parametrize("text", ["int3:asym,group=24,ragged=tail", "nf4:group=16,double", "nvfp4", "fp8_e4m3:block=16x8"])
def test_a_weight_of_any_format_comes_back_from_its_folder(model, tmp_path, text):
    spec = FormatSpec.parse(text)
    values = jax.tree.map(lambda leaf: leaf, model.values)
    up = values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]
    up["kernel"] = jax.jit(lambda w: qtensor(w, spec))(up["kernel"])
    changed = dataclasses.replace(model, values=values)
    model_folder.save(changed, tmp_path / "out")
    again = load(str(tmp_path / "out"))
    assert again.values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"].spec == spec
    assert jax.tree.structure(again.values) == jax.tree.structure(values)
    jax.tree.map(np.testing.assert_array_equal, again.values, values)
    np.testing.assert_array_equal(logits(again), logits(changed))


KERNEL = "blocks.segments.0.0.mlp.up.kernel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(spec="int8:grup=4"), rf"weights.arrays.{KERNEL}.spec = 'int8:grup=4'.*Did you mean 'group='"),
        (dict(spec=7), "expected the name of a number format"),
        (dict(spec="int4"), rf"{KERNEL}.codes"),
        (dict(spec="int8:tensor"), rf"{KERNEL}.scale"),
        (dict(shape=[16, 4]), rf"{KERNEL}.(codes|scale)"),
        (dict(shape="wide"), "expected the sizes"),
        (dict(zero=3), rf"{KERNEL}.zero = 3: expected an array"),
        (dict(bits=8), "field of QTensor = 'bits'"),
    ],
)
def test_what_a_damaged_description_says_of_a_packed_weight_is_named(packed, tmp_path, change, message):
    model_folder.save(packed, tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    document = json.loads(path.read_text())
    document["weights"]["arrays"][KERNEL].update(change)
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path / "out"))


def test_a_folder_loads_on_a_mesh(packed, tmp_path):
    model_folder.save(packed, tmp_path / "out")
    again = model_folder.load(tmp_path / "out", mesh=make_mesh(MeshConfig(fsdp=2, tensor=2, data=2)))
    codes = again.values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"].codes
    assert codes.addressable_shards[0].data.size * 4 == codes.size
    jax.tree.map(np.testing.assert_array_equal, again.values, packed.values)


def test_rules_for_one_layer_restack_the_same_parameters(model):
    singled = model.with_rules(inputs=("blocks.1.mlp.down=topk:0.999",))
    assert len(singled.structure.paths) > len(model.structure.paths)
    everywhere = singled.with_rules()
    jax.tree.map(np.testing.assert_array_equal, everywhere.values, model.values)
    np.testing.assert_allclose(logits(singled), logits(model), atol=1e-5)
    with pytest.raises(ConfigError, match="Did you mean 'blocks"):
        model.with_rules(inputs=("blocks.*.mlp.dwon=topk:0.5",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=9), "this version reads 1"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["config"].update(num_layerz=2), "Did you mean 'num_layers'"),
        (lambda d: d["config"].update(d_model=32), "config needs"),
        (lambda d: d["weights"]["arrays"].pop("norm.gain"), "missing or unknown parameters"),
        (lambda d: d["weights"]["arrays"]["norm.gain"].update(type="QTensr"), "Did you mean 'QTensor'"),
        (lambda d: d["tokenizer"].update(codec="words"), "allowed are 'bytes'"),
        (lambda d: d["tokenizer"].pop("eos_id"), "eos_id"),
        (lambda d: d["tokenizer"].update(pad_id=10**6), "numbers below vocab_size"),
        (lambda d: d["tokenizer"].update(vocab_size=10**13), "vocab_size"),
        (lambda d: d.update(weights=None), "weights"),
        (lambda d: d.update(source=[1]), "source"),
        (lambda d: d["weights"]["arrays"].update({"norm.gain": "Array"}), "expected an object"),
        (lambda d: d["weights"]["arrays"]["embed.table"].update(type="QTensor", spec="int8"), "parts of a QTensor"),
        (lambda d: d["config"].update(num_layers=-1), "num_layers"),
        (lambda d: d["config"]["attention"].update(num_heads=0), "num_heads"),
    ],
)
def test_what_a_damaged_description_says_is_named(model, tmp_path, change, message):
    model_folder.save(model, tmp_path / "out")
    path = tmp_path / "out" / "model.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path / "out"))


def test_a_folder_in_use_is_left_alone(model, tmp_path):
    (tmp_path / "file").touch()
    for write in (model_folder.save, export_hf.write_hf):
        with pytest.raises(ConfigError, match="is not empty"):
            write(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["file"]


def test_an_exported_hugging_face_folder_is_the_same_model(tmp_path):
    source = tiny_llama.write(tmp_path / "tiny")
    result = export_model(str(source), str(tmp_path / "hf"), format="hf", command="the command")
    assert result["family"] == "llama" and "the command" in (tmp_path / "hf" / "README.md").read_text()
    again, before = load(str(tmp_path / "hf")), load(str(source))
    assert again.config == before.config
    np.testing.assert_array_equal(logits(again), logits(before))


def test_rules_travel_beside_a_hugging_face_config(model, tmp_path):
    ruled = model.with_rules(**RULES)
    exported = export_hf.write_hf(ruled, tmp_path / "hf")
    assert "sparsity_config.json" in exported.files and "compute the dense model" in exported.notes[0]
    again = load(str(tmp_path / "hf"))
    assert (again.config.inputs, again.config.weights) == (RULES["inputs"], RULES["weights"])
    np.testing.assert_array_equal(logits(again), logits(ruled))
    (tmp_path / "hf" / "sparsity_config.json").write_text(json.dumps({"format": 1, "inputs": ["blocks.*.mlp.down"]}))
    with pytest.raises(ConfigError, match="SITE_GLOB=OP"):
        load(str(tmp_path / "hf"))


def test_a_rotation_whose_inverse_is_in_the_kernels_travels_with_a_warning(model, tmp_path):
    rotated = rotate_online(model, {"blocks.0.mlp.down": 1})
    exported = export_hf.write_hf(rotated, tmp_path / "hf")
    assert "readers that do not know it must not run it" in exported.notes[0]
    again = load(str(tmp_path / "hf"))
    assert again.config.inputs == ("blocks.0.mlp.down=hadamard",)
    np.testing.assert_array_equal(logits(again), logits(rotated))


def test_packed_weights_are_refused_by_name_where_the_format_has_none(packed, tmp_path):
    with pytest.raises(ConfigError, match="these are packed: .*kernel"):
        export_hf.write_hf(packed, tmp_path / "hf")


def test_the_byte_tokenizer_exports_as_one_that_gives_the_same_ids(model, tmp_path):
    export_hf.write_hf(model, tmp_path / "hf")
    library = parse_tokenizer((tmp_path / "hf" / "tokenizer.json").read_text(), "tokenizer.json")
    text = "naïve  café\n\t1234 \N{GRINNING FACE} <eos>x"
    ids = library.encode("naïve  café\n\t1234 \N{GRINNING FACE}", add_special_tokens=False).ids
    assert ids == list("naïve  café\n\t1234 \N{GRINNING FACE}".encode())
    assert library.decode(ids) == text.removesuffix(" <eos>x")
    assert library.token_to_id("<eos>") == model.tokenizer.eos_id
    again = load(str(tmp_path / "hf")).tokenizer
    assert (again.eos_id, again.bos_id, again.pad_id) == (258, 257, 256) == (
        model.tokenizer.eos_id, model.tokenizer.bos_id, model.tokenizer.pad_id
    )  # fmt: skip


def test_a_disk_that_fills_up_leaves_no_half_folder(model, tmp_path, monkeypatch):
    written = type(tmp_path).write_text

    def full(path, text, **options):
        if path.name == "config.json":
            raise OSError(28, "No space left on device")
        return written(path, text, **options)

    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(ConfigError, match="No space left"):
        export_hf.write_hf(model, tmp_path / "hf")
    assert not list((tmp_path / "hf").iterdir())


def test_ids_of_special_tokens_are_found_in_the_configs_where_the_tokenizer_names_none(model, tmp_path):
    export_hf.write_hf(model, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (tmp_path / "hf" / "generation_config.json").unlink()
    document = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert document["eos_token_id"] == 258
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**document, "eos_token_id": [17, 258]}))
    assert load(str(tmp_path / "hf")).tokenizer.eos_id == 17


def test_a_run_s_plain_squared_relu_model_is_published_as_arcee(model, tmp_path):
    config = dataclasses.replace(model.config, ffn=dataclasses.replace(model.config.ffn, activation="relu2"))
    structure, values = split(Transformer(config, jax.random.key(0)))
    own = dataclasses.replace(model, config=config, structure=structure, values=values, source={"family": "sparsejax"})
    assert export_hf.write_hf(own, tmp_path / "hf").family == "arcee"
    np.testing.assert_array_equal(logits(load(str(tmp_path / "hf"))), logits(own))


def test_a_config_that_no_family_expresses_is_refused_with_the_reasons(model, tmp_path):
    odd = dataclasses.replace(model, config=dataclasses.replace(model.config, head_softcap=3.0), source={})
    with pytest.raises(ConfigError, match="no published family can express"):
        export_hf.write_hf(odd, tmp_path / "hf")


def test_packed_weights_of_a_run_are_exported_where_the_store_holds_them(packed, tmp_path):
    exported = export_hf.write_hf(packed, tmp_path / "hf", store="compressed-tensors")
    assert "sparsity_config.json" in exported.files  # the rule that trained them
    again = load(str(tmp_path / "hf"))
    assert again.config.weights == packed.config.weights
    np.testing.assert_array_equal(logits(again), logits(packed))
