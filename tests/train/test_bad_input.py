"""What a user can get wrong, through the command: one message that names the thing, status 2, nothing done that is lost."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from experiments import entry
from experiments import train as verb
from sparsejax.train import checkpoint_files, metrics, run

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'tests/train/tiny_run.py'}"


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """`refusal(*flags)`: the one message of a command that refuses, before it has compiled anything."""
    monkeypatch.setattr(run, "compile_ahead", lambda *arguments: pytest.fail("compiled before the refusal"))

    def refused(*flags: str, out: Path | str = tmp_path / "run") -> str:
        with pytest.raises(SystemExit) as left:
            entry.run(verb.main, verb.Flags, argv=["train", CONFIG, f"--out={out}", *flags])
        message = capsys.readouterr().err
        assert left.value.code == 2
        assert message.startswith("error: ") and "Traceback" not in message
        return message.removeprefix("error: ")

    return refused


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.model.num_layer=2"], ["model.num_layer", "Did you mean 'model.num_layers'?"]),
        (["--config.optimizer.learnin_rate=1"], ["Did you mean 'optimizer.learning_rate'?"]),
        (["--config.optimizer.name=adamv"], ["optimizer.name = 'adamv'", "adamw"]),
        (["--config.optimizer.arguments=beta=0.9"], ["optimizer.arguments", "beta"]),
        (["--config.optimizer.schedule=cosin"], ["optimizer.schedule = 'cosin'", "cosine"]),
        (["--config.model.ffn.activation=relu3"], ["model.ffn.activation", "relu3", "relu2"]),
        (["--config.objectives=cross_entropi"], ["objectives", "cross_entropi", "cross_entropy"]),
        (["--config.data.source=cpoy"], ["data.source", "cpoy", "copy"]),
        (["--config.checkpoint.on_nan=ignore"], ["checkpoint.on_nan = 'ignore'", "skip", "rollback"]),
        (["--config.log.writers=cvs"], ["log.writers", "cvs", "csv"]),
        (["--config.steps=ten"], ["--config.steps=ten", "whole number"]),
        (["--config.steps=0"], ["steps = 0"]),
        (["--config.steps=-3"], ["steps = -3"]),
        (["--config.model.scan=perhaps"], ["model.scan=perhaps"]),
        (["--config.optimizer.learning_rate=fast"], ["optimizer.learning_rate=fast"]),
        (["--config.checkpoint.every=-1"], ["checkpoint.every = -1"]),
        (["--config.checkpoint.keep=0"], ["checkpoint.keep = 0"]),
        (["--config.mesh.data=2", "--config.mesh.fsdp=2"], ["data=2, fsdp=2", "4 devices", "there are 8"]),
        (["--config.mesh.data=-1", "--config.mesh.fsdp=-1"], ["data and fsdp are both -1"]),
        (["--config.mesh.sequence=16"], ["mesh.data = -1", "sequence=16", "does not divide the 8"]),
        (["--config.mesh.data=1", "--config.mesh.tensor=8"], ["model.attention.num_heads = 2", "mesh.tensor = 8"]),
        (["--config.batch_size=12"], ["batch_size", "12", "8"]),
        (["--config.accumulate=3"], ["batch_size = 8", "accumulate = 3"]),
        (["--config.model.attention.num_heads=3"], ["model.attention.num_heads = 3", "d_model = 16"]),
        (["--config.model.attention.num_kv_heads=4"], ["num_kv_heads = 4", "num_heads"]),
        (["--config.model.ffn.activation=topk:k=999"], ["model.ffn.activation", "999", "32"]),
        (["--config.model.feed_pattern=moe:experts=4,k=9"], ["feed_pattern", "9", "4"]),
        (["--config.model.inputs=blocks.*.mlp.donw=int8"], ["model.inputs[0]", "blocks.*.mlp.donw", "blocks.*.mlp.down"]),
        (["--config.model.vocab_size=7"], ["model.vocab_size = 7", "20"]),
        (["--config.evaluate.sample_tokens=5"], ["evaluate.sample_tokens = 5", "'copy' is not text"]),
        (["--config.data.sequence_length=1"], ["sequence_length"]),
        (["--config.data.source=tfds:no_such_set"], ["tfds:no_such_set"]),
        (["--resume=latest"], ["--resume latest", "auto"]),
        (["--resume=step=four"], ["--resume step=four", "must be a number"]),
        (["--resume=step=4"], ["--resume step=4", "no such folder"]),
        (["--resume=/nowhere/4"], ["--resume /nowhere/4"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_a_mistake_in_the_command_is_named_with_what_is_allowed(refusal, tmp_path, flags, parts):
    message = refusal(*flags)
    for part in parts:
        assert part in message
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file"]),
        (b"", ["is empty"]),
        (b"x", ["too short"]),
        (b"caf\xe9 " * 500, ["not valid UTF-8", "0xe9", "offset 3"]),
    ],
    ids=["missing", "empty", "one byte", "latin-1"],
)
def test_text_that_cannot_be_trained_on_is_named(refusal, tmp_path, monkeypatch, content, parts):
    monkeypatch.setattr(run, "compile_ahead", lambda *arguments: 0.0)  # text is read after compiling
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    message = refusal(f"--config.data.source=text:{path}")
    assert str(path) in message
    for part in parts:
        assert part in message


def test_a_folder_is_no_text(refusal, tmp_path):
    assert "is a folder" in refusal(f"--config.data.source=text:{tmp_path}")


def write_tokenizer(path: Path, words: int) -> None:
    vocabulary = {"<|endoftext|>": 0, **{f"w{i}": i for i in range(1, words)}}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    parts |= {"added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|endoftext|>"}
    path.write_text(json.dumps({"version": "1.0", "model": model, **parts}))


def test_a_tokenizer_whose_vocabulary_does_not_fit_the_model_is_named(refusal, tmp_path):
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    text.write_text("w1 w2 w3 " * 200)
    write_tokenizer(tokenizer, 50)
    flags = [f"--config.data.source=text:{text}", f"--config.data.tokenizer=file:{tokenizer}", "--config.model.vocab_size=20"]
    message = refusal(*flags)
    assert "model.vocab_size = 20" in message and "50" in message


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"', "\x00\x01"])
def test_a_broken_tokenizer_file_is_named(refusal, tmp_path, content):
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    text.write_text("w1 w2 w3 " * 200)
    tokenizer.write_text(content)
    assert str(tokenizer) in refusal(f"--config.data.source=text:{text}", f"--config.data.tokenizer=file:{tokenizer}")


# Run folders.


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run folder with checkpoints 4 and 8, made by the command itself; the model is not evaluated."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(run, "finish", lambda *arguments: {})
        patch.setattr(run, "describe", lambda *arguments: [])
        entry.run(verb.main, verb.Flags, argv=["train", CONFIG, f"--out={folder}", "--config.steps=8"])
    assert left.value.code == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", ["auto", "never", "step=4"])
def test_a_folder_of_another_config_is_refused_and_left_as_it_is(refusal, folder, resume):
    before = contents(folder)
    message = refusal("--config.steps=8", "--config.model.d_model=32", "--config.seed=3", f"--resume={resume}")
    assert str(folder) in message and "belongs to another config" in message
    assert "model.d_model: 16 in the folder, 32 now" in message and "seed: 0 in the folder, 3 now" in message
    assert contents(folder) == before


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "words"), [(truncate, "bytes instead of"), (flip, "has changed"), (Path.unlink, "is missing")]
)
@pytest.mark.parametrize("form", ["step", "path"])
def test_a_damaged_checkpoint_that_was_asked_for_is_an_error_and_nothing_else_is_used(refusal, folder, harm, words, form):
    victim = largest(folder / "checkpoints" / "8" / "state")
    harm(victim)
    message = refusal("--config.steps=8", "--resume=step=8" if form == "step" else f"--resume={folder / 'checkpoints' / '8'}")
    assert str(folder / "checkpoints" / "8") in message and victim.name in message and words in message
    assert checkpoint_files.damage(folder / "checkpoints" / "4") is None


def test_when_every_checkpoint_is_damaged_the_run_does_not_silently_start_over(refusal, folder):
    for step in (4, 8):
        flip(largest(folder / "checkpoints" / str(step) / "state"))
    message = refusal("--config.steps=8")
    assert "every checkpoint" in message and "--resume never" in message


def test_a_checkpoint_of_another_model_lists_what_differs(refusal, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "compile_ahead", lambda *arguments: 0.0)
    message = refusal("--config.model.d_model=32", f"--resume={folder}", out=tmp_path / "new")
    assert "does not fit this run" in message and "mlp_norm.gain: saved (1, 16), wanted (1, 32)" in message


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'{"stps": 3}', b'{"steps": "many"}'])
def test_a_damaged_config_in_the_folder_is_named(refusal, folder, content):
    (folder / "config.json").write_bytes(content)
    message = refusal("--config.steps=8")
    assert "config.json" in message or str(folder) in message
    assert (folder / "config.json").read_bytes() == content


def test_a_disk_that_fills_up_under_the_metrics_is_one_message_and_no_checkpoint_is_lost(refusal, folder, monkeypatch):
    monkeypatch.setattr(run, "compile_ahead", lambda *arguments: 0.0)
    write = metrics.JsonlWriter.write

    def full_at_six(self, step, row):
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, step, row)

    monkeypatch.setattr(metrics.JsonlWriter, "write", full_at_six)
    message = refusal("--config.steps=8", "--resume=step=4")
    assert "No space left on device" in message and str(folder) in message and "are intact" in message
    assert checkpoint_files.damage(folder / "checkpoints" / "4") is None
    assert checkpoint_files.damage(folder / "checkpoints" / "8") is None


def test_a_run_folder_that_is_a_file_is_named(refusal, tmp_path):
    (tmp_path / "file").write_text("")
    assert f"--out = '{tmp_path / 'file'}'" in refusal(out=tmp_path / "file")
    assert f"--out = '{tmp_path / 'file' / 'run'}'" in refusal(out=tmp_path / "file" / "run")
