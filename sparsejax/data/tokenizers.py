"""Text to token ids: bytes, a byte-level BPE trained on the corpus, or any `tokenizer.json`.

Special ids follow the ordinary ones: padding, beginning and end of a document, mask, and where a denoising task asks for them
the mode tokens [R] [S] [X] and the sentinels. None of them can be produced by encoding text with `bytes` or `bpe`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from sparsejax.data.sources import TextCorpus, find_file
from sparsejax.plugs import ConfigError, check, register

BASE_SPECIALS = ("pad", "bos", "eos", "mask")
MODES = ("R", "S", "X")
TRAINING_BYTES = 2**26  # of text are enough to train a BPE
ALIGNMENT = 8  # our own vocabularies are a multiple of it, so that the embedding can be sharded


class TextCodec(Protocol):
    """Ordinary text <-> ordinary ids; ids are below `size`."""

    size: int
    fingerprint: str

    @property
    def prefix_ids(self) -> tuple[int, ...]: ...
    def encode(self, text: str) -> np.ndarray: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_bytes(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Tokenizer:
    """A codec with its special ids.

    `token_bytes` int32[vocab_size] is the number of UTF-8 bytes each id stands for, 0 for special ids: the sum over the
    targets of a loss in nats, divided by their bytes and by ln 2, is bits per byte, comparable across tokenizers.
    A file that has no padding or beginning-of-document token uses its end-of-document token for them, as GPT-2 does.
    """

    codec: TextCodec
    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int
    mask_id: int | None  # None: a file without a mask token
    mode_ids: dict[str, int]
    sentinel_ids: np.ndarray
    token_bytes: np.ndarray

    @property
    def num_ordinary(self) -> int:
        """Ids below this number belong to the codec's own vocabulary."""
        return self.codec.size

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text becomes."""
        specials = (self.vocab_size, self.pad_id, self.bos_id, self.eos_id, self.mask_id, sorted(self.mode_ids.items()),
                    self.sentinel_ids.tolist())
        return hashlib.sha256(f"{self.codec.fingerprint} {specials}".encode()).hexdigest()

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Special ids that the tokenizer puts before a text unless told otherwise (Llama's BOS); () where it puts none."""
        return self.codec.prefix_ids

    def encode(self, text: str) -> np.ndarray:
        """Ids int32[N] of a text, without special ids."""
        return self.codec.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of several texts; faster than one by one for BPE."""
        return self.codec.encode_batch(texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special ids are left out, broken UTF-8 becomes U+FFFD."""
        special = {self.pad_id, self.bos_id, self.eos_id, self.mask_id, *self.mode_ids.values(),
                   *self.sentinel_ids.tolist()}
        return self.codec.decode([int(i) for i in ids if 0 <= i < self.codec.size and int(i) not in special])


class TokenizerSpec(Protocol):
    """What a tokenizer string in a config resolves to."""

    def declared_vocab_size(self, sentinels: int) -> int | None:
        """Size of the vocabulary where it is known without reading the corpus, else None."""
        ...

    def build(self, corpus: TextCorpus, sentinels: int, directories: Sequence[Path]) -> Tokenizer:
        """The tokenizer, with `sentinels` sentinel ids (and mode ids where that is not 0)."""
        ...


