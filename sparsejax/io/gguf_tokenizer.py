"""The tokenizer that a GGUF file carries in its metadata, rebuilt for the `tokenizers` library.

Two kinds exist there for language models: `gpt2`, byte-level BPE with explicit merges, and `llama`, a SentencePiece BPE whose
merges follow from the scores of its pieces. How text is cut before merging is only named in the file (`tokenizer.ggml.pre`);
the expressions are those of llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.io.gguf import GgufFile
from sparsejax.plugs import ConfigError, check_choice

MODELS = ("gpt2", "llama")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # token types
LONGEST_PIECE = 512  # characters of a SentencePiece piece; splitting one takes time in the square of it
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space
# Ids of tokens that end what a model says, beside the end of text: of a turn, of a message.
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before BPE: by each expression in turn, matches and what lies between them both kept.

    Fields:
      whole_words: a piece that is a token is taken as it is, whatever the merges would make of it.
      add_bos: whether a text begins with the beginning-of-text token where the file does not say.
      nfc: the text is normalised first.
    """

    expressions: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    nfc: bool = False


_DIGIT_BY_DIGIT = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_WORDS % r"\p{N}{1,3}",), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((_WORDS % r"\p{N}",), nfc=True)
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais"), PreTokenizer((_GPT2,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGIT_BY_DIGIT),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "stablelm2"), _QWEN2),
}


@dataclass(frozen=True)
class GgufTokenizer:
    """A tokenizer of the `tokenizers` library, and what else the file says of its vocabulary.

    `stop_ids` end what a model generates (`eos_id` is the first, where there is one); `special_tokens` are `bos_token` and the
    like, as chat templates name them. Encoding with special tokens adds what the file asks for (`add_bos`, `add_eos`).
    """

    tokenizer: Any
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    unk_id: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    special_tokens: Mapping[str, str]
    chat_template: str | None


def tokenizer_from_gguf(gguf: GgufFile) -> GgufTokenizer:
    """Rebuild the tokenizer of a file.

    Raises:
      ConfigError: no tokenizer, a kind or pre-tokenizer that is not known, or tables that do not fit together; names the key.
    """
    vocabulary = _Vocabulary(gguf)
    model = vocabulary.get("model", str)
    check_choice(f"{gguf.path}: metadata 'tokenizer.ggml.model'", model, MODELS)
    if model == "gpt2":
        tokenizer, add_bos = _byte_level(vocabulary)
    else:
        tokenizer, add_bos = _sentencepiece(vocabulary), True
    tokenizer.add_tokens(vocabulary.added())
    ids = {name: vocabulary.token_id(f"{key}_token_id") for name, key in
           (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))}
    add_bos = vocabulary.get("add_bos_token", bool, default=add_bos)
    add_eos = vocabulary.get("add_eos_token", bool, default=False)
    _add_ends(tokenizer, vocabulary, ids["bos"] if add_bos else None, ids["eos"] if add_eos else None)
    stops = dict.fromkeys(number for key in STOP_KEYS if (number := vocabulary.token_id(key)) is not None)
    return GgufTokenizer(
        tokenizer, ids["bos"], ids["eos"], ids["pad"], ids["unk"], tuple(stops), add_bos, add_eos,
        {f"{name}_token": vocabulary.tokens[number] for name, number in ids.items() if number is not None},
        chat_template(gguf))


def chat_template(gguf: GgufFile) -> str | None:
    """The file's chat template, Jinja2."""
    template = gguf.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ConfigError(f"{gguf.path}: metadata 'tokenizer.chat_template' is a {type(template).__name__}, expected str")
    return template


