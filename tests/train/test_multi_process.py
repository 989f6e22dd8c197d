"""Two processes, one CPU device each, connected through the environment, train as one process does."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import entry
from sparsejax.config import finalize
from sparsejax.data.pipeline import build_data
from sparsejax.train.loop import Trainer
from sparsejax.train.metrics import read_metrics
from sparsejax.train.setup import prepare

ROOT = Path(__file__).parents[2]
FLAGS = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.evaluate.sample_tokens=8", "--config.evaluate.every=8"]


def alone(text: Path, folder: Path, resume: str = "auto") -> Trainer:
    """The same run in this process, on one device."""
    config = entry.load_config(str(ROOT / "tests/train/tiny_run.py"))
    config = finalize(dataclasses.replace(config, data=dataclasses.replace(config.data, source=f"text:{text}")))
    data = build_data(config.data, model_kind="decoder", batch_size=config.batch_size, seed=config.seed)
    trainer = Trainer(prepare(config, data.batch_spec(), devices=jax.devices()[:1]), data, folder)
    folder.mkdir(exist_ok=True)
    trainer.restore(trainer.choose(resume))
    assert trainer.run()
    return trainer


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder) if "loss" in row]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """(text, run folder, what each process printed) of two processes that have shared a run."""
    base = tmp_path_factory.mktemp("together")
    text = base / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.train", "--config=tests/train/tiny_run.py", f"--out={base / 'run'}",
               f"--config.data.source=text:{text}", *FLAGS]
    variables = {**os.environ, "XLA_FLAGS": "", "SPARSEJAX_COORDINATOR": f"127.0.0.1:{port}", "SPARSEJAX_NUM_PROCESSES": "2"}
    workers = [
        subprocess.Popen([*command, f"--json={base / str(index)}.json"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, env={**variables, "SPARSEJAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]
    try:
        printed = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(printed)
    return text, base / "run", printed


def test_two_processes_train_as_one_does(together, tmp_path):
    text, folder, _ = together
    alone(text, tmp_path)
    found, expected = losses(folder), losses(tmp_path)
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(1, 13))
    np.testing.assert_allclose([loss for _, loss in found], [loss for _, loss in expected], rtol=1e-6)


def test_one_process_writes_the_run_folder_and_both_know_the_result(together):
    _, folder, printed = together
    assert "devices: 2 cpu devices: fsdp=2" in printed[0] and "step 12/12" in printed[0]
    assert "step 12/12" not in printed[1] and "devices:" not in printed[1]
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"8", "12"}
    results = [json.loads((folder.parent / f"{index}.json").read_text()) for index in range(2)]
    for name in ("loss", "bits_per_byte", "zero_fraction", "sequences"):
        assert results[0]["results"][name] == results[1]["results"][name]
    assert results[0]["sample"] == results[1]["sample"] and results[0]["finished"]
    assert (folder / "index.html").exists()


def test_one_process_goes_on_from_what_two_have_saved(together, tmp_path):
    text, folder, _ = together
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    shutil.rmtree(copy / "checkpoints" / "12")
    alone(text, copy)
    assert losses(copy)[:8] == losses(folder)[:8]
    np.testing.assert_allclose(losses(copy), losses(folder), atol=1e-5)
