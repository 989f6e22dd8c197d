"""What sentence-transformers writes beside a model, in folders and archives."""

import json
import zipfile

import pytest

from sparsejax.io.sentence_embedding import read_sentence_embedding
from sparsejax.plugs import ConfigError

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
]
POOLING = {"word_embedding_dimension": 384, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
FILES = {"modules.json": MODULES, "1_Pooling/config.json": POOLING, "sentence_bert_config.json": {"max_seq_length": 256}}


def written(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return tmp_path


def test_a_folder_says_how_to_pool_and_whether_to_normalize(tmp_path):
    assert read_sentence_embedding(written(tmp_path, FILES)) == {"pool": "mean", "normalized": True, "max_length": 256}


def test_the_first_token_without_normalizing_or_a_length(tmp_path):
    pooling = {**POOLING, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    files = {"modules.json": MODULES[:2], "1_Pooling/config.json": pooling}
    assert read_sentence_embedding(written(tmp_path, files)) == {"pool": "class", "normalized": False, "max_length": 0}


@pytest.mark.parametrize("folder", ["", "model/"])
def test_an_archive_is_read_as_a_folder_is(tmp_path, folder):
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        for name, content in {**FILES, "2_Other/modules.json": []}.items():
            archive.writestr(folder + name, json.dumps(content))
    assert read_sentence_embedding(tmp_path / "model.zip")["max_length"] == 256


def test_another_model_has_none(tmp_path):
    assert read_sentence_embedding(tmp_path) == {}


DENSE = {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}
REFUSED = [
    ({"modules.json": [*MODULES[:2], DENSE]}, "'Dense'"),
    ({"modules.json": MODULES[:1]}, "Transformer then Pooling"),
    ({"modules.json": {}}, "expected a list of modules"),
    ({"modules.json": "["}, "not readable as JSON"),
    ({"1_Pooling/config.json": {**POOLING, "pooling_mode_cls_token": True}}, "one way to pool"),
    ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pooling_mode_max_tokens"),
    ({"sentence_bert_config.json": {"max_seq_length": -1}}, "max_seq_length"),
]


@pytest.mark.parametrize(("changes", "part"), REFUSED, ids=[part for _, part in REFUSED])
def test_what_is_not_understood_is_refused(tmp_path, changes, part):
    with pytest.raises(ConfigError, match=part):
        read_sentence_embedding(written(tmp_path, {**FILES, **changes}))


def test_a_pooling_that_is_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"1_Pooling/config\.json is missing"):
        read_sentence_embedding(written(tmp_path, {"modules.json": MODULES}))
