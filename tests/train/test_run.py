"""Whole runs: killed, stopped, resumed, rolled back, evaluated. One small model, on one device unless a test says otherwise."""

import dataclasses
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from experiments import entry
from experiments import train as train_verb
from sparsejax import config_text
from sparsejax.config import ExperimentConfig, finalize
from sparsejax.data.pipeline import DataPipeline, build_data
from sparsejax.parallel.config import MeshConfig
from sparsejax.plugs import ConfigError
from sparsejax.train import checkpoint_files, metrics
from sparsejax.train.checkpoint import CheckpointError, read_record
from sparsejax.train.loop import MAX_ROLLBACKS, Trainer, TrainingStopped
from sparsejax.train.setup import Setup, prepare

ROOT = Path(__file__).parents[2]
CONFIG = "tests/train/tiny_run.py"
STEPS = 12
MEASURED = ("tokens_per_second", "mfu")  # depend on the clock
SETUPS: dict[str, Setup] = {}

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")


def experiment(**changes) -> ExperimentConfig:
    """The tiny config with fields replaced; `checkpoint` is a dict of its fields."""
    config = entry.load_config(str(ROOT / CONFIG))
    checkpoint = dataclasses.replace(config.checkpoint, **changes.pop("checkpoint", {}))
    return finalize(dataclasses.replace(config, checkpoint=checkpoint, **changes))


def trainer(folder: Path, devices: int = 1, **changes) -> Trainer:
    """A trainer in this process; what compiles to the same step is compiled once for all tests."""
    config = experiment(**changes)
    data = build_data(config.data, model_kind=config.model.kind, batch_size=config.batch_size, seed=config.seed)
    policy = config.checkpoint.on_nan.replace("rollback", "stop")
    in_step = dataclasses.replace(config.checkpoint, every=1, keep=1, on_nan=policy)
    key = config_text.to_text(dataclasses.replace(config, checkpoint=in_step)) + str(devices)
    if key not in SETUPS:
        SETUPS[key] = prepare(config, data.batch_spec(), devices=jax.devices()[:devices])
    folder.mkdir(exist_ok=True)
    return Trainer(dataclasses.replace(SETUPS[key], config=config), data, folder)


def run(folder: Path, resume: str = "auto", **options) -> Trainer:
    """Train to the end (or to what stops it)."""
    made = trainer(folder, **options)
    made.restore(made.choose(resume))
    assert made.run()
    return made


def rows(folder: Path) -> list[dict[str, float]]:
    """Every row of metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]


def arrays(folder: Path, step: int = STEPS) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: step, parameters, optimizer, average, guard, key."""
    return ocp.PyTreeCheckpointer().restore((folder / "checkpoints" / str(step) / "state").absolute())


def position(folder: Path, step: int = STEPS) -> dict:
    return read_record(folder / "checkpoints" / str(step)).extra["position"]


def assert_same_bits(a: Path, b: Path) -> None:
    """Same metrics at every step, same parameters, optimizer state and place in the data at the end."""
    assert rows(a) == rows(b)
    assert position(a) == position(b)
    found, expected = arrays(a), arrays(b)
    assert found.keys() == expected.keys() and len(found) > 10
    for name in expected:
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]), err_msg=name)


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to, with checkpoints 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("clean")
    run(folder, checkpoint={"keep": 3})
    return folder


@pytest.fixture
def copy(clean, tmp_path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "copy"))


# Runs in processes of their own, as the command starts them, on one device.

