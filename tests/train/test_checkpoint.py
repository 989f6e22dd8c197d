import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.mesh import make_mesh
from sparsejax.train import checkpoint_files as files
from sparsejax.train.checkpoint import (
    Checkpoints,
    Record,
    check_same_run,
    choose,
    fingerprint,
    read_record,
    restore,
    versions,
)
from sparsejax.train.checkpoint_files import CheckpointError

ROOT = Path(__file__).parents[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Packed:
    codes: jax.Array
    scale: jax.Array
    group_size: int = dataclasses.field(metadata={"static": True}, default=4)


class State(NamedTuple):
    step: jax.Array
    trainable: dict
    optimizer: tuple
    rng: jax.Array


def small_state(value=1.0):
    weights = {"up": {"kernel": jnp.full((8, 4), float(value)), "bias": jnp.zeros(4, jnp.bfloat16)}}
    return State(jnp.int32(value), weights, ({"mu": jnp.full((8, 4), -float(value))},), jax.random.key_data(jax.random.key(3)))


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def assert_bitwise_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert type(a) is type(b) or isinstance(a, jax.Array | np.ndarray)
        assert np.asarray(a).dtype == np.asarray(b).dtype and np.shape(a) == np.shape(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def saved(folder, *saves, keep=10, **options):
    """Save small states at the given steps; returns the folder."""
    checkpoints = Checkpoints(folder, resumed_from=None, keep=keep, **options)
    for step in saves:
        checkpoints.save(step, small_state(step), Record(step))
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder with good checkpoints of steps 10, 20 and 30; tests that damage it copy it first."""
    return saved(tmp_path_factory.mktemp("three") / "checkpoints", 10, 20, 30)


@pytest.fixture
def folder(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def largest_file(checkpoint):
    return max((p for p in (checkpoint / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DTYPES = ["float32", "bfloat16", "float16", "int8", "uint8", "int32", "uint32", "bool", "int4", "uint4", "float8_e4m3fn",
          "float8_e5m2"]


def test_every_dtype_comes_back_bit_for_bit_on_its_sharding(tmp_path):
    sharding = NamedSharding(make_mesh(MeshConfig(data=1, fsdp=8)), P("fsdp"))
    rng = np.random.default_rng(0)
    arrays = {d: jax.device_put(jnp.asarray(rng.integers(0, 2, (16, 3))).astype(d), sharding) for d in DTYPES}
    bits = np.array([0x7FC00001, 0xFFC00000, 0x7F800001, 0x80000000, 1], np.uint32)
    state = {
        "arrays": arrays,
        "nan payloads": jnp.asarray(bits).view(jnp.float32),
        "packed": Packed(jnp.arange(8, dtype=jnp.uint8), jnp.ones(2)),
        "empty": jnp.zeros((0, 4), jnp.bfloat16),
        "scalar": jnp.float32(0.1),
        "host": np.arange(5),
        "numbers": [3, 0.1, True, float("inf"), -0.0, 2**62],
        "nothing": None,
    }
    checkpoints = Checkpoints(tmp_path, resumed_from=None)
    checkpoints.save_now(1, state, Record(1))
    checkpoints.close()
    found = restore(tmp_path / "1", state)
    assert_bitwise_equal(found, state)
    assert all(found["arrays"][d].sharding == sharding for d in DTYPES)


def test_a_checkpoint_restores_on_another_mesh_and_in_part(tmp_path):
    before = NamedSharding(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), P("fsdp", "tensor"))
    state = {"trainable": {"w": jax.device_put(jnp.arange(64.0).reshape(8, 8), before)}, "step": jnp.int32(4)}
    checkpoints = Checkpoints(tmp_path, resumed_from=None)
    checkpoints.save_now(4, state, Record(4))
    checkpoints.close()
    for mesh, spec in ((make_mesh(MeshConfig(data=1, fsdp=8)), P("fsdp")), (make_mesh(MeshConfig(), jax.devices()[:1]), P())):
        found = restore(tmp_path / "4", abstract(state, NamedSharding(mesh, P())))
        assert_bitwise_equal(found, state)
        after = NamedSharding(mesh, spec)
        part = restore(tmp_path / "4", abstract(state["trainable"], after), part="trainable")
        assert_bitwise_equal(part, state["trainable"])
        assert part["w"].sharding == after


def test_saving_waits_for_no_file_and_the_saved_state_may_be_donated(tmp_path, monkeypatch):
    may_seal = threading.Event()
    seal = files.seal
    monkeypatch.setattr(files, "seal", lambda folder: (may_seal.wait(60), seal(folder)))
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 + 7, state), donate_argnums=0)
    state = {f"w{i}": jnp.full((512, 256), float(i)) for i in range(4)}
    wanted = jax.tree.map(np.array, state)
    checkpoints = Checkpoints(tmp_path, resumed_from=None)
    checkpoints.save(1, state, Record(1))
    like = abstract(state)
    state = jax.block_until_ready(advance(state))
    assert files.steps(tmp_path) == []  # the loop has gone on although the save is not complete
    may_seal.set()
    checkpoints.wait()
    assert_bitwise_equal(restore(tmp_path / "1", like), jax.tree.map(jnp.asarray, wanted))
    checkpoints.close()


def test_restored_arrays_can_be_donated(three):
    state = restore(three / "30", abstract(small_state()))
    jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state))
    assert state.trainable["up"]["kernel"].is_deleted()


def test_a_state_that_does_not_fit_is_refused_with_every_difference(three):
    like = abstract(small_state())
    up = dict(like.trainable["up"], kernel=jax.ShapeDtypeStruct((8, 5), jnp.float32), new=jax.ShapeDtypeStruct((), jnp.int8))
    up["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        restore(three / "30", like._replace(trainable={"up": up}, optimizer=()))
    message = str(error.value)
    assert "missing from the checkpoint: trainable.up.new." in message
    assert "in the checkpoint but not in this run: optimizer.0.mu." in message
    assert "wrong shape: trainable.up.kernel: saved (8, 4), wanted (8, 5)" in message
    assert "wrong dtype: trainable.up.bias: saved bfloat16, wanted float32" in message


def test_static_fields_of_a_packed_weight_must_agree(tmp_path):
    state = {"w": Packed(jnp.arange(8, dtype=jnp.uint8), jnp.ones(2), group_size=4)}
    checkpoints = Checkpoints(tmp_path, resumed_from=None)
    checkpoints.save_now(1, state, Record(1))
    checkpoints.close()
    with pytest.raises(CheckpointError, match=r"wrong container: w: saved Packed\(4,\), wanted Packed\(8,\)"):
        restore(tmp_path / "1", {"w": dataclasses.replace(state["w"], group_size=8)})
    with pytest.raises(CheckpointError, match="w: saved Packed.*wanted a plain container"):
        restore(tmp_path / "1", {"w": {"codes": state["w"].codes, "scale": state["w"].scale}})


@pytest.mark.parametrize("leaf", [jax.random.key(0), "text"])
def test_what_cannot_be_saved_is_named_before_anything_is_written(tmp_path, leaf):
    checkpoints = Checkpoints(tmp_path, resumed_from=None)
    with pytest.raises(TypeError, match="checkpoint: a.b is a"):
        checkpoints.save(1, {"a": {"b": leaf}}, Record(1))
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_the_record_comes_back(tmp_path):
    record = Record(7, config={"a": 1, "b": [1, 2]}, data={"hash": "x"}, extra={"loss": float("nan"), "seconds": 1.5})
    checkpoints = Checkpoints(tmp_path, resumed_from=None)
    checkpoints.save_now(7, small_state(), record)
    checkpoints.close()
    found = read_record(tmp_path / "7")
    assert (found.step, found.config, found.data, found.versions) == (7, record.config, record.data, versions())
    assert found.extra["seconds"] == 1.5 and np.isnan(found.extra["loss"])
    document = json.loads((tmp_path / "7" / "record.json").read_text())
    (tmp_path / "7" / "record.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99; this version reads format 1"):
        read_record(tmp_path / "7")


def test_the_newest_good_checkpoint_is_chosen(folder):
    choice = choose("auto", folder)
    assert (choice.step, choice.path) == (30, folder / "30")
    assert choice.considered == [f"{folder / '30'}: chosen"]
    assert int(restore(choice.path, abstract(small_state())).step) == 30


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing", "no manifest", "manifest flipped", "emptied manifest"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(folder, harm):
    target = folder / "30" / files.MANIFEST if "manifest" in harm else largest_file(folder / "30")
    content = target.read_bytes()
    middle = len(content) // 2
    if harm in ("missing", "no manifest"):
        target.unlink()
    elif harm == "truncated":
        target.write_bytes(content[:-1])
    elif harm == "emptied manifest":
        target.write_bytes(b"")
    else:
        target.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    choice = choose("auto", folder)
    assert choice.step == 20
    assert choice.considered[0].startswith(f"{folder / '30'}: damaged: ") and target.name in choice.considered[0]
    assert choice.considered[1] == f"{folder / '20'}: chosen"
    for asked in ("step=30", str(folder / "30")):
        with pytest.raises(CheckpointError, match=target.name.replace(".", r"\.")):
            choose(asked, folder)


@given(st.data())
def test_any_flipped_bit_in_any_file_is_found(three, data):
    checkpoint = three / "10"
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(paths))
    content = path.read_bytes()
    position, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    flipped = content[:position] + bytes([content[position] ^ (1 << bit)]) + content[position + 1 :]
    try:
        path.write_bytes(flipped)
        problem = files.damage(checkpoint)
        # White space of the manifest carries nothing; anywhere else a flip is damage.
        assert problem is not None or json.loads(flipped) == json.loads(content)
    finally:
        path.write_bytes(content)
    assert files.damage(checkpoint) is None


def test_auto_starts_from_nothing_only_when_nothing_was_ever_finished(folder, tmp_path):
    empty = choose("auto", tmp_path / "new")
    assert empty.step is None and "starting from step 0" in empty.considered[-1]
    for step in files.steps(folder):
        largest_file(folder / str(step)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged.*--resume never"):
        choose("auto", folder)


def test_what_is_asked_for_is_used_or_refused(folder, tmp_path):
    assert choose("step=20", folder).step == 20
    assert choose("never", folder).step is None
    assert choose(str(folder / "10"), tmp_path).step == 10
    assert choose(str(folder), tmp_path).step == 30
    assert choose(str(folder.parent), tmp_path).step == 30
    for asked, words in [
        ("step=25", "Steps in .*: 10, 20, 30"),
        ("step=x", "N must be a number"),
        ("atuo", "Did you mean 'auto'"),
        (str(tmp_path / "nowhere"), "neither auto, never, step=N nor a folder"),
        (str(folder / "10" / "state"), "neither a checkpoint"),
    ]:
        with pytest.raises(CheckpointError, match=words):
            choose(asked, folder)


def test_an_unfinished_save_is_ignored_and_swept_by_the_next(folder):
    (folder / "30").rename(folder / "40.saving")
    (folder / "40.saving" / files.MANIFEST).unlink()
    choice = choose("auto", folder)
    assert choice.step == 20 and choice.considered[0] == f"{folder / '40.saving'}: ignored, it was never finished"
    lines = []
    checkpoints = Checkpoints(folder, resumed_from=20, report=lines.append)
    checkpoints.save_now(25, small_state(25), Record(25))
    checkpoints.close()
    assert lines == [f"{folder / '40.saving'}: removed, it was never finished"]
    assert files.steps(folder) == [20, 25] and files.leftovers(folder) == []


def test_a_save_killed_before_its_last_rename_is_completed(folder):
    (folder / "30").rename(folder / "30.saving")
    choice = choose("auto", folder)
    assert choice.step == 30 and "complete but for its last rename" in choice.considered[0]


def test_leaving_a_history_sets_its_later_checkpoints_aside(folder):
    lines = []
    checkpoints = Checkpoints(folder, resumed_from=10, keep=3, report=lines.append)
    checkpoints.save_now(15, small_state(15), Record(15))
    checkpoints.close()
    assert files.steps(folder) == [10, 15] and len(lines) == 2
    assert choose("auto", folder).step == 15
    assert choose(str(folder / "30.superseded"), folder).step == 30


def test_a_step_that_is_saved_already_is_not_written_again(folder):
    before = (folder / "30" / files.MANIFEST).stat().st_mtime_ns
    checkpoints = Checkpoints(folder, resumed_from=30)
    checkpoints.save_now(30, small_state(30), Record(30))
    checkpoints.close()
    assert (folder / "30" / files.MANIFEST).stat().st_mtime_ns == before


def test_after_a_roll_back_the_abandoned_steps_do_not_count(tmp_path):
    checkpoints = Checkpoints(tmp_path, resumed_from=None, report=lambda line: None)
    for step in (1, 2):
        checkpoints.save(step, small_state(step), Record(step))
    checkpoints.rolled_back(1)
    checkpoints.save_now(2, small_state(5), Record(2))
    checkpoints.close()
    assert files.steps(tmp_path) == [1, 2]
    assert int(restore(tmp_path / "2", abstract(small_state())).step) == 5


def test_older_checkpoints_go_only_when_the_newer_is_complete(tmp_path, monkeypatch):
    present = []
    seal = files.seal
    monkeypatch.setattr(files, "seal", lambda folder: (present.append(files.steps(tmp_path)), seal(folder)))
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert present == [[], [1], [1, 2], [2, 3]]
    assert files.steps(tmp_path) == [3, 4] and files.leftovers(tmp_path) == []


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["before", "while sealing", "inside the storage layer"])
def test_a_full_disk_costs_no_checkpoint_and_no_state(tmp_path, monkeypatch, moment):
    lines = []
    checkpoints = Checkpoints(tmp_path, resumed_from=None, report=lines.append)
    checkpoints.save_now(1, small_state(1), Record(1))
    state = small_state(2)
    with monkeypatch.context() as patch:
        if moment == "before":
            patch.setattr(shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
        elif moment == "while sealing":
            patch.setattr(files, "seal", no_space)
        else:
            patch.setattr(checkpoints._writer, "wait_until_finished", no_space)
        checkpoints.save(2, state, Record(2))
        with pytest.raises(CheckpointError, match="step 2 could not be written.*No space left.*that of step 1 is intact"):
            checkpoints.wait()
    assert len(lines) == 1
    assert choose("auto", tmp_path).step == 1 and files.leftovers(tmp_path) == []
    checkpoints.save_now(2, state, Record(2))  # room was made: the same state is saved
    checkpoints.close()
    assert choose("auto", tmp_path).step == 2


FILLER = """
import shutil, sys, jax.numpy as jnp
from sparsejax.train.checkpoint import *
folder = sys.argv[1] + "/checkpoints"
state = {f"w{i}": jnp.full((256, 256), float(i)) for i in range(8)}
lines = []
checkpoints = Checkpoints(folder, resumed_from=None, report=lines.append)
checkpoints.save_now(1, state, Record(1))
checkpoints.save_now(2, state, Record(2))
shutil.disk_usage = lambda path: type("usage", (), {"free": 1 << 40})  # so that Orbax meets the wall, not the check before
try:
    checkpoints.save_now(3, state, Record(3))
except CheckpointError as error:
    print(lines == [str(error)], choose("auto", folder).step, error)
shutil.rmtree(folder + "/1")
checkpoints.save_now(3, state, Record(3))
print(choose("auto", folder).step)
"""


def test_a_disk_that_fills_up_inside_orbax_is_one_clear_line(tmp_path):
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=6m tmpfs "$1" && shift && exec "$@"', "sh", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    done = subprocess.run([*mount, sys.executable, "-c", FILLER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    full, after = done.stdout.splitlines()
    assert full.startswith("True 2 the checkpoint of step 3 could not be written to ") and after == "3", done.stderr
    assert full.endswith(": No space left on device; that of step 2 is intact")
    assert "absl" not in done.stderr


def test_a_folder_of_another_run_is_refused_with_what_differs():
    record = Record(1, config={"model": {"num_layers": 2, "d_model": 8}}, data={"hash": "a"})
    check_same_run(record, {"model": {"d_model": 8, "num_layers": 2}}, {"hash": "a"}, "runs/x")
    with pytest.raises(CheckpointError) as error:
        check_same_run(record, {"model": {"num_layers": 3, "d_model": 8}}, {"hash": "b"}, "runs/x")
    assert "runs/x belongs to another run: config.model.num_layers: the folder has 2, this run has 3" in str(error.value)
    assert "data.hash: the folder has 'a', this run has 'b'" in str(error.value)
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1, "b": 3})


SAVER = """
import sys, jax.numpy as jnp
from sparsejax.train.checkpoint import *
folder = sys.argv[1]
choice = choose("auto", folder)
step = choice.step or 0
like = {f"w{i}": jnp.zeros((64, 512)) for i in range(8)}
if choice.path:
    assert all(float(w.min()) == float(w.max()) == step for w in restore(choice.path, like).values())
checkpoints = Checkpoints(folder, resumed_from=choice.step, keep=2)
print("ready", step, flush=True)
while True:
    step += 1
    checkpoints.save_now(step, {name: w + step for name, w in like.items()}, Record(step))
    print("complete", step, flush=True)
"""


def test_killed_at_any_moment_of_a_save_the_last_good_checkpoint_remains(tmp_path):
    delays = random.Random(0)
    last = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                                   env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
        try:
            first = process.stdout.readline()
            assert first.startswith("ready") and int(first.split()[1]) >= last, first
            told = [next(line for line in process.stdout if line.startswith("complete "))]
            time.sleep(delays.uniform(0, 0.15))
        finally:
            process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].splitlines(keepends=True)
        told += [line for line in rest if line.startswith("complete ") and line.endswith("\n")]
        choice = choose("auto", tmp_path)
        assert choice.step >= int(told[-1].split()[1]) > last
        like = {f"w{i}": jax.ShapeDtypeStruct((64, 512), jnp.float32) for i in range(8)}
        assert all(float(w.min()) == float(w.max()) == choice.step for w in restore(choice.path, like).values())
        last = choice.step


HOSTS = """
import sys, jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from sparsejax.parallel.config import MeshConfig
from sparsejax.parallel.launch import initialize
from sparsejax.parallel.mesh import make_mesh
from sparsejax.train.checkpoint import *
initialize()
folder = sys.argv[1]
sharding = NamedSharding(make_mesh(MeshConfig(data=1, fsdp=4)), P("fsdp"))
whole = np.arange(32, dtype=np.float32).reshape(8, 4)
state = {"w": jax.make_array_from_callback((8, 4), sharding, lambda index: whole[index]), "n": 3}
checkpoints = Checkpoints(folder, resumed_from=None, keep=1)
for step in (1, 2):
    checkpoints.save(step, state, Record(step))
checkpoints.wait()
choice = choose("auto", folder)
assert choice.step == 2, choice
back = restore(choice.path, state)
for shard in back["w"].addressable_shards:
    np.testing.assert_array_equal(shard.data, whole[shard.index])
for asked in ("step=1", "nonsense"):
    try:
        choose(asked, folder)
        raise SystemExit("not refused")
    except CheckpointError as error:
        assert asked in str(error), error
checkpoints.close()
print("done", jax.process_index())
"""


def test_two_processes_save_what_one_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                   "SPARSEJAX_COORDINATOR": f"127.0.0.1:{port}", "SPARSEJAX_NUM_PROCESSES": "2"}
    workers = [
        subprocess.Popen([sys.executable, "-c", HOSTS, str(tmp_path)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, env={**environment, "SPARSEJAX_PROCESS_ID": str(index)})
        for index in range(2)
    ]
    try:
        for index, worker in enumerate(workers):
            output = worker.communicate(timeout=120)[0]
            assert worker.returncode == 0 and f"done {index}" in output, output
    finally:
        for worker in workers:
            worker.kill()
    choice = choose("auto", tmp_path)
    found = restore(choice.path, {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32), "n": 0})
    assert choice.step == 2 and found["n"] == 3
    np.testing.assert_array_equal(found["w"], np.arange(32.0).reshape(8, 4))