class ByteCodec:
    """UTF-8 bytes as ids 0..255."""

    size = 256
    fingerprint = "bytes"
    prefix_ids: tuple[int, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def token_bytes(self) -> np.ndarray:
        return np.ones(256, np.int32)


class LibraryCodec:
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=-1) + 1
        self.serialized = tokenizer.to_str()
        self.fingerprint = hashlib.sha256(self.serialized.encode()).hexdigest()

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        encoding = self._tokenizer.encode("a")
        leading = itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        return tuple(token for token, _ in leading)

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Bytes per id: exact for byte-level vocabularies, else of the token's own text (a normalizer may have changed it)."""
        description = json.loads(self.serialized)
        byte_level = "ByteLevel" in json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
        counts = np.zeros(self.size, np.int32)
        for token, index in self.vocabulary.items():
            counts[index] = len(token) if byte_level else _text_bytes(token)
        for added in description.get("added_tokens") or []:
            counts[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
        return counts


def _text_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # byte fallback
        return 1
    return len(token.removeprefix("##").replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8"))


def _special_names(sentinels: int) -> list[str]:
    return [*BASE_SPECIALS, *(MODES if sentinels else ()), *(f"sentinel{i}" for i in range(sentinels))]


def _assemble(codec: TextCodec, ids: dict[str, int], vocab_size: int, sentinels: int) -> Tokenizer:
    token_bytes = np.zeros(vocab_size, np.int32)
    token_bytes[: codec.size] = codec.token_bytes()
    token_bytes[list(ids.values())] = 0
    return Tokenizer(codec=codec, vocab_size=vocab_size, pad_id=ids["pad"], bos_id=ids["bos"], eos_id=ids["eos"],
                     mask_id=ids.get("mask"), mode_ids={m: ids[m] for m in MODES} if sentinels else {},
                     sentinel_ids=np.array([ids[f"sentinel{i}"] for i in range(sentinels)], np.int32), token_bytes=token_bytes)


def _append_specials(codec: TextCodec, vocab_size: int, sentinels: int) -> Tokenizer:
    first = vocab_size - len(_special_names(sentinels))
    return _assemble(codec, {name: first + i for i, name in enumerate(_special_names(sentinels))}, vocab_size, sentinels)


@register("tokenizer", "bytes")
@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes; special ids follow 255, and the vocabulary is rounded up to a multiple of 8."""

    def declared_vocab_size(self, sentinels: int) -> int | None:
        return -(-(256 + len(_special_names(sentinels))) // ALIGNMENT) * ALIGNMENT

    def build(self, corpus: TextCorpus, sentinels: int, directories: Sequence[Path]) -> Tokenizer:
        size = 256 + len(_special_names(sentinels))
        ids = {name: 256 + i for i, name in enumerate(_special_names(sentinels))}
        return _assemble(ByteCodec(), ids, -(-size // ALIGNMENT) * ALIGNMENT, sentinels)


@register("tokenizer", "bpe")
@dataclass(frozen=True)
class Bpe:
    """Byte-level BPE trained on the training split; `vocab` counts all ids, the special ones included.

    The merges are cached below $SPARSEJAX_CACHE (else $XDG_CACHE_HOME/sparsejax, else ~/.cache/sparsejax), under a name made of
    the corpus hash and the vocabulary.
    """

    vocab: int

    def __post_init__(self) -> None:
        least = 256 + len(BASE_SPECIALS)
        check(least <= self.vocab <= 2**20, "data.tokenizer: bpe.vocab", self.vocab, f"must lie in [{least}, {2**20}]")

    def declared_vocab_size(self, sentinels: int) -> int | None:
        least = 256 + len(_special_names(sentinels))
        check(self.vocab >= least, "data.tokenizer: bpe.vocab", self.vocab, f"bytes and special ids need at least {least}")
        return self.vocab

    def build(self, corpus: TextCorpus, sentinels: int, directories: Sequence[Path]) -> Tokenizer:
        self.declared_vocab_size(sentinels)
        codec = trained_bpe(corpus, self.vocab - len(_special_names(sentinels)))
        return _append_specials(codec, self.vocab, sentinels)


def cache_folder() -> Path:
    """Where trained tokenizers are kept between runs."""
    if "SPARSEJAX_CACHE" in os.environ:
        return Path(os.environ["SPARSEJAX_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsejax"


def trained_bpe(corpus: TextCorpus, vocab: int) -> LibraryCodec:
    """Byte-level BPE with `vocab` ordinary ids, from the cache or trained and cached; an unreadable cache entry is replaced."""
    import tokenizers

    path = cache_folder() / f"bpe-{corpus.fingerprint[:32]}-{vocab}-{tokenizers.__version__}.json"
    if path.is_file():
        try:
            return read_tokenizer_json(path)
        except ConfigError:
            path.unlink()
    trained = train_bpe(_training_texts(corpus), vocab)
    try:
        _write_atomically(path, trained.to_str())
    except OSError as error:
        warnings.warn(f"the trained tokenizer could not be kept in {path.parent}: {error}", stacklevel=2)
    return LibraryCodec(trained)


def _training_texts(corpus: TextCorpus) -> Iterator[str]:
    """The training documents, or where they are many, evenly spaced ones of about `TRAINING_BYTES` together."""
    documents = corpus.documents("train")
    for index in range(0, len(documents), max(1, corpus.size_bytes // TRAINING_BYTES)):
        yield documents[index][:TRAINING_BYTES]


def train_bpe(texts: Iterable[str], vocab: int) -> Any:
    """A byte-level BPE of the `tokenizers` library; deterministic in the texts and their order."""
    from tokenizers import Tokenizer as LibraryTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def read_tokenizer_json(path: Path) -> LibraryCodec:
    """The codec of a `tokenizer.json` file.

    Raises:
      ConfigError: not UTF-8, not JSON, or not a description that the `tokenizers` library accepts.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a usable tokenizer.json ({error})") from error
    return LibraryCodec(parse_tokenizer(text, str(path)))


def parse_tokenizer(text: str, where: str) -> Any:
    """The tokenizer of the `tokenizers` library that the text of a `tokenizer.json` describes; errors name `where`."""
    from tokenizers import Tokenizer as LibraryTokenizer

    try:
        json.loads(text)
        return LibraryTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for all that it rejects
        raise ConfigError(f"{where}: not a usable tokenizer.json ({error})") from error


# Names of special tokens in published vocabularies, the first that exists is taken.
PUBLISHED_NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[SEP]"),
    "mask": ("<mask>", "[MASK]"),
    "R": ("[R]", "[NLU]"),
    "S": ("[S]", "[S2S]"),
    "X": ("[X]", "[NLG]"),
}


def published(
    tokenizer: Any, *, eos: int, bos: int | None = None, pad: int | None = None, mask: int | None = None
) -> Tokenizer:
    """The tokenizer of a published model.

    Args:
      tokenizer: of the `tokenizers` library.
      eos, bos, pad, mask: ids of its special tokens; where `bos` or `pad` is None, `eos` stands for it.
    Raises:
      ConfigError: an id that the vocabulary does not have.
    """
    codec = LibraryCodec(tokenizer)
    ids = {"eos": eos, "bos": eos if bos is None else bos, "pad": eos if pad is None else pad}
    if mask is not None:
        ids["mask"] = mask
    for name, number in ids.items():
        check(0 <= number < codec.size, f"tokenizer: {name} id", number, f"the vocabulary has {codec.size} tokens")
    return _assemble(codec, ids, codec.size, 0)


@dataclass(frozen=True)
class Given:
    """A tokenizer that is there already: a pretrained model's."""

    tokenizer: Tokenizer

    def declared_vocab_size(self, sentinels: int) -> int | None:
        return self.tokenizer.vocab_size

    def build(self, corpus: TextCorpus, sentinels: int, directories: Sequence[Path]) -> Tokenizer:
        held = len(self.tokenizer.sentinel_ids)
        check(held >= sentinels, "data.task", f"{sentinels} sentinels", f"the tokenizer of the model to start from has {held}")
        return self.tokenizer


@register("tokenizer", "init")
@dataclass(frozen=True)
class Init:
    """The tokenizer of the model that `init` names: what a config with `init` has here."""

    def declared_vocab_size(self, sentinels: int) -> int | None:
        return None

    def build(self, corpus: TextCorpus, sentinels: int, directories: Sequence[Path]) -> Tokenizer:
        raise ConfigError("data.tokenizer = 'init': is that of the model to start from, and `init` names none that has one")


@register("tokenizer", "file")
@dataclass(frozen=True)
class File:
    """Any `tokenizer.json`; special tokens are found by their published names, missing sentinels get ids after its own."""

    path: str
    takes_path: ClassVar[bool] = True

    def declared_vocab_size(self, sentinels: int) -> int | None:
        return None

    def build(self, corpus: TextCorpus, sentinels: int, directories: Sequence[Path]) -> Tokenizer:
        codec = read_tokenizer_json(find_file(self.path, directories, "data.tokenizer: file"))
        ids: dict[str, int] = {}
        next_id = codec.size
        for name in _special_names(sentinels):
            number = name.removeprefix("sentinel")
            known = PUBLISHED_NAMES.get(name) or (f"<extra_id_{number}>", f"<mask_{number}>")
            found = next((codec.vocabulary[k] for k in known if k in codec.vocabulary), None)
            if found is not None:
                ids[name] = found
            elif name not in ("pad", "bos", "mask"):
                ids[name], next_id = next_id, next_id + 1
        for name in ("pad", "bos"):
            ids.setdefault(name, ids["eos"])
        return _assemble(codec, ids, next_id, sentinels)
