"""Runs that start from a model: its weights, its tokenizer, what may differ, and what is frozen, saved once and resumed."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import entry
from experiments import train as verb
from sparsejax import nnx_compat
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.context import Context
from sparsejax.data.config import DataConfig
from sparsejax.data.tokenizers import train_bpe
from sparsejax.evaluate.text_generator import TextGenerator
from sparsejax.io.load import load
from sparsejax.io.model import Model
from sparsejax.models.config import AttentionConfig, FFNConfig, ModelConfig
from sparsejax.models.transformer import Transformer
from sparsejax.ops.formats.spec import FormatSpec
from sparsejax.parallel.config import MeshConfig
from sparsejax.plugs import ConfigError
from sparsejax.quantized_arrays import qtensor
from sparsejax.train import run as training
from sparsejax.train.checkpoint import CheckpointError
from sparsejax.train.config import CheckpointConfig, EvaluateConfig, LogConfig, OptimizerConfig
from sparsejax.train.frozen import frozen_digest, save_frozen
from sparsejax.train.partition import joined, partition
from tests.io import tiny_llama

STEPS = 6
BATCH = {"tokens": jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, 16)), jnp.int32)}
LORA = dict(weights=("blocks.*.mlp.{up,down}=lora:2",))
ADAPTER = OptimizerConfig(learning_rate=1e-2, train=("adapter",))

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def base_model(**fields) -> Model:
    """A SwiGLU decoder of three layers, as a loader would give it."""
    own = dict(num_layers=3, d_model=16, vocab_size=40, attention=AttentionConfig(num_heads=2, num_kv_heads=1),
               ffn=FFNConfig(hidden=24, activation="swiglu"), max_length=32, residual_dtype="float32")
    data = DataConfig(source="copy", sequence_length=16)
    config = finalize(ExperimentConfig(model=ModelConfig(**{**own, **fields}), data=data))
    structure, values = nnx_compat.split(Transformer(config.model, jax.random.key(7)))
    return Model("base", config.model, structure, values)


def loader(model):
    """What the verbs pass down, for a model that is in memory."""
    return lambda name, mesh=None: dataclasses.replace(model, values=jax.tree.map(jnp.copy, model.values))


def experiment(model=None, **changes) -> ExperimentConfig:
    fields = dict(
        name="tuned", init="base", steps=STEPS, batch_size=4, model=ModelConfig(**(model or {})), mesh=MeshConfig(data=1),
        data=DataConfig(source="copy", sequence_length=16), optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=2, keep=9), log=LogConfig(every=1, writers=("jsonl",)),
        evaluate=EvaluateConfig(batches=1),
    )  # fmt: skip
    return finalize(ExperimentConfig(**{**fields, **changes}))


@contextlib.contextmanager
def one_device():
    """As on a machine that has no more: a mesh over the simulated ones would be compiled for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a, one=jax.devices()[:1]: one)
        patch.setattr(jax, "device_count", lambda *a: 1)
        yield patch


def run(folder, config, model=None, evaluated=False, **options):
    """Train as the verb does, on one device; what a run does after its last step has tests of its own."""
    with one_device() as patch:
        if not evaluated:
            patch.setattr(training, "finish", lambda *a: {})
            patch.setattr(training, "describe", lambda *a: [])
        return training.train(config, out=folder, loader=loader(model or base_model()), **options)


def parameters(folder) -> dict[str, np.ndarray]:
    """Every parameter of a run by its path, as `--model RUN` loads it."""
    loaded = load(str(folder))
    return {".".join(path): np.asarray(nnx_compat.at(loaded.values, path)) for path in loaded.structure.paths}


def logits(model: Model):
    return np.asarray(jax.jit(lambda v: nnx_compat.merge(model.structure, v)(BATCH, Context(mode="prefill"))[0])(model.values))


