"""What lies beside the weights is read from folders and archives alike, and what is wrong with it is told by file and key."""

import json
import zipfile
from pathlib import Path

import pytest

from sparsejax.io import hub
from sparsejax.io.hf_folder import read_hf
from sparsejax.plugs import ConfigError

FILES = {
    "config.json": {"model_type": "llama", "hidden_size": 8},
    "generation_config.json": {"eos_token_id": [2, 7]},
    "tokenizer.json": {"version": "1.0", "model": {}},
    "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None},
    "special_tokens_map.json": {"bos_token": "<other>", "unk_token": "<unk>"},
}


def made(path: Path, files, archive: bool = False, prefix: str = "") -> Path:
    encoded = {name: content if isinstance(content, bytes) else json.dumps(content).encode() for name, content in files.items()}
    if archive:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, content in encoded.items():
                out.writestr(prefix + name, content)
    else:
        path.mkdir()
        for name, content in encoded.items():
            (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(("archive", "prefix"), [(False, ""), (True, ""), (True, "model/")])
def test_all_files_are_read(tmp_path, archive, prefix):
    path = made(tmp_path / "m", FILES, archive, prefix)
    files = read_hf(path)
    assert files.path == path and files.config == FILES["config.json"] and files.generation == FILES["generation_config.json"]
    assert json.loads(files.tokenizer_json) == FILES["tokenizer.json"]
    assert files.special_tokens == {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
    assert files.chat_template is None


def test_only_the_config_must_be_there(tmp_path):
    files = read_hf(made(tmp_path / "m", {"config.json": FILES["config.json"]}))
    assert (files.generation, files.tokenizer_json, files.tokenizer_config, files.special_tokens) == ({}, None, {}, {})
    with pytest.raises(ConfigError, match="holds no config.json, but 'tokenizer.json'"):
        read_hf(made(tmp_path / "n", {"tokenizer.json": {}}))


def test_the_chat_template_is_found_wherever_it_is_kept(tmp_path):
    config = {"config.json": FILES["config.json"]}
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for number, (template, jinja, expected) in enumerate(
        [("{{ a }}", None, "{{ a }}"), (several, None, "D"), ("{{ a }}", "{{ ü }}".encode(), "{{ ü }}")]
    ):
        extra = {"chat_template.jinja": jinja} if jinja else {}
        path = made(tmp_path / str(number), {**config, "tokenizer_config.json": {"chat_template": template}, **extra})
        assert read_hf(path).chat_template == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{'model_type': 1}", "not valid JSON"),
        ("config.json", b"\xff\xfe", "not UTF-8 at byte 0"),
        ("config.json", b"[]", "expected a JSON object"),
        ("config.json", b"", "not valid JSON"),
        ("config.json", b'{"model_type": "a", "model_type": "b"}', "'model_type' is given twice"),
        ("config.json", b'{"a": ' * 100_000, "not valid JSON"),
        ("config.json", {"hidden_size": 8}, "model_type is missing; the file holds 'hidden_size'"),
        ("config.json", {"model_type": 3}, "model_type = 3: expected a string"),
        ("generation_config.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"\x80", "not UTF-8"),
        ("tokenizer_config.json", {"chat_template": 3}, "expected a string, or a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "expected a string, or a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": ""}]}, "none is named 'default'"),
        ("chat_template.jinja", b"\xc3", "not UTF-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = made(tmp_path / "m", {**FILES, name: content})
    with pytest.raises(ConfigError) as error:
        read_hf(path)
    assert message in str(error.value) and name in str(error.value) and len(str(error.value)) < 1000


def test_a_special_token_that_is_no_text_is_named(tmp_path):
    files = read_hf(made(tmp_path / "m", {**FILES, "tokenizer_config.json": {"eos_token": {"id": 3}, "bos_token": 5}}))
    with pytest.raises(ConfigError, match="bos_token = 5"):
        assert files.special_tokens


def test_a_byte_order_mark_is_no_part_of_the_json(tmp_path):
    marked = b"\xef\xbb\xbf" + json.dumps(FILES["config.json"]).encode()
    assert read_hf(made(tmp_path / "m", {"config.json": marked})).config == FILES["config.json"]


def test_the_real_archive_is_read():
    try:
        located = hub.resolve("minilm-l6")
    except ConfigError as error:
        pytest.skip(str(error))
    files = read_hf(located.path)
    assert files.config["model_type"] == "bert" and files.config["num_hidden_layers"] == 6
    assert files.special_tokens["cls"] == "[CLS]" and files.tokenizer_json and files.generation == {}
