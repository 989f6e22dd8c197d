"""Tokenizers rebuilt from GGUF metadata, against the library's own and a slow SentencePiece."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.tokenizers import published, train_bpe
from sparsejax.io.chat import render_chat
from sparsejax.io.gguf_tokenizer import BYTE, CONTROL, NORMAL, PRE_TOKENIZERS, UNKNOWN, USER_DEFINED, tokenizer_from_gguf
from sparsejax.plugs import ConfigError

ACCENTED = "\N{LATIN SMALL LETTER E WITH ACUTE}"
TEXT = [f"The 1234 cats' 5 hats, we'll see; it's  two\n\n lines\tin 2024 {ACCENTED}t\N{SNOWMAN} ab12cd3"] * 3
TEXTS = st.text(alphabet=st.characters(codec="utf-8"), max_size=40) | st.text("ab 1'st\n.,E", max_size=40)
SPECIALS = ["<|end|>", "<|start|>"]
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@pytest.fixture(scope="session")
def trained():
    return json.loads(train_bpe(TEXT, 330).to_str())["model"]


def byte_level_metadata(trained, pre="gpt-2", **changed):
    tokens = [*SPECIALS, *sorted(trained["vocab"], key=trained["vocab"].get), "[user]"]
    types = [CONTROL] * 2 + [NORMAL] * len(trained["vocab"]) + [USER_DEFINED]
    merges = [" ".join(pair) for pair in trained["merges"]]
    values = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": (5, types), "merges": merges, "bos_token_id": 1,
              "eos_token_id": 0, **changed}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@pytest.fixture
def rebuilt(gguf_bytes, open_bytes):
    return lambda metadata: tokenizer_from_gguf(open_bytes(gguf_bytes(metadata, {})))


def library(trained, *cuts):
    """The tokenizer of the library that a published tokenizer.json would describe; ids are two lower."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(trained["vocab"], [tuple(pair) for pair in trained["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