def losses(folder):
    return [row["loss"] for row in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A LoRA run of six steps that saved at every second."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    return folder, run(folder, experiment(LORA, optimizer=ADAPTER), evaluated=True)


def test_zero_learning_leaves_the_pretrained_model_bit_for_bit(tmp_path):
    still = OptimizerConfig("sgd", learning_rate=1e-30, weight_decay=0.0, schedule="constant")
    run(tmp_path / "run", experiment(LORA, steps=1, optimizer=still, checkpoint=CheckpointConfig()))
    np.testing.assert_array_equal(logits(load(str(tmp_path / "run"))), logits(base_model()))


def test_only_the_adapters_move_and_the_rest_is_the_base_bit_for_bit(tuned):
    folder, result = tuned
    assert losses(folder)[-1] < losses(folder)[0]
    base = {".".join(path): value for path, value in zip(base_model().structure.paths, jax.tree.leaves([
        nnx_compat.at(base_model().values, path) for path in base_model().structure.paths]), strict=True)}
    found = parameters(folder)
    assert set(found) - set(base) == {name for name in found if ".weights.0." in name} != set()
    for name, value in base.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert all(np.abs(value).max() > 0 for name, value in found.items() if name.endswith("weights.0.b"))
    trained = sum(value.size for name, value in found.items() if ".weights.0." in name)
    counted = result["results"]
    assert counted["trained_parameters"] == trained
    assert counted["parameters"] == sum(value.size for value in found.values())


def test_the_optimizer_holds_moments_of_what_is_trained_alone_and_the_rest_is_saved_once(tuned):
    folder, result = tuned
    tree = json.loads((folder / "checkpoints" / str(STEPS) / "tree.json").read_text())
    names = [row[0] for row in tree["leaves"]]
    moments = [name for name in names if ".mu." in name]
    assert moments and all(".weights.0." in name for name in moments)
    assert not [name for name in names if name.startswith("frozen")]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["2", "4", "6", "frozen"]
    assert frozen_digest(folder / "checkpoints")


def test_a_killed_run_resumes_to_the_same_bits_in_its_folder_and_from_another(tuned, tmp_path):
    folder, _ = tuned
    straight = parameters(folder)
    half = tmp_path / "half"
    run(half, experiment(LORA, optimizer=ADAPTER, steps=STEPS), resume=str(folder / "checkpoints" / "2"))
    found = parameters(half)
    for name, value in straight.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    (folder / "checkpoints" / "6").rename(folder / "checkpoints" / "6.gone")
    run(folder, experiment(LORA, optimizer=ADAPTER))
    (folder / "checkpoints" / "6.gone").rename(tmp_path / "6.gone")
    found = parameters(folder)
    assert all(np.array_equal(found[name], value) for name, value in straight.items())


def test_a_checkpoint_is_refused_around_other_frozen_weights_and_without_them(tuned, tmp_path):
    folder = Path(shutil.copytree(tuned[0], tmp_path / "copy"))
    manifest = folder / "checkpoints" / "frozen" / "0" / "manifest.json"
    save_frozen(tmp_path / "other", base_model(init="normal:0.3").values, print)
    shutil.rmtree(manifest.parent)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(str(folder))
    shutil.copytree(tmp_path / "other" / "frozen" / "0", manifest.parent)
    with pytest.raises(CheckpointError, match="not the weights that"):
        load(str(folder))


@pytest.mark.parametrize("text", ["int8", "nf4:group=8,double"])
def test_a_packed_base_is_frozen_trained_beside_and_loaded_again(tmp_path, text):
    base = base_model(weights=("blocks.**=int8",))

    def pack(weight, value):
        return qtensor(value, FormatSpec.parse(text)) if weight.role == "matrix" else value

    packed = dataclasses.replace(base, values=base.structure.map(pack, base.values))
    config = experiment(dict(weights=("blocks.**=int8|lora:2",)), optimizer=ADAPTER, steps=2)
    run(tmp_path / "run", config, packed)
    loaded = load(str(tmp_path / "run"))
    slot = loaded.values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
    original = packed.values["blocks"]["segments"]["0"]["0"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(slot.codes, original.codes)
    assert str(slot.spec) == text and np.isfinite(logits(loaded)).all()
    assert np.abs(logits(loaded) - logits(packed)).max() > 0


def test_relufication_swaps_the_activation_and_renames_no_parameter(tmp_path):
    config = experiment(dict(ffn=FFNConfig(activation="reglu"), inputs=("blocks.*.mlp.{gate,up}=relu",)), steps=1)
    run(tmp_path / "run", config)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (saved["ffn"]["activation"], saved["num_layers"], saved["d_model"]) == ("reglu", 3, 16)
    assert set(parameters(tmp_path / "run")) == {".".join(path) for path in base_model().structure.paths}
    loaded = load(str(tmp_path / "run"))
    assert loaded.config.inputs == config.model.inputs and np.abs(logits(loaded) - logits(base_model())).max() > 0.01


@pytest.mark.parametrize("fields, message", [
    (dict(d_model=32), "model.d_model = 32: init = 'base' has 16"),
    (dict(num_layers=2), "model.num_layers = 2: init = 'base' has 3"),
    (dict(ffn=FFNConfig(activation="gelu")), "model.ffn.activation = 'gelu': init = 'base' has 'swiglu'"),
    (dict(weights=("blocks.7.**=lora",)), "no linear map has this site"),
    (dict(ffn=FFNConfig(activation="nonsense")), "nonsense"),
])  # fmt: skip
def test_what_would_make_another_model_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ConfigError) as refused:
        run(tmp_path / "run", experiment(fields))
    assert message in str(refused.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("train_only, message", [
    (("adaptor",), "Did you mean 'adapter'"),
    (("adapter",), "selects no parameter"),
    (("blocks.1.mlp.**",), "lie in one array"),
    (("blocks.*.mlp.dwon.kernel",), "down"),
])  # fmt: skip
def test_what_to_train_is_refused_by_name(tmp_path, train_only, message):
    with pytest.raises(ConfigError, match="optimizer.train") as refused:
        run(tmp_path / "run", experiment(optimizer=OptimizerConfig(train=train_only)))
    assert message in str(refused.value)


def test_a_tokenizer_is_not_asked_for_twice_and_init_needs_a_loader(tmp_path):
    with pytest.raises(ConfigError, match="data.tokenizer = 'bpe:300': init = 'base' brings its own"):
        experiment(data=DataConfig(tokenizer="bpe:300", sequence_length=16))
    with pytest.raises(ConfigError, match="cannot load a model"):
        training.train(experiment(), out=tmp_path / "run")


def test_finalizing_a_started_config_again_changes_nothing():
    start = base_model().config
    once = finalize(experiment(LORA), start=start)
    assert finalize(once, start=start) == once == finalize(once)
    assert once.model.weights == LORA["weights"] and once.model.num_layers == 3 and once.data.tokenizer == "init"


def test_globs_select_parameters_and_everything_is_in_one_part():
    base = base_model()
    parts = partition(base.structure, base.values, ("norm", "blocks.*.mlp.down.kernel"))
    assert {w.role for w in parts.trained.variables} == {"norm", "matrix"}
    trained = {".".join(path) for path in parts.trained.paths}
    assert sum("down" in name for name in trained) == 1
    assert len(parts.trained.paths + parts.frozen.paths) == len(base.structure.paths)
    halves = [part.map(lambda _, v: v, base.values) for part in (parts.trained, parts.frozen)]
    assert jax.tree.structure(joined(*halves)) == jax.tree.structure(base.values)


def test_fitted_arrays_are_never_trained():
    base = base_model(inputs=("blocks.*.mlp.down=threshold",))
    parts = partition(base.structure, base.values)
    assert [w.role for w in parts.frozen.variables] == ["fitted"]
    with pytest.raises(ConfigError, match="fitted or packed"):
        partition(base.structure, base.values, ("fitted",))


CONFIG_FILE = """
from sparsejax.config import ExperimentConfig
from sparsejax.data.config import DataConfig
from sparsejax.models.config import ModelConfig
from sparsejax.train.config import EvaluateConfig, OptimizerConfig


def get_config(arg=""):
    return ExperimentConfig(
        name="verb", steps=3, batch_size=8, model=ModelConfig(weights=("blocks.**=lora:2",)),
        data=DataConfig(source="text:" + arg, sequence_length=16),
        optimizer=OptimizerConfig(train=("adapter", "norm")), evaluate=EvaluateConfig(batches=1, sample_tokens=4),
    )
"""


def test_the_verb_fine_tunes_a_published_folder_on_text_and_its_run_generates(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat number {n} sat on mat {n * 7 % 13}, and the dog did not.\n\n" for n in range(400)))
    folder = tiny_llama.write(tmp_path / "llama", eos_token_id=263)
    published = train_bpe([text.read_text()], 264)
    (folder / "tokenizer.json").write_text(published.to_str())
    (tmp_path / "file.py").write_text(CONFIG_FILE)
    flags = [f"--config={tmp_path / 'file.py'}:{text}", f"--config.init={folder}", f"--out={tmp_path / 'run'}"]
    with one_device(), pytest.raises(SystemExit) as left:
        entry.run(verb.main, verb.Flags, argv=["train", *flags, f"--json={tmp_path / 'result.json'}"])
    assert left.value.code == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["finished"] and result["results"]["trained_parameters"] < result["results"]["parameters"]
    assert result["sample"]["prompt"] == "\n" and result["results"]["bits_per_byte"] > 0
    tuned, base = load(str(tmp_path / "run")), load(str(folder))
    assert tuned.tokenizer.fingerprint == base.tokenizer.fingerprint and 263 in TextGenerator(tuned).ends
    np.testing.assert_array_equal(tuned.parameter("blocks.2.mlp.up.kernel"), base.parameter("blocks.2.mlp.up.kernel"))
    assert np.abs(tuned.parameter("norm.gain") - base.parameter("norm.gain")).max() > 0
    with one_device(), pytest.raises(SystemExit) as left:
        entry.run(verb.main, verb.Flags, argv=["train", *flags, "--config.model.num_layers=5"])
    assert left.value.code == 2 and "model.num_layers = 5: init" in capsys.readouterr().err
