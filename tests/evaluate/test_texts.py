"""Which text a name means, byte for byte."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.sources import StdlibText, data_directories
from sparsejax.data.tokenizers import Bytes, LibraryCodec, train_bpe
from sparsejax.evaluate.texts import join_rows, open_text, split_specs
from sparsejax.plugs import ConfigError

PUBLISHED = " \n = Title = \n \n He had a guest @-@ starring role . \n On stage . \n"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_rows_of_wikitext_are_joined_as_the_published_data_set_gives_them():
    rows = ["", " = Title = \n", "", " He had a guest @-@ starring role . \n", " On stage . \n"]
    assert join_rows(PUBLISHED) == "\n\n".join(rows)


@given(st.lists(st.sampled_from([" ", " a b ", "x", " = T = ", "\u2028 y"]), min_size=1, max_size=8))
def test_joining_keeps_every_row_and_changes_nothing_else(lines):
    joined = join_rows("".join(f"{line}\n" for line in lines))
    assert joined == "\n\n".join("" if not line.strip() else f"{line}\n" for line in lines)
    assert join_rows("".join(f"{line}\n" for line in lines)[:-1]).rstrip("\n") == joined.rstrip("\n")


def test_wikitext_is_found_by_name_and_its_variants_are_told_apart(tmp_path):
    write(tmp_path, "wikitext2_test.txt", PUBLISHED)
    raw = open_text("wikitext2", "", [tmp_path])
    assert (raw.name, raw.rule) == ("wikitext2", "rows joined with a blank line")
    assert raw.text == join_rows(PUBLISHED) and raw.path == str(tmp_path / "wikitext2_test.txt")
    rare = open_text("wikitext2", str(write(tmp_path, "valid.txt", PUBLISHED.replace("guest", "<unk>"))), [])
    assert rare.name == "wikitext2-tok"
    before = open_text("wikitext2", str(write(tmp_path, "joined.txt", join_rows(PUBLISHED))), [])
    assert before.text == raw.text and before.sha256 == raw.sha256 and "joined before" in before.rule


def test_the_hash_is_that_of_the_text_scored(tmp_path):
    found = open_text("text", "a.txt", [write(tmp_path, "a.txt", "nur zwölf\n").parent])
    assert found.sha256 == hashlib.sha256("nur zwölf\n".encode()).hexdigest() and found.name == "text:a.txt"


@given(st.text(alphabet="aé漢🙂", min_size=2, max_size=40))
def test_the_halves_of_a_sample_are_the_whole_and_cut_no_character(tmp_path_factory, text):
    folder = write(tmp_path_factory.mktemp("data"), "c4_sample.txt", text).parent
    calibration, evaluation = (open_text("c4_sample", split, [folder]) for split in ("calibration", "evaluation"))
    assert calibration.text + evaluation.text == text
    half = len(text.encode()) // 2
    assert half - 4 < len(calibration.text.encode()) <= half
    assert open_text("c4_sample", "", [folder]) == evaluation


def test_the_splits_of_the_library_are_disjoint_modules():
    texts = {split: open_text("stdlib", split, []) for split in ("calibration", "evaluation")}
    calibration, evaluation = (set(StdlibText().documents(name)) for name in ("train", "evaluation"))
    assert not calibration & evaluation
    assert all(document in texts["evaluation"].text for document in evaluation)
    assert texts["evaluation"].name == "stdlib:evaluation" and len(texts["calibration"].text) > len(texts["evaluation"].text)


def test_entries_are_separated_by_commas_or_repeated():
    expected = [("wikitext2", "a/b.txt"), ("stdlib", ""), ("text", "c.txt")]
    assert split_specs(["wikitext2:a/b.txt, stdlib", "text:c.txt"]) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "what to evaluate"), (["a,,b"], "empty entry"), (["text:"], "nothing follows"), (["stdlib,stdlib"], "given twice")],
)
def test_entries_that_say_nothing_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        split_specs(given)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("wikitext", "", "Did you mean 'wikitext2'"),
        ("c4_sample", "test", "allowed are 'calibration', 'evaluation'"),
        ("stdlib", "evaluate", "Did you mean 'evaluation'"),
        ("text", "", "give the file: text:PATH"),
        ("text", "none.txt", "no such file; looked at .*none.txt"),
        ("wikitext2", "", "no such file; looked at .*wikitext2_test.txt"),
        ("text", "empty.txt", "is empty"),
        ("text", "blank.txt", "nothing but blanks"),
        ("text", "latin.txt", "latin.txt: not valid UTF-8: byte 0xe9 at offset 3"),
        ("text", ".", "is a folder"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_with_file_and_reason(tmp_path, name, argument, message):
    for file, content in (("empty.txt", b""), ("blank.txt", b" \n\n"), ("latin.txt", b"caf\xe9")):
        write(tmp_path, file, content)
    with pytest.raises(ConfigError, match=message):
        open_text(name, argument, [tmp_path])


def test_a_data_folder_that_is_given_is_the_only_one(tmp_path):
    write(tmp_path, "a.txt", "here")
    assert open_text("text", "a.txt", data_directories(str(tmp_path))).text == "here"


def test_special_ids_before_a_text_are_those_of_the_tokenizers_own_template():
    from tokenizers import processors

    plain = train_bpe(["a b c"], 260)
    assert LibraryCodec(plain).prefix_ids == ()
    plain.add_special_tokens(["<s>", "</s>"])
    ends = [(token, plain.token_to_id(token)) for token in ("<s>", "</s>")]
    plain.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert LibraryCodec(plain).prefix_ids == (ends[0][1],)
    assert Bytes().build(None, 0, ()).prefix_ids == ()