@pytest.mark.parametrize("pre", ["gpt-2", "smollm"])
def test_byte_level_ids_equal_those_of_the_published_pre_tokenizer(rebuilt, trained, pre):
    from tokenizers import pre_tokenizers

    ours = rebuilt(byte_level_metadata(trained, pre)).tokenizer
    theirs = library(trained, *([pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []))

    @given(TEXTS)
    def check(text):
        found = ours.encode(text)
        assert found.ids == [number + 2 for number in theirs.encode(text).ids]
        assert ours.decode(found.ids, skip_special_tokens=False) == text

    check()


@pytest.mark.parametrize("pre, pieces", [
    ("default", ["a", "123", "4", " b", "!?", "  ", " c", "'", "ll"]),
    ("gpt-2", ["a", "1234", " b", "!?", "  ", " c", "'ll"]),
    ("smollm", ["a", "1", "2", "3", "4", " b", "!?", "  ", " c", "'ll"]),
    ("llama-bpe", ["a", "123", "4", " b", "!?", "  ", " c", "'ll"]),
    ("qwen2", ["a", "1", "2", "3", "4", " b", "!?", "  ", " c", "'ll"]),
])  # fmt: skip
def test_text_is_cut_as_the_pre_tokenizer_says(rebuilt, trained, pre, pieces):
    tokenizer = rebuilt(byte_level_metadata(trained, pre)).tokenizer
    cut = tokenizer.pre_tokenizer.pre_tokenize_str("a1234 b!?   c'll")
    assert [piece.replace("\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", " ") for piece, _ in cut] == pieces


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_gives_back_its_text(rebuilt, trained, pre):
    tokenizer = rebuilt(byte_level_metadata(trained, pre)).tokenizer
    assert tokenizer.decode(tokenizer.encode(TEXT[0]).ids) == TEXT[0]


def test_control_and_user_tokens_are_found_in_text_and_told_apart(rebuilt, trained):
    found = rebuilt(byte_level_metadata(trained))
    last = len(trained["vocab"]) + 2
    ids = found.tokenizer.encode("<|start|>a[user]b<|end|>").ids
    assert (ids[0], ids[2], ids[4]) == (1, last, 0)
    assert found.tokenizer.decode(ids, skip_special_tokens=True) == "a[user]b"
    assert found.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert (found.bos_id, found.eos_id, found.pad_id, found.unk_id, found.stop_ids) == (1, 0, None, None, (0,))


@pytest.mark.parametrize("pre, stated, expected", [
    ("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False),
])  # fmt: skip
def test_the_first_token_is_added_as_the_file_or_else_its_kind_says(rebuilt, trained, pre, stated, expected):
    found = rebuilt(byte_level_metadata(trained, pre, add_bos_token=stated))
    assert found.add_bos is expected
    assert (found.tokenizer.encode("a").ids[0] == 1) is expected
    assert found.tokenizer.encode("a", add_special_tokens=False).ids[0] != 1
    assert published(found.tokenizer, eos=0, bos=1).prefix_ids == ((1,) if expected else ())


def test_turn_ends_stop_a_model_too(rebuilt, trained):
    found = rebuilt(byte_level_metadata(trained, eot_token_id=5, eom_token_id=0, add_eos_token=True))
    assert found.stop_ids == (0, 5)
    assert found.tokenizer.encode("a").ids[-1] == 0


def test_the_published_tokenizer_counts_bytes_and_keeps_its_special_ids(rebuilt, trained):
    found = published(rebuilt(byte_level_metadata(trained)).tokenizer, eos=0, bos=1)
    assert (found.vocab_size, found.eos_id, found.bos_id, found.pad_id) == (len(trained["vocab"]) + 3, 0, 1, 0)
    text = TEXT[0]
    assert found.token_bytes[found.encode(text)].sum() == len(text.encode()) and found.token_bytes[0] == 0
    assert found.decode([1, *found.encode(text), 0]) == text
    with pytest.raises(ConfigError, match="pad id"):
        published(rebuilt(byte_level_metadata(trained)).tokenizer, eos=0, pad=10**6)


WORDS = ["ab", "abc", "bc", SPACE + "a", SPACE + "ab", SPACE + SPACE, "ca", "cab", SPACE + "c", "aa", "aab"]
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, "a", "b", "c", *WORDS]
TYPES = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (4 + len(WORDS))
SCORES = [0.0] * 259 + [-100.0] * 4 + [-1.0 - (7 * rank) % 11 for rank in range(len(WORDS))]


def sentencepiece_metadata(**changed):
    values = {"model": "llama", "tokens": PIECES, "token_type": (5, TYPES), "scores": SCORES, "bos_token_id": 1,
              "eos_token_id": 2, "unknown_token_id": 0, **changed}  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def slow_sentencepiece(text):
    """Merge the neighbours whose union has the highest score, the leftmost first; then bytes for what is unknown."""
    ordinary = {piece: score for piece, score, kind in zip(PIECES, SCORES, TYPES, strict=True) if kind == NORMAL}
    pieces = list(SPACE + text.replace(" ", SPACE)) if text else []
    while True:
        pairs = enumerate(zip(pieces, pieces[1:], strict=False))
        unions = [(ordinary[a + b], -place) for place, (a, b) in pairs if a + b in ordinary]
        if not unions:
            break
        place = -max(unions)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    known = [[piece] if piece in ordinary else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces]
    return [PIECES.index(one) for several in known for one in several]


@given(st.text(f"abc {ACCENTED}\n", max_size=24))
def test_sentencepiece_ids_equal_those_of_its_definition(gguf_bytes, open_bytes, text):
    tokenizer = tokenizer_from_gguf(open_bytes(gguf_bytes(sentencepiece_metadata(), {}))).tokenizer
    found = tokenizer.encode(text, add_special_tokens=False).ids
    assert found == slow_sentencepiece(text)
    assert tokenizer.decode(found) == text


def test_sentencepiece_adds_its_first_token_and_a_space_unless_told_otherwise(rebuilt):
    found = rebuilt(sentencepiece_metadata())
    assert found.add_bos and found.tokenizer.encode("ab").tokens == ["<s>", SPACE + "ab"]
    found = rebuilt(sentencepiece_metadata(add_bos_token=False, add_space_prefix=False))
    assert found.tokenizer.encode("ab").tokens == ["ab"] and found.tokenizer.decode(found.tokenizer.encode(" ab").ids) == " ab"


BROKEN = {
    "no tokenizer": ({"tokens": None}, "'tokenizer.ggml.tokens' is missing"),
    "an unknown kind": ({"model": "bert"}, "'tokenizer.ggml.model' = 'bert': allowed are 'gpt2', 'llama'"),
    "an unknown pre-tokenizer": ({"pre": "smolm"}, "'tokenizer.ggml.pre' = 'smolm'"),
    "tokens that are numbers": ({"tokens": [1, 2, 3]}, "'tokenizer.ggml.tokens' is a ndarray, expected list"),
    "a token twice": ({"tokens": ["a", "b", "a"]}, "'tokenizer.ggml.tokens' holds 'a' twice"),
    "too few types": ({"token_type": (5, [1, 1])}, "'tokenizer.ggml.token_type' holds 2 int32 numbers"),
    "types that are text": ({"token_type": ["1"]}, "'tokenizer.ggml.token_type' is a list"),
    "no merges": ({"merges": None}, "'tokenizer.ggml.merges' is missing"),
    "a merge of unknown tokens": ({"merges": ["a b", "a nosuch"]}, "merges["),
    "a merge without a space": ({"merges": ["ab"]}, "merges[0]' = 'ab': both parts"),
    "an id out of range": ({"eos_token_id": 10**6}, "'tokenizer.ggml.eos_token_id' = 1000000: the vocabulary has"),
    "an id that is text": ({"bos_token_id": "1"}, "'tokenizer.ggml.bos_token_id' is a str, expected int"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_tables_that_do_not_fit_together_are_refused_by_key(rebuilt, trained, case):
    changed, message = BROKEN[case]
    with pytest.raises(ConfigError) as caught:
        rebuilt(byte_level_metadata(trained, **changed))
    assert message in str(caught.value) and "model.gguf" in str(caught.value)


@pytest.mark.parametrize("changed, message", [
    ({"scores": None}, "'tokenizer.ggml.scores' is missing"),
    ({"scores": [0.0]}, "holds 1 float32 numbers"),
    ({"scores": [float("nan")] * len(PIECES)}, "numbers that are not finite"),
    ({"tokens": [*PIECES[:-1], "a" * 100_000]}, f"tokens[{len(PIECES) - 1}]' has 100000 characters"),
])  # fmt: skip
def test_scores_that_are_no_scores_are_refused(rebuilt, changed, message):
    with pytest.raises(ConfigError) as caught:
        rebuilt(sentencepiece_metadata(**changed))
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_flipped_bits_are_refused_or_give_a_tokenizer_that_works(gguf_bytes, open_bytes, trained, kind):
    metadata = byte_level_metadata(trained) if kind == "gpt2" else sentencepiece_metadata()
    whole = gguf_bytes(metadata, {})

    @given(st.data())
    def check(data):
        content = bytearray(whole)
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(24, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        try:
            found = tokenizer_from_gguf(open_bytes(bytes(content)))
        except ConfigError as error:
            assert "model.gguf" in str(error)
        else:
            found.tokenizer.decode(found.tokenizer.encode("ab 12 " + ACCENTED).ids)

    check()


def test_smollm2_round_trips_text_and_splits_digits(smollm2):
    found = tokenizer_from_gguf(smollm2)
    tokenizer = found.tokenizer
    assert tokenizer.encode("Hello world! 123").tokens[-4:] == ["\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}", "1", "2", "3"]
    assert (found.bos_id, found.eos_id, found.pad_id, found.add_bos, found.stop_ids) == (1, 2, 2, False, (2,))
    prompt = render_chat(found.chat_template, [{"role": "user", "content": "Hi"}], special_tokens=found.special_tokens)
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode(prompt).ids.count(1) == 3
    codec = published(tokenizer, eos=2, bos=1, pad=2)
    assert codec.vocab_size == 49152 and codec.prefix_ids == ()
    data = Path(os.environ.get("SPARSEJAX_DATA", Path(__file__).parents[3] / "shared" / "data")) / "wikitext2_test.txt"
    if not data.is_file():
        pytest.skip(f"needs {data}")
    text = data.read_text(encoding="utf-8")[:200_000]
    ids = codec.encode(text)
    assert codec.decode(ids) == text and codec.token_bytes[ids].sum() == len(text.encode())
    assert np.mean(ids >= 17) == 1  # no control token comes of plain text
