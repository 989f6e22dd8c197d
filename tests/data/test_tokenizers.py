"""Tokenizers: text survives, special ids stay out of it, every id knows its bytes, and a bad file is named."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.sources import LoadedText
from sparsejax.data.tasks import MaskedLM
from sparsejax.data.tokenizers import Bpe, Bytes, File, _training_texts, train_bpe
from sparsejax.plugs import ConfigError, resolve

SAMPLE = "the cat sat on the mat; the naïve coöperation of 猫 and 🎉\n" * 20


class Sample(LoadedText):
    name = "sample"

    def load(self):
        return {"train": [SAMPLE, SAMPLE.upper()], "evaluation": ["held out"]}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tokenizers(cache, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    path.write_text(train_bpe([SAMPLE], 300).to_str())
    return {"bytes": Bytes().build(Sample(), 5, ()), "bpe": Bpe(400).build(Sample(), 5, ()),
            "file": File(str(path)).build(Sample(), 5, ())}


@pytest.mark.parametrize("name", ["bytes", "bpe", "file"])
@given(text=st.text())
def test_text_survives_encoding_and_decoding(tokenizers, name, text):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert (ids < tokenizer.num_ordinary).all()


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_special_ids_are_distinct_beyond_text_and_left_out_when_decoding(tokenizers, name):
    t = tokenizers[name]
    special = [t.pad_id, t.bos_id, t.eos_id, t.mask_id, *t.mode_ids.values(), *t.sentinel_ids.tolist()]
    assert len(set(special)) == 12 and t.num_ordinary <= min(special) and max(special) < t.vocab_size
    assert t.token_bytes[special].sum() == 0 and t.token_bytes.shape == (t.vocab_size,)
    assert t.decode([t.bos_id, *t.encode("née").tolist(), t.eos_id, t.pad_id]) == "née"


@pytest.mark.parametrize("name", ["bytes", "bpe", "file"])
def test_a_batch_is_encoded_as_its_texts_are(tokenizers, name):
    texts = ["the cat", "", "猫 🎉"]
    one_by_one = [tokenizers[name].encode(t).tolist() for t in texts]
    assert [b.tolist() for b in tokenizers[name].encode_batch(texts)] == one_by_one


def test_bytes_are_their_own_ids_and_the_vocabulary_is_a_multiple_of_eight():
    tokenizer = Bytes().build(Sample(), 0, ())
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.vocab_size == Bytes().declared_vocab_size(0) == 264
    assert tokenizer.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"


def test_bpe_is_shorter_than_bytes_and_has_exactly_the_vocabulary_asked_for(tokenizers):
    assert tokenizers["bpe"].vocab_size == Bpe(400).declared_vocab_size(5) == 400
    assert len(tokenizers["bpe"].encode(SAMPLE)) < len(SAMPLE.encode()) / 3


def test_bpe_is_read_from_its_cache_and_a_damaged_entry_is_replaced(cache, tokenizers, monkeypatch):
    entry = next(cache.glob("bpe-*.json"))
    text = entry.read_text()
    entry.write_text(text[: len(text) // 2])
    assert Bpe(400).build(Sample(), 5, ()).fingerprint == tokenizers["bpe"].fingerprint
    assert entry.read_text() == text
    monkeypatch.setattr("sparsejax.data.tokenizers.train_bpe", None)  # a second training would fail
    assert Bpe(400).build(Sample(), 5, ()).fingerprint == tokenizers["bpe"].fingerprint


def test_fingerprints_tell_tokenizers_apart(tokenizers):
    assert len({t.fingerprint for t in tokenizers.values()} | {Bytes().build(Sample(), 0, ()).fingerprint}) == 4


def write_tokenizer(path, model, **parts):
    path.write_text(json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                                "pre_tokenizer": None, "post_processor": None, "decoder": None, "model": model, **parts}))
    return path


def test_published_special_tokens_of_a_file_are_used_and_missing_ones_appended(tmp_path):
    names = ["<pad>", "</s>", "<extra_id_0>", "<extra_id_1>", "cat"]
    added = [{"id": i, "content": n, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
              "special": True} for i, n in enumerate(names[:4])]
    model = {"type": "WordLevel", "vocab": {n: i for i, n in enumerate(names)}, "unk_token": "<pad>"}
    path = write_tokenizer(tmp_path / "t.json", model, added_tokens=added)
    tokenizer = File("t.json").build(Sample(), 3, (tmp_path,))
    assert path.is_file() and (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.mask_id) == (0, 1, 1, None)
    assert tokenizer.mode_ids == {"R": 5, "S": 6, "X": 7}
    assert tokenizer.sentinel_ids.tolist() == [2, 3, 8] and tokenizer.vocab_size == 9
    assert tokenizer.encode("cat").tolist() == [4] and tokenizer.token_bytes.tolist() == [0, 0, 0, 0, 3, 0, 0, 0, 0]


def test_a_file_with_an_end_token_needs_no_further_ids_for_causal_lm_and_cannot_serve_masked_lm(tmp_path):
    model = {"type": "WordLevel", "vocab": {"cat": 0, "<|endoftext|>": 1}, "unk_token": "cat"}
    path = write_tokenizer(tmp_path / "t.json", model)
    tokenizer = File(str(path)).build(Sample(), 0, ())
    assert tokenizer.vocab_size == 2 and tokenizer.pad_id == tokenizer.bos_id == tokenizer.eos_id == 1
    with pytest.raises(ConfigError, match="has no mask token"):
        MaskedLM().check_tokenizer(tokenizer)


def test_a_cache_that_cannot_be_written_costs_a_warning_alone(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEJAX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="could not be kept"):
        assert Bpe(300).build(Sample(), 0, ()).vocab_size == 300


def test_a_large_corpus_trains_on_evenly_spaced_documents(monkeypatch):
    monkeypatch.setattr("sparsejax.data.tokenizers.TRAINING_BYTES", 10)

    class Many(LoadedText):
        def load(self):
            return {"train": [f"{i:04}" + "x" * 20 for i in range(100)], "evaluation": [""]}

    texts = list(_training_texts(Many()))
    assert len(texts) == 1 and texts[0] == "0000xxxxxx"
    monkeypatch.setattr("sparsejax.data.tokenizers.TRAINING_BYTES", 240)
    assert [t[:4] for t in _training_texts(Many())] == [f"{i:04}" for i in range(0, 100, 10)]


def test_bytes_of_byte_fallback_and_of_word_pieces_are_counted(tmp_path):
    vocabulary = {"<unk>": 0, "<0xE7>": 1, "\u2581the": 2, "##ing": 3}
    path = write_tokenizer(tmp_path / "t.json", {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"})
    assert File(str(path)).build(Sample(), 0, ()).token_bytes[1:4].tolist() == [1, 4, 3]


@pytest.mark.parametrize("text", ["not json", "{}", '{"model": {"type": "BPE"}}', "\udcff"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="tokenizer.json: not a usable tokenizer.json"):
        File(str(path)).build(Sample(), 0, ())


@pytest.mark.parametrize(("spec", "message"), [
    ("byte", "Did you mean 'bytes'"), ("bpe", "needs vocab"), ("bpe:many", "expected int"),
    ("bpe:100", "bpe.vocab = 100: must lie in")])
def test_a_bad_tokenizer_spec_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve("tokenizer", spec)


def test_a_vocabulary_too_small_for_its_special_ids_is_refused():
    with pytest.raises(ConfigError, match="bpe.vocab = 300: bytes and special ids need at least 363"):
        Bpe(300).declared_vocab_size(100)