ADAMW = ["--config.optimizer.ema_decay=0.9"]
LION = ["--config.optimizer.name=lion", "--config.optimizer.learning_rate=1e-3", "--config.accumulate=2"]
REFEREE = """
import json, sys
from experiments import entry, train as verb
from sparsejax.train import run
run.finish = run.describe = lambda *arguments: {}  # what a run does after its last step has its own test
for argv in json.loads(sys.argv[1]):
    try:
        entry.run(verb.main, verb.Flags, argv=["train", *argv])
    except SystemExit as left:
        print("status", left.code)
"""


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Runs that were killed, as they were left (NAME_as_left) and resumed; one that was terminated; and straight runs."""
    folder = tmp_path_factory.mktemp("processes")
    options = {"cwd": ROOT, "env": {**os.environ, "XLA_FLAGS": ""}, "text": True}

    def arguments(fault: str, flags: list[str], out: str) -> list[str]:
        return [f"--config={CONFIG}:{fault}", f"--out={folder / out}", f"--json={folder / out}.json", *flags]

    def start(fault: str, flags: list[str]) -> subprocess.Popen:
        command = [sys.executable, "-m", "experiments.train", *arguments(fault, flags, fault)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    process, metrics_file, wanted = start("killed", ADAMW), folder / "killed" / "metrics.jsonl", random.randint(1, STEPS - 2)
    while not metrics_file.exists() or metrics_file.read_text().count("\n") < wanted:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.03))
    process.kill()
    output = {"killed": (process.communicate()[0], process.returncode)}
    process = start("killed_while_saving", LION)
    output["killed_while_saving"] = process.communicate(timeout=120)[0], process.returncode
    for name in output:
        shutil.copytree(folder / name, folder / f"{name}_as_left")

    jobs = [arguments("", ADAMW, "adamw"), arguments("", LION, "lion"), arguments("", ADAMW, "killed"),
            arguments("", LION, "killed_while_saving"), arguments("terminated", ADAMW, "terminated")]
    referee = subprocess.run([sys.executable, "-c", REFEREE, json.dumps(jobs)], capture_output=True, timeout=240, **options)
    assert referee.returncode == 0, referee.stderr
    output["referee"] = referee.stdout, referee.returncode
    return folder, output


def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_bits(processes):
    folder, output = processes
    assert output["killed"][1] == -signal.SIGKILL, output["killed"][0]
    assert 0 < len(rows(folder / "killed_as_left")) < STEPS
    assert_same_bits(folder / "killed", folder / "adamw")


def test_a_run_killed_while_saving_goes_on_to_the_same_bits_with_another_optimizer_and_accumulation(processes):
    folder, output = processes
    assert output["killed_while_saving"][1] == -signal.SIGKILL, output["killed_while_saving"][0]
    left = {path.name for path in (folder / "killed_while_saving_as_left" / "checkpoints").iterdir()}
    assert left == {"4", "8.saving"}
    assert_same_bits(folder / "killed_while_saving", folder / "lion")


def test_sigterm_saves_leaves_with_status_0_and_goes_on_to_the_same_bits(processes):
    folder, (text, _) = processes[0], processes[1]["referee"]
    assert re.findall(r"status (\d)", text) == ["0"] * 5
    assert "stopped on request after step 6; --resume auto goes on from there" in text
    result = json.loads((folder / "terminated.json").read_text())
    assert (result["finished"], result["step"], len(rows(folder / "terminated"))) == (False, 6, 6)
    made = trainer(folder / "terminated", optimizer=dataclasses.replace(experiment().optimizer, ema_decay=0.9))
    assert made.restore(made.choose("auto")) == 6 and made.run()
    assert_same_bits(folder / "terminated", folder / "adamw")


def test_a_run_goes_on_on_another_mesh_with_the_same_data(clean, copy):
    shutil.rmtree(copy / "checkpoints" / "12")
    made = run(copy, devices=4, mesh=MeshConfig(data=2, fsdp=2))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(made.state.trainable))
    assert position(copy)["data_index"] == position(clean)["data_index"]
    found, expected = rows(copy), rows(clean)
    assert [row["step"] for row in found] == [row["step"] for row in expected] and found[:8] == expected[:8]
    np.testing.assert_allclose([row["loss"] for row in found], [row["loss"] for row in expected], atol=1e-5)


# Where a run starts.


def test_never_starts_over_and_keeps_what_was_there(clean, copy, capsys):
    made = trainer(copy)
    assert made.restore(made.choose("never")) == 0
    assert made.run()
    text = capsys.readouterr().out
    considered = [line for line in text.splitlines() if line.startswith("resume: ")]
    assert [re.search(r"checkpoints/(\d+): ignored", line)[1] for line in considered[:-1]] == ["12", "8", "4"]
    assert considered[-1] == "resume: starting from step 0"
    assert {path.name for path in (copy / "checkpoints").iterdir()} >= {"4.superseded", "8.superseded", "12.superseded", "12"}
    assert_same_bits(copy, clean)


def test_a_step_can_be_asked_for(clean, copy):
    made = trainer(copy)
    assert made.restore(made.choose("step=8")) == 8
    assert made.run()
    assert_same_bits(copy, clean)
    with pytest.raises(CheckpointError, match=r"step=7: .*there is no such folder. Steps in .*: 8, 12"):
        made.choose("step=7")


@pytest.mark.parametrize(("below", "step"), [("", 12), ("checkpoints", 12), ("checkpoints/4", 4)])
def test_a_path_can_be_asked_for_and_another_folder_goes_on_from_it(clean, tmp_path, below, step):
    made = trainer(tmp_path / "new")
    assert made.restore(made.choose(str(clean / below))) == step
    assert made.run()
    assert rows(tmp_path / "new") == rows(clean)[step:]
    expected = arrays(clean)
    leaves = jax.tree.leaves(jax.device_get(made.state.trainable))
    assert len(leaves) == sum(name.startswith("trainable.") for name in expected)
    assert {leaf.tobytes() for leaf in leaves} <= {np.asarray(value).tobytes() for value in expected.values()}


def test_a_damaged_newest_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(clean, copy, capsys):
    files = [path for path in (copy / "checkpoints" / "12" / "state").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    run(copy)
    considered = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resume: ")]
    assert re.search(rf"checkpoints/12: damaged: .*{victim.name} has changed since it was written", considered[0])
    assert considered[1].endswith("checkpoints/8: chosen")
    assert_same_bits(copy, clean)


def test_a_checkpoint_beyond_the_last_step_is_refused(clean, tmp_path):
    argv = ["train", f"--config={ROOT / CONFIG}", "--config.steps=8", f"--out={tmp_path / 'other'}", f"--resume={clean}"]
    call, _ = entry.parse(argv, train_verb.Flags)
    with pytest.raises(ConfigError, match="steps = 8: .* step 12"):
        train_verb.main(call)


def test_another_data_order_is_refused(clean, tmp_path):
    made = trainer(tmp_path / "new", seed=1)
    with pytest.raises(CheckpointError, match="data.seed: the folder has 0, this run has 1"):
        made.restore(made.choose(str(clean)))


# The host never waits.


def test_every_step_is_dispatched_before_the_one_before_is_fetched_and_nothing_else_waits(tmp_path, monkeypatch):
    made = trainer(tmp_path, checkpoint={"every": 0})
    made.restore(made.choose("auto"))
    events: list[str] = []
    train, fetch = made.setup.train, metrics.fetch
    fetching = False

    def counted(stage, watch):
        compiled = train(stage, watch)

        def dispatch(state, batch):
            events.append(f"dispatch {1 + sum(event.startswith('dispatch') for event in events)}")
            return compiled(state, batch)

        return dispatch

    def spy(tree):
        nonlocal fetching
        events.append(f"fetch {1 + int(tree['data_index'])}")
        fetching = True
        found = fetch(tree)
        fetching = False
        return found

    def watch(owner, name):
        waiting = getattr(owner, name)
        read = waiting.fget if isinstance(waiting, property) else waiting

        def seen(*args):
            if not fetching:
                events.append(f"waits in {name}")
            return read(*args)

        monkeypatch.setattr(owner, name, property(seen) if isinstance(waiting, property) else seen)

    made.setup = dataclasses.replace(made.setup, train=counted)
    monkeypatch.setattr(metrics, "fetch", spy)
    array = type(made.state.step)
    for owner, name in ((array, "_value"), (array, "block_until_ready"), (jax, "block_until_ready"), (jax, "device_get")):
        watch(owner, name)
    int(made.state.step)  # the spies see what they should
    assert events == ["waits in _value"]
    assert made.run()
    loop = events[events.index("dispatch 1") : events.index(f"fetch {STEPS}")]
    expected = ["dispatch 1"]
    for step in range(2, STEPS + 1):
        expected += [f"dispatch {step}", f"fetch {step - 1}"]
    assert loop == expected


# Steps whose loss is not usable.


def spoil(monkeypatch, change, where=lambda index: True):
    """Training batches as `change(batch, index)` leaves them."""
    batch = DataPipeline.batch

    def spoiled(self, step, split="train", rows=None):
        found = batch(self, step, split, rows)
        return change(found) if split == "train" and where(step) else found

    monkeypatch.setattr(DataPipeline, "batch", spoiled)


def nan(batch):
    return {**batch, "weights": np.full_like(batch["weights"], np.nan)}


def bad_batches(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_batches.jsonl").read_text().splitlines()]


def test_stop_names_the_batch_and_leaves_checkpoints_from_which_the_run_goes_on(clean, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(patch, nan, lambda index: index == 6)
        # The command tells a ConfigError as one message.
        assert issubclass(TrainingStopped, ConfigError)
        with pytest.raises(TrainingStopped, match="step 7: loss nan, gradient norm nan, batch 6 is not usable; .*intact"):
            run(tmp_path)
    assert bad_batches(tmp_path) == [{"step": 7, "data_index": 6, "loss": "nan", "policy": "stop"}]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    run(tmp_path)
    assert_same_bits(tmp_path, clean)


def test_a_save_under_way_is_completed_when_the_run_stops_on_an_error(tmp_path, monkeypatch):
    seal = checkpoint_files.seal
    monkeypatch.setattr(checkpoint_files, "seal", lambda folder: (time.sleep(0.5), seal(folder)))
    spoil(monkeypatch, nan, lambda index: index == 4)
    with pytest.raises(TrainingStopped, match="step 5"):
        run(tmp_path)
    assert checkpoint_files.damage(tmp_path / "checkpoints" / "4") is None


def test_skip_goes_on_with_the_state_before(clean, tmp_path, monkeypatch):
    spoil(monkeypatch, nan, lambda index: index == 6)
    made = run(tmp_path, checkpoint={"on_nan": "skip"})
    found, expected = rows(tmp_path), rows(clean)
    assert found[:6] == expected[:6] and found[6]["loss"] is None and found[6]["bad"] == 1
    assert all(math.isfinite(row["loss"]) for row in found[7:]) and len(found) == STEPS
    assert bad_batches(tmp_path) == [{"step": 7, "data_index": 6, "loss": "nan", "policy": "skip"}]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(made.state.trainable)))
    assert position(tmp_path)["skipped"] == [] and position(tmp_path)["data_index"] == STEPS


@pytest.mark.parametrize("bad", [3, 6, 11], ids=["before the first save", "between saves", "last"])
def test_roll_back_is_a_run_that_never_saw_the_batch(tmp_path, monkeypatch, bad):
    with monkeypatch.context() as patch:
        spoil(patch, nan, lambda index: index == bad)
        run(tmp_path / "back", checkpoint={"on_nan": "rollback"})
    assert bad_batches(tmp_path / "back") == [{"step": bad + 1, "data_index": bad, "loss": "nan", "policy": "rollback"}]
    found = position(tmp_path / "back")
    assert (found["data_index"], found["skipped"]) == (13, [bad])
    batch = DataPipeline.batch
    monkeypatch.setattr(DataPipeline, "batch", lambda self, step, **rest: batch(self, step + (step >= bad), **rest))
    run(tmp_path / "without")
    assert rows(tmp_path / "back") == rows(tmp_path / "without")
    expected = arrays(tmp_path / "without")
    for name, value in arrays(tmp_path / "back").items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[name]), err_msg=name)


@pytest.mark.parametrize("resume", ["step=4", "never", "PATH"])
def test_roll_back_never_enters_a_history_that_the_run_has_left(clean, copy, tmp_path, monkeypatch, resume, capsys):
    spoil(monkeypatch, nan, lambda index: index == 5)
    start = 0 if resume == "never" else 4
    every = 100 if resume == "never" else 4
    folder = tmp_path / "new" if resume == "PATH" else copy
    made = trainer(folder, checkpoint={"on_nan": "rollback", "every": every})
    made.restore(made.choose(str(clean / "checkpoints" / "4") if resume == "PATH" else resume))
    assert made.run()
    assert f"rolled back to step {start}; batches left out: [5]" in capsys.readouterr().out
    assert position(folder)["data_index"] == 13 and [row["step"] for row in rows(folder)][-8:] == list(range(5, 13))


def test_rolling_back_ends_when_it_does_not_help(tmp_path, monkeypatch):
    spoil(monkeypatch, nan, lambda index: index >= 6)
    with pytest.raises(TrainingStopped, match=rf"rolled back {MAX_ROLLBACKS} times; batches left out: \[6, 7, 8"):
        run(tmp_path, checkpoint={"on_nan": "rollback"})
    assert [row["data_index"] for row in bad_batches(tmp_path)] == list(range(6, 7 + MAX_ROLLBACKS))


def test_a_loss_spike_counts_as_unusable_where_the_config_says_so(tmp_path, monkeypatch):
    spoil(monkeypatch, lambda batch: {**batch, "targets": np.full_like(batch["targets"], 3)})
    spoil(monkeypatch, lambda batch: {**batch, "targets": np.full_like(batch["targets"], 5)}, lambda index: index == 26)
    run(tmp_path, steps=30, checkpoint={"every": 10, "on_nan": "rollback", "spike_factor": 1.5})
    (bad,) = bad_batches(tmp_path)
    assert (bad["step"], bad["data_index"]) == (27, 26) and math.isfinite(float(bad["loss"]))
    assert rows(tmp_path)[-1]["loss"] < float(bad["loss"]) / 1.5


# A full disk.


def test_a_full_disk_costs_neither_the_run_nor_an_older_checkpoint(clean, tmp_path, monkeypatch, capsys):
    usage, full = shutil.disk_usage, []

    def disk_usage(path):
        full.append(path)
        return usage(path)._replace(free=10) if len(full) == 2 else usage(path)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    run(tmp_path)
    text = capsys.readouterr().out
    assert "the checkpoint of step 8 could not be written" in text and "No space left on device" in text
    assert "that of step 4 is intact" in text
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "12"}
    assert_same_bits(tmp_path, clean)


def test_a_disk_that_stays_full_is_told_at_the_end_and_the_run_goes_on_later(clean, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage
        patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10 if (path / "4").exists() else 2**40))
        with pytest.raises(CheckpointError, match="step 12 could not be written .*No space left on device.*step 4 is intact"):
            run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]
    run(tmp_path)
    assert_same_bits(tmp_path, clean)


# The command, to its page.


def command(*flags: str) -> None:
    with pytest.raises(SystemExit) as left:
        entry.run(train_verb.main, train_verb.Flags, argv=["train", f"--config={ROOT / CONFIG}", *flags])
    assert left.value.code == 0


def test_a_finished_run_has_a_result_a_page_and_a_sample_and_is_not_trained_again(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 400)
    folder = tmp_path / "run"
    flags = [f"--out={folder}", f"--json={tmp_path / 'result.json'}", f"--config.data.source=text:{text}", "--config.steps=20",
             "--config.checkpoint.every=0", "--config.evaluate.every=10", "--config.evaluate.sample_tokens=20",
             "--config.evaluate.sample_prompt=the cat", "--config.log.watch_every=10",
             "--config.log.writers=('csv', 'jsonl', 'tensorboard')"]
    command(*flags)
    first = capsys.readouterr().out
    assert "train stage 0: trace" in first and "sample after 'the cat'" in first and "evaluation at step 10" in first
    result = json.loads((folder / "result.json").read_text(), parse_constant=pytest.fail)
    assert json.loads((tmp_path / "result.json").read_text()) == {**result, "finished": True, "folder": str(folder)}
    found = result["results"]
    assert 0.1 < found["bits_per_byte"] < 8 and found["loss"] < math.log(260) and 0 <= found["zero_fraction"] <= 1
    assert found["bits_per_byte"] == pytest.approx(found["loss"] * found["tokens"] / found["bytes"] / math.log(2))
    assert result["baselines"]["bigram"] < result["baselines"]["unigram"] < 8
    assert found["zero_fraction"] == pytest.approx(found["zeros"] / found["entries"])
    assert found["zero_fraction_by_layer"] == pytest.approx([found["zero_fraction"]])
    assert found["steps_run"] == 20 and found["tokens_per_second"] > 0 and result["sample"]["prompt"] == "the cat"
    plots = {path.name for path in (folder / "plots").glob("*.png")}
    assert {"loss.png", "zero_fraction.png"} <= plots, plots
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png") == len(plots) and "the cat" in page
    assert {path.name for path in folder.iterdir()} >= {"config.json", "config.txt", "metrics.csv", "stats", "tensorboard"}
    assert not list(folder.rglob("*.partial"))
    before = rows(folder)
    command(*flags)
    again = capsys.readouterr().out
    assert "checkpoints/20: chosen" in again and "train stage" not in again and "step 20/20" not in again
    assert json.loads((folder / "result.json").read_text()) == result and rows(folder) == before