class _Vocabulary:
    """The tables below `tokenizer.ggml.`, checked against each other."""

    def __init__(self, gguf: GgufFile):
        self.path: Path = gguf.path
        self.metadata = gguf.metadata
        self.tokens = self.strings("tokens")
        self.numbers = {token: number for number, token in enumerate(self.tokens)}
        if len(self.numbers) < len(self.tokens):
            again = next(token for number, token in enumerate(self.tokens) if self.numbers[token] != number)
            raise self.error("tokens", f"holds {again!r} twice")
        self.types = self.column("token_type", "iu", default=NORMAL).tolist()

    def error(self, key: str, message: str) -> ConfigError:
        return ConfigError(f"{self.path}: metadata 'tokenizer.ggml.{key}' {message}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        found = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if found is None:
            raise self.error(key, "is missing")
        if type(found) is not kind:
            raise self.error(key, f"is a {type(found).__name__}, expected {kind.__name__}")
        return found

    def strings(self, key: str) -> list[str]:
        found = self.get(key, list)
        if not found or not all(type(one) is str for one in found):
            raise self.error(key, "is no array of strings, or an empty one")
        return found

    def column(self, key: str, kinds: str, default: float | None = None) -> np.ndarray:
        """One number for each token."""
        if default is not None and f"tokenizer.ggml.{key}" not in self.metadata:
            return np.full(len(self.tokens), default)
        found = self.get(key, np.ndarray)
        if found.dtype.kind not in kinds or len(found) != len(self.tokens):
            raise self.error(key, f"holds {len(found)} {found.dtype} numbers; there are {len(self.tokens)} tokens")
        return found

    def token_id(self, key: str) -> int | None:
        if f"tokenizer.ggml.{key}" not in self.metadata:
            return None
        found = self.get(key, int)
        if not 0 <= found < len(self.tokens):
            raise self.error(key, f"= {found}: the vocabulary has {len(self.tokens)} tokens")
        return found

    def added(self) -> list[Any]:
        """Tokens that are found in a text before it is cut into words: control tokens, and those that a user defined."""
        from tokenizers import AddedToken

        return [AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, kind in zip(self.tokens, self.types, strict=True) if kind in (CONTROL, USER_DEFINED) and token]


def _byte_level(vocabulary: _Vocabulary) -> tuple[Any, bool]:
    """A GPT-2 type tokenizer, and whether a beginning-of-text token is usual with it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    name = vocabulary.get("pre", str, default="default")
    check_choice(f"{vocabulary.path}: metadata 'tokenizer.ggml.pre'", name, PRE_TOKENIZERS)
    pre = PRE_TOKENIZERS[name]
    merges = [_pair(vocabulary, index, merge) for index, merge in enumerate(vocabulary.strings("merges"))]
    tokenizer = Tokenizer(models.BPE(vocabulary.numbers, merges, ignore_merges=pre.whole_words))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in pre.expressions]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _pair(vocabulary: _Vocabulary, index: int, merge: str) -> tuple[str, str]:
    """The two tokens of a merge, which with their union must be in the vocabulary."""
    left, _, right = merge.partition(" ")
    if not (left and right and all(token in vocabulary.numbers for token in (left, right, left + right))):
        raise vocabulary.error(f"merges[{index}]", f"= {merge!r}: both parts and their union must be tokens")
    return left, right


def _sentencepiece(vocabulary: _Vocabulary) -> Any:
    """A SentencePiece BPE with byte fallback."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = vocabulary.column("scores", "f")
    if not np.isfinite(scores).all():
        raise vocabulary.error("scores", "holds numbers that are not finite")
    unknown = vocabulary.token_id("unknown_token_id")
    tokenizer = Tokenizer(models.BPE(
        vocabulary.numbers, _merges(vocabulary, scores.tolist()), fuse_unk=True, byte_fallback=True,
        unk_token=None if unknown is None else vocabulary.tokens[unknown]))
    prefix = vocabulary.get("add_space_prefix", bool, default=True)
    replace = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace] if prefix else [replace])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _merges(vocabulary: _Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the highest score first: the order in which SentencePiece merges."""
    pieces = {token: number for token, number in vocabulary.numbers.items() if vocabulary.types[number] in (NORMAL, UNUSED)}
    found = []
    for piece, number in pieces.items():
        if len(piece) > LONGEST_PIECE:
            raise vocabulary.error(f"tokens[{number}]", f"has {len(piece)} characters; at most {LONGEST_PIECE} are allowed")
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                found.append((-scores[number], number, pieces[left], pieces[right]))
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, _, left, right in sorted(found)]


def _add_ends(tokenizer: Any, vocabulary: _Vocabulary, bos: int | None, eos: int | None) -> None:
    """Make encoding with special tokens put these ids around a text."""
    from tokenizers import processors

    ends = {vocabulary.tokens[number]: number for number in (bos, eos) if number is not None}
    if ends:
        before = [] if bos is None else [vocabulary.tokens[bos]]
        after = [] if eos is None else [vocabulary.tokens[eos]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], pair=[*before, "$A", *after, "$B"], special_tokens=list(ends.items()))
