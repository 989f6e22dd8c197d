"""Text sources: what is held out is disjoint, hashes identify the text, and a bad file is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.sources import FileText, StdlibText, Text, data_directories, find_file, hash_documents, stdlib_split
from sparsejax.plugs import ConfigError, resolve


@pytest.fixture(scope="module")
def stdlib():
    return StdlibText()


def test_stdlib_splits_share_no_document(stdlib):
    train, evaluation = (set(stdlib.documents(s)) for s in ("train", "evaluation"))
    assert train and evaluation and not train & evaluation


def test_stdlib_holds_out_between_a_twentieth_and_a_fifth_of_the_bytes(stdlib):
    held_out = sum(len(d.encode()) for d in stdlib.documents("evaluation"))
    assert 0.05 < held_out / stdlib.size_bytes < 0.2


def test_stdlib_is_the_same_text_every_time(stdlib):
    again = StdlibText()
    assert again.fingerprint == stdlib.fingerprint
    assert again.documents("train") == stdlib.documents("train")


def test_a_module_keeps_its_split_whatever_other_modules_exist():
    assert {stdlib_split("json/decoder.py") for _ in range(3)} == {stdlib_split("json/decoder.py")}
    assert stdlib_split("argparse.py") in ("train", "evaluation")


@given(st.text(min_size=8))
def test_a_text_file_is_cut_into_all_of_its_characters(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    corpus = FileText(path)
    (train,), (evaluation,) = corpus.documents("train"), corpus.documents("evaluation")
    assert train + evaluation == text
    assert 0 <= len(text.encode()) * 9 // 10 - len(train.encode()) < 4


def test_borders_between_documents_count_in_the_hash():
    assert hash_documents([["ab"], ["c"]]) != hash_documents([["a", "b"], ["c"]])
    assert hash_documents([["ab"], ["c"]]) != hash_documents([["ab", "c"], []])


def test_a_missing_file_names_every_place_that_was_tried(tmp_path):
    with pytest.raises(ConfigError, match=f"no such file.*{tmp_path}/nothing.txt"):
        find_file("nothing.txt", [tmp_path], "data.source")


def test_an_empty_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ConfigError, match="is empty"):
        Text("empty.txt").open([tmp_path])
    with pytest.raises(ConfigError, match="is a folder"):
        Text(str(tmp_path)).open([])


def test_invalid_utf8_is_named_with_its_byte_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine \xc3\xa9 so far" + b"\xff" + b"more")
    with pytest.raises(ConfigError, match=r"bad.txt: not valid UTF-8: byte 0xff at offset 14"):
        Text("bad.txt").open([tmp_path]).documents("train")


def test_one_character_cannot_be_split(tmp_path):
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ConfigError, match="too short"):
        Text("one.txt").open([tmp_path]).documents("train")


def test_a_path_may_hold_commas_and_equals_signs():
    assert resolve("source", "text:/data/a=b,c:d.txt") == Text("/data/a=b,c:d.txt")


def test_data_directories_are_looked_at_in_their_order(tmp_path, monkeypatch):
    (tmp_path / "shared/data").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARSEJAX_DATA", str(tmp_path / "elsewhere"))
    assert [d.name for d in data_directories()] == ["elsewhere", "data"]
    assert data_directories(str(tmp_path)) == (tmp_path,)
    with pytest.raises(ConfigError, match="data.data_dir = 'nowhere'"):
        data_directories("nowhere")
