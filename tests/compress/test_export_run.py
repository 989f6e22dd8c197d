"""From a trained run to a packed folder that serves the same bits, through the verb."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import entry, export, train
from sparsejax.arrays import QTensor
from sparsejax.context import Context
from sparsejax.io import model_folder
from sparsejax.nnx_compat import merge
from sparsejax.plugs import ConfigError
from sparsejax.train.load_run import load_run

TOKENS = np.arange(32).reshape(2, 16) % 20
ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--config.steps=2", "--config.optimizer.warmup_steps=0", "--config.model.num_layers=1", "--config.model.d_model=32",
    "--config.batch_size=8", "--config.evaluate.batches=1", "--config.evaluate.every=0", "--config.log.watch_every=0",
    "--config.evaluate.sample_tokens=0", "--config.data.source=copy", "--config.data.sequence_length=16",
    '--config.model.weights=("blocks.*.attn.*=int4", "blocks.**=int8")', "--config.model.inputs=blocks.**=int8",
)


def run(main, flags, *argv, config=True):
    call, _ = entry.parse(["verb", *argv], flags, config=config)
    return main(call)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(train.main, train.Flags, f"--config={ROOT / 'configs/qat_int8_tiny.py'}", *SMALL, f"--out={folder}")
    return folder


def logits(model):
    run = jax.jit(lambda values: merge(model.structure, values)({"tokens": TOKENS}, Context(mode="prefill"))[0])
    return run(model.values)


def test_a_run_is_packed_and_loses_no_bit_of_its_loss(trained, tmp_path):
    out = tmp_path / "packed"
    result = run(export.main, export.Flags, f"--model={trained}", f"--out={out}", config=False)
    assert result["loss_trained"] == result["loss_exported"] and json.dumps(result)
    assert {row["format"] for row in result["kernels"]} == {"int4", "int8"}
    assert result["bytes_after"] < 0.5 * result["bytes_before"]
    model, run_model = model_folder.load(out), load_run(trained)
    kernels = jax.tree.leaves(model.values, is_leaf=lambda v: isinstance(v, QTensor))
    assert sum(isinstance(kernel, QTensor) for kernel in kernels) == len(result["kernels"])
    served, trained_as = logits(model), logits(run_model)
    np.testing.assert_array_equal(served, trained_as)


def test_an_export_that_cannot_be_is_refused(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for argv, message in (
        ([f"--model={tmp_path / 'nothing'}", f"--out={tmp_path / 'a'}"], "neither a known name nor an existing path"),
        ([f"--model={trained}", f"--out={tmp_path / 'full'}"], "is not empty"),
        ([f"--model={trained}"], "--out"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(export.main, export.Flags, *argv, config=False)
