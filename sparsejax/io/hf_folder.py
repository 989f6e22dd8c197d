"""What lies beside the weights in a Hugging Face folder or zip archive: config, generation config, tokenizer, chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsejax.io.files import Files, listed, open_files, read_object, read_text, refuse_unless
from sparsejax.plugs import ConfigError, check

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class HfFiles:
    """The files, parsed but not interpreted; a file that is not there is an empty dict or None.

    config: `config.json`; `config["model_type"]` is a string.
    generation: `generation_config.json`.
    tokenizer_json: text of `tokenizer.json`, UTF-8, for the tokenizers library to parse.
    tokenizer_config: `tokenizer_config.json`, with the entries of `special_tokens_map.json` that it lacks.
    chat_template: Jinja source; `chat_template.jinja` comes before the template in `tokenizer_config.json`, and where that
      holds several it is the one named `default`.
    """

    path: Path
    config: dict[str, Any]
    generation: dict[str, Any]
    tokenizer_json: str | None
    tokenizer_config: dict[str, Any]
    chat_template: str | None

    @property
    def special_tokens(self) -> dict[str, str]:
        """The text of each special token that the tokenizer names, by role as in `ROLES`."""
        found = {}
        for role in ROLES:
            token = self.tokenizer_config.get(f"{role}_token")
            text = token.get("content") if isinstance(token, dict) else token
            where = f"{self.path}: tokenizer_config.json: {role}_token"
            refuse_unless(text is None or isinstance(text, str), where, token, "expected a string, or an object with content")
            if text is not None:
                found[role] = text
        return found


def read_hf(path: str | Path) -> HfFiles:
    """Read all but the weights of a folder or zip archive.

    Raises:
      ConfigError: no `config.json` or one without `model_type`; a file that is not UTF-8, not JSON, gives a key twice or holds
        something else than an object; a chat template that is no text.
    """
    files = open_files(Path(path))
    check("config.json" in files.names, "model", str(path), f"holds no config.json, but {listed(files.names)}")
    config = read_object(files, "config.json")
    where = files.where("config.json")
    if "model_type" not in config:
        raise ConfigError(f"{where}: model_type is missing; the file holds {listed(config)}")
    refuse_unless(isinstance(config["model_type"], str), f"{where}: model_type", config["model_type"], "expected a string")
    tokenizer_config = _object(files, "special_tokens_map.json") | _object(files, "tokenizer_config.json")
    return HfFiles(
        path=Path(path),
        config=config,
        generation=_object(files, "generation_config.json"),
        tokenizer_json=read_text(files, "tokenizer.json") if "tokenizer.json" in files.names else None,
        tokenizer_config=tokenizer_config,
        chat_template=_chat_template(files, tokenizer_config),
    )


def _object(files: Files, name: str) -> dict[str, Any]:
    return read_object(files, name) if name in files.names else {}


def _chat_template(files: Files, tokenizer_config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files.names:
        return read_text(files, "chat_template.jinja")
    template = tokenizer_config.get("chat_template")
    if template is None or isinstance(template, str):
        return template
    where = f"{files.where('tokenizer_config.json')}: chat_template"
    named = isinstance(template, list) and all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template")) for entry in template
    )
    check(named, where, type(template).__name__, "expected a string, or a list of objects with name and template")
    by_name = {entry["name"]: entry["template"] for entry in template}
    check("default" in by_name, where, listed(by_name), "several templates and none is named 'default'")
    return by_name["default"]
