"""Every config in configs/, as it resolves. After an intended change: `make golden`, then read the diff of tests/golden."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.entry import load_config
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.config_text import from_json, to_json, to_text
from sparsejax.data.pipeline import build_data
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.rules import use_mesh
from sparsejax.plugs import ConfigError
from sparsejax.train.setup import prepare

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "configs"
SHIPPED = {
    "tiny_relu2", "tiny_swiglu", "tiny_topk", "tiny_ul2", "tiny_mlm", "tiny_everything", "moe_tiny", "qat_int8_tiny",
    "vit_digits", "vit_fashion_mnist", "mqar", "lm_30m", "lm_125m", "lm_350m", "lm_1b", "lm_7b",
    "bench_floor", "relufied_tiny", "prosparse_tiny", "deft_lora_tiny", "qsparse_tiny", "spark_tiny", "finetune_smollm2",
    "sr_ste_tiny",
}
PATHS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def _named(paths):
    return [path.stem for path in paths]


def test_every_shipped_config_has_a_golden_dump_and_the_reverse():
    assert set(_named(PATHS)) == SHIPPED == set(_named(GOLDEN.glob("*.txt")))


@pytest.mark.parametrize("path", PATHS, ids=_named(PATHS))
def test_a_shipped_config_resolves_to_its_golden_dump(path):
    assert to_text(finalize(load_config(str(path)))) == (GOLDEN / f"{path.stem}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", PATHS, ids=_named(PATHS))
def test_a_shipped_config_is_named_after_its_file_and_says_how_to_run_it(path):
    assert load_config(str(path)).name == path.stem
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    verb = "bench train" if path.stem.startswith("bench") else "train"
    for part in (f"python -m experiments.{verb} --config configs/{path.name}", "Hardware: ", "Size: ", "Expected: "):
        assert part in text, part


@pytest.mark.parametrize("path", PATHS, ids=_named(PATHS))
def test_a_resolved_config_survives_json_and_resolves_to_itself(path):
    config = finalize(load_config(str(path)))
    assert from_json(to_json(config), ExperimentConfig) == config
    assert finalize(config, device_count=8) == config


@pytest.mark.parametrize("path", PATHS, ids=_named(PATHS))
def test_a_config_file_gives_a_fresh_config_each_time(path):
    first, second = load_config(str(path)), load_config(str(path))
    first.model.ffn.activation = "changed"
    assert second.model.ffn.activation != "changed"


@pytest.mark.parametrize("name", ["tiny_everything", "lm_7b"])
def test_resolving_touches_no_device(name):
    program = (
        "from experiments.entry import load_config; "
        "from sparsejax.config import finalize; "
        f"finalize(load_config('configs/{name}.py'), device_count=8); "
        "import sys; assert not {'tensorflow', 'torch'} & set(sys.modules)"
    )
    # A platform that does not exist: whatever asks for a device fails.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for stale in set(GOLDEN.glob("*.txt")) - {GOLDEN / f"{path.stem}.txt" for path in PATHS}:
        stale.unlink()
    for path in PATHS:
        (GOLDEN / f"{path.stem}.txt").write_text(to_text(finalize(load_config(str(path)))), encoding="utf-8")
    print(f"wrote {len(PATHS)} dumps to {GOLDEN.relative_to(ROOT)}")


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_a_shipped_config_lowers_to_a_training_step(path):
    base = load_config(str(path))
    if base.init:
        pytest.skip("starts from a model that is not here; see tests/train/test_finetune.py")
    # Meshes for pods are laid over the devices here; the shapes of the parameters and of the step stay those of the config.
    sharded = MeshConfig(data=1, fsdp=8) if base.mesh.fsdp != 1 else MeshConfig()
    config = finalize(dataclasses.replace(base, mesh=sharded))
    try:
        data = build_data(config.data, model_kind=config.model.kind, batch_size=config.batch_size, seed=0)
    except ConfigError as error:
        if "not on this machine" not in str(error):
            raise
        pytest.skip(str(error))
    config = finalize(config, vocab_size=data.vocab_size, num_classes=data.num_classes)
    setup = prepare(config, data.batch_spec())
    for stage in sorted({0, *setup.boundaries}):
        with use_mesh(setup.mesh):
            text = setup.jitted(stage, False).trace(setup.abstract_state, setup.batch_spec).lower().as_text()
        assert "stablehlo" in text
