"""The data pipeline: batches that are pure functions of (seed, step), whatever the number of hosts.

`build_data` joins a source, a tokenizer and a task. What is cheap is checked there; text is read, hashed and tokenized at first
use.
Row r of step s is row s * batch_size + r of one endless sequence of rows; hosts compute only their own slice of it.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from sparsejax.data import corruptions, synthetic, tfds_source, vision  # noqa: F401  (they register what they hold)
from sparsejax.data.config import DataConfig
from sparsejax.data.counter_random import generator
from sparsejax.data.packing import PackedRows, SampledRows, TokenStore
from sparsejax.data.sources import SPLITS, TextCorpus, data_directories
from sparsejax.data.synthetic import SymbolTask
from sparsejax.data.tasks import FLOAT, INT, Classification, Row, RowLayout, Shapes
from sparsejax.data.tokenizers import Given, Tokenizer, TokenizerSpec
from sparsejax.data.vision import ImageSet
from sparsejax.plugs import check, check_choice, resolve

EVALUATION_SEED = 0  # held-out rows are the same for every training seed
IN_MEMORY_BYTES = 2**30  # larger prepared sets are not tokenized beforehand


class Rows(Protocol):
    """An endless sequence of training rows, and the rows of the evaluation split."""

    num_classes: int

    @property
    def vocab_size(self) -> int:
        """Ids that a model must know; 0 for images."""
        ...

    def shapes(self) -> Shapes:
        """Name -> (shape of one row, dtype)."""
        ...

    def count(self, split: str) -> int | None:
        """Rows of one epoch; None where rows are generated without end."""
        ...

    def row(self, split: str, seed: int, index: int) -> Row:
        """Row `index` of a split."""
        ...

    def identity(self) -> list[str]:
        """Everything that decides what the rows hold, for the fingerprint."""
        ...

    def describe(self) -> list[str]:
        """Lines for people."""
        ...


class TextRows:
    """Documents, tokenized and packed, then turned into rows by a task."""

    num_classes = 0

    def __init__(self, corpus: TextCorpus, spec: TokenizerSpec, task: Any, config: DataConfig, model_kind: str):
        self.corpus, self.spec, self.task, self.config, self.model_kind = corpus, spec, task, config, model_kind
        self._directories = data_directories(config.data_dir)
        self._sentinels = task.num_sentinels(config.sequence_length)
        self._declared = spec.declared_vocab_size(self._sentinels)
        if self._declared is None:
            _ = self.tokenizer  # a file: read, and so checked, at once
        self._packed: dict[str, PackedRows | SampledRows] = {}
        self._lock = threading.Lock()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.spec.build(self.corpus, self._sentinels, self._directories)
        self.task.check_tokenizer(tokenizer)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self._declared or self.tokenizer.vocab_size

    def shapes(self) -> Shapes:
        return self.task.shapes(self.config.sequence_length, self.model_kind)

    def count(self, split: str) -> int | None:
        return self.packed(split).rows_per_epoch

    def packed(self, split: str) -> PackedRows | SampledRows:
        """The packed rows of a split; the first call reads and tokenizes it."""
        with self._lock:
            if split not in self._packed:
                self._packed[split] = self._pack(split)
            return self._packed[split]

    def _pack(self, split: str) -> PackedRows | SampledRows:
        documents, tokenizer = self.corpus.documents(split), self.tokenizer
        shape = (self.config.sequence_length, self.config.packing, tokenizer.bos_id)
        if isinstance(self.corpus, tfds_source.PreparedText) and self.corpus.size_bytes > IN_MEMORY_BYTES:
            return SampledRows(len(documents), lambda d: np.append(tokenizer.encode(documents[d]), tokenizer.eos_id), *shape)
        encoded = tokenizer.encode_batch(list(documents))
        return PackedRows(TokenStore.build(encoded, tokenizer.eos_id, tokenizer.vocab_size), *shape)

    def row(self, split: str, seed: int, index: int) -> Row:
        packed = self.packed(split).row(seed, index)
        random = generator(seed, f"task/{split}", index)
        return self.task.row(packed, random, self.tokenizer, self.config.sequence_length, self.model_kind)

    def identity(self) -> list[str]:
        return [self.corpus.fingerprint, self.tokenizer.fingerprint, repr(self.task), self.model_kind]

    def describe(self) -> list[str]:
        lines = [f"source {self.corpus.name}: {self.corpus.size_bytes:,} bytes, sha256 {self.corpus.fingerprint[:16]}"]
        for split in SPLITS:
            packed = self.packed(split)
            text = f"  {split}: {len(self.corpus.documents(split)):,} documents"
            if isinstance(packed, PackedRows):
                text += f", {len(packed.store.tokens):,} tokens, {packed.rows_per_epoch:,} sequences of {packed.length}"
            lines.append(text)
        return [*lines, f"tokenizer {self.config.tokenizer}: {self.vocab_size:,} ids"]


class ImageRows:
    """Labelled images; the training split is shuffled anew in every epoch.

    A share `label_noise` of the training images has a label drawn uniformly from all classes, the true one included; which
    images, and which label, depends on the seed and the image alone, so that it is the same in every epoch.
    """

    vocab_size = 0

    def __init__(self, images: ImageSet, train_images: int = 0, label_noise: float = 0.0):
        self.images, self.num_classes = images, images.num_classes
        self.train_images, self.label_noise = train_images, label_noise
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def shapes(self) -> Shapes:
        return {"images": (self.images.image_shape, FLOAT), "labels": ((), INT), "weights": ((), FLOAT)}

    def count(self, split: str) -> int:
        size = self.images.size(split)
        if split != "train":
            return size
        check(self.train_images <= size, "data.train_images", self.train_images, f"{self.images.name} has {size}")
        return self.train_images or size

    def row(self, split: str, seed: int, index: int) -> Row:
        number, within = divmod(index, self.count(split))
        if split == "train":
            within = int(self._order(seed, number)[within])
        image, label = self.images.example(split, within)
        if split == "train" and self.label_noise:
            random = generator(seed, "label noise", within)
            label = int(random.integers(self.num_classes)) if random.random() < self.label_noise else label
        return {"images": image, "labels": np.array(label, INT), "weights": np.ones((), FLOAT)}

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        with self._lock:
            if (seed, epoch) not in self._orders:
                while len(self._orders) > 2:
                    del self._orders[next(iter(self._orders))]
                self._orders[seed, epoch] = generator(seed, "order/images", epoch).permutation(self.count("train"))
            return self._orders[seed, epoch]

    def identity(self) -> list[str]:
        used = [f"first {self.train_images}"] if self.train_images else []
        noise = [f"label noise {self.label_noise!r}"] if self.label_noise else []
        return [self.images.fingerprint, repr(self.images.image_shape), *used, *noise]

    def describe(self) -> list[str]:
        counts = ", ".join(f"{self.count(split):,} {split}" for split in SPLITS)
        shape = " x ".join(map(str, self.images.image_shape))
        noise = f", {100 * self.label_noise:g} % of the training labels drawn anew" if self.label_noise else ""
        return [f"source {self.images.name}: {counts} images of {shape}, {self.num_classes} classes{noise}, "
                f"sha256 {self.images.fingerprint[:16]}"]


class SymbolRows:
    """Rows of a synthetic task, for a language model or a classifier."""

    def __init__(self, task: SymbolTask, classify: bool, length: int):
        task.check_length(length)
        self.task, self.classify, self.length = task, classify, length
        self.vocab_size, self.num_classes = task.vocab_size, task.num_classes if classify else 0

    def shapes(self) -> Shapes:
        shapes = RowLayout(self.length).shapes()
        if self.classify:
            del shapes["targets"]
            shapes |= {"labels": ((), INT), "weights": ((), FLOAT)}
        return shapes

    def count(self, split: str) -> int | None:
        return None

    def row(self, split: str, seed: int, index: int) -> Row:
        example = self.task.example(seed, split, index, self.length)
        row = example._asdict()
        label = row.pop("label")
        if self.classify:
            del row["targets"]
            row |= {"labels": np.array(label, INT), "weights": np.ones((), FLOAT)}
        return row

    def identity(self) -> list[str]:
        return [repr(self.task), str(self.classify)]

    def describe(self) -> list[str]:
        return [f"source {self.task.name}: generated, {self.vocab_size:,} symbols"]


class DataPipeline:
    """Batches of numpy arrays; see `build_data`."""

    def __init__(self, rows: Rows, config: DataConfig, batch_size: int, seed: int):
        self.rows, self.config, self.batch_size, self.seed = rows, config, batch_size, seed

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer (a BPE is trained or read from the cache now), or None where the data is not text."""
        return self.rows.tokenizer if isinstance(self.rows, TextRows) else None

    @property
    def vocab_size(self) -> int:
        """Ids that the model must know, special ones included; 0 for images. Does not read text where the size is declared."""
        return self.rows.vocab_size

    @property
    def num_classes(self) -> int:
        """Labels of a classification task, else 0."""
        return self.rows.num_classes

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) of the images, or None."""
        return self.rows.images.image_shape if isinstance(self.rows, ImageRows) else None

    def documents(self, split: str) -> Any:
        """The documents (str) of a split of a text source, as a sequence.

        Raises:
          ConfigError: the source is not text, or the split is unknown.
        """
        check_choice("split", split, SPLITS)
        check(isinstance(self.rows, TextRows), "data.source", self.config.source, "is not text")
        return self.rows.corpus.documents(split)  # type: ignore[attr-defined]

    def batch_spec(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape of the global batch, dtype), without reading data."""
        return {name: ((self.batch_size, *shape), dtype) for name, (shape, dtype) in self.rows.shapes().items()}

    def batch(self, step: int, split: str = "train", rows: slice | None = None) -> dict[str, np.ndarray]:
        """Batch number `step`, or those of its rows that `rows` selects: a pure function of (seed, step).

        Args:
          step: from 0.
          split: `train`, in an order that `seed` decides, epoch after epoch; or `evaluation`, the same for every seed.
          rows: which rows of the global batch, e.g. this host's.
        """
        check_choice("split", split, SPLITS)
        seed = self.seed if split == "train" else EVALUATION_SEED
        wanted = range(self.batch_size)[rows or slice(None)]
        return self._stack([self.rows.row(split, seed, step * self.batch_size + r) for r in wanted])

    def _stack(self, rows: list[Row]) -> dict[str, np.ndarray]:
        return {name: np.stack([row[name] for row in rows]).astype(dtype, copy=False) if rows else np.zeros((0, *shape), dtype)
                for name, (shape, dtype) in self.rows.shapes().items()}

    def evaluation_batches(
        self, n: int, rows: slice | None = None, corruption: str = ""
    ) -> Iterator[dict[str, np.ndarray]]:
        """The first `n` batches of the evaluation split, always the same; fewer where the split ends.

        The last batch is completed with rows of weight 0, so that each held-out row counts once.

        Args:
          corruption: registry kind "corruption", of images; each image has noise of its own, always the same.
        """
        corrupt = resolve("corruption", corruption, "evaluate.corruptions") if corruption else None
        count = self.rows.count("evaluation")
        for step in range(n):
            used = self.batch_size if count is None else min(self.batch_size, count - step * self.batch_size)
            if used <= 0:
                return
            batch = self.batch(step, "evaluation", rows)
            if corrupt is not None:
                wanted = range(step * self.batch_size, (step + 1) * self.batch_size)[rows or slice(None)]
                randoms = (generator(EVALUATION_SEED, f"corruption/{corruption}", index) for index in wanted)
                batch["images"] = np.stack([corrupt(x, r) for x, r in zip(batch["images"], randoms, strict=True)])
            beyond = np.arange(self.batch_size)[rows or slice(None)] >= used
            batch["weights"] = np.where(beyond.reshape(-1, *[1] * (batch["weights"].ndim - 1)), np.float32(0), batch["weights"])
            yield batch

    def host_rows(self, process_index: int, process_count: int) -> slice:
        """The rows of the global batch that one of `process_count` hosts computes.

        Raises:
          ConfigError: the batch does not divide.
        """
        check(process_count > 0 and self.batch_size % process_count == 0, "batch_size", self.batch_size,
              f"must be divisible by the number of processes, {process_count}")
        check(0 <= process_index < process_count, "process_index", process_index, f"must lie in [0, {process_count})")
        share = self.batch_size // process_count
        return slice(process_index * share, (process_index + 1) * share)

    def iterator(self, start_step: int = 0, process_index: int = 0, process_count: int = 1) -> BatchIterator:
        """Training batches from `start_step` on, prepared ahead on host threads; this process's rows alone."""
        return BatchIterator(self, self.host_rows(process_index, process_count), start_step)

    def target_bytes(self, batch: dict[str, np.ndarray]) -> int:
        """UTF-8 bytes that the batch's weighted targets stand for: nats / bytes / ln 2 is bits per byte.

        Ends of documents stand for no bytes, but their nats count.
        """
        check(self.tokenizer is not None, "data.source", self.config.source, "bits per byte need text")
        assert self.tokenizer is not None
        return int(self.tokenizer.token_bytes[batch["targets"]][batch["weights"] > 0].sum())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the source, the tokenizer, the task and the shape of a row; reads the text."""
        parts = [*self.rows.identity(), str(self.config.sequence_length), str(self.config.packing)]
        return hashlib.sha256("\x00".join(parts).encode()).hexdigest()

    def describe(self) -> list[str]:
        """Lines for people: source, documents, bytes, hash, tokens, batches per epoch; reads the text."""
        count = self.rows.count("train")
        epoch = f"{count / self.batch_size:,.1f} per epoch" if count else "without end"
        return [*self.rows.describe(),
                f"task {self.config.task}: batches of {self.batch_size}, {epoch}, data {self.fingerprint[:16]}"]


class _Steps:
    """Random access to batches by step, as Grain asks for it."""

    def __init__(self, pipeline: DataPipeline, rows: slice):
        self.pipeline, self.rows = pipeline, rows

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, step: Any) -> dict[str, np.ndarray]:
        return self.pipeline.batch(int(step), rows=self.rows)


class BatchIterator:
    """Endless Grain iterator over training batches; its whole state is the number of the next step."""

    def __init__(self, pipeline: DataPipeline, rows: slice, step: int):
        import grain

        pipeline.rows.count("train")  # what is wrong with the data is raised here, not in a thread
        prefetch = pipeline.config.prefetch
        # More threads would take the interpreter lock from the thread that dispatches steps.
        options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
        self._iterator = iter(grain.MapDataset.source(_Steps(pipeline, rows)).to_iter_dataset(options))
        self.set_state({"step": step})

    @property
    def step(self) -> int:
        """The step whose batch comes next."""
        return int(self._iterator.get_state()["next_index"])

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """`{"step": n}`: valid for any number of hosts."""
        return {"step": self.step}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue with the batch of `state["step"]`."""
        check(state["step"] >= 0, "step", state["step"], "must not be negative")
        self._iterator.set_state({"next_index": int(state["step"])})

    def close(self) -> None:
        """Stop the prefetching threads."""
        self._iterator.close()


def build_data(
    config: DataConfig, *, model_kind: str, batch_size: int, seed: int, tokenizer: Tokenizer | None = None
) -> DataPipeline:
    """The pipeline that a config describes.

    Args:
      config: source, tokenizer, task and shape.
      model_kind: decoder, encoder, encoder_decoder or vit.
      batch_size: rows per step, over all hosts.
      seed: decides the order of training rows and all draws of the task.
      tokenizer: of a pretrained model, instead of the one that the config describes.
    Raises:
      ConfigError: an unknown name, a missing or empty file, or parts that do not go together.
    """
    check(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    check(config.sequence_length >= 1, "data.sequence_length", config.sequence_length, "must be at least 1")
    check(config.prefetch >= 0, "data.prefetch", config.prefetch, "must not be negative")
    task = resolve("task", config.task, "data.task")
    check_choice(f"data.task = {config.task!r} for a model of kind", model_kind, task.model_kinds)
    source = resolve("source", config.source, "data.source").open(data_directories(config.data_dir))
    check_choice(f"data.task = {config.task!r} reads {' or '.join(task.content)}; content of data.source {config.source!r}",
                 source.content, task.content)
    rows = _rows(source, task, config, model_kind, tokenizer)
    return DataPipeline(rows, config, batch_size, seed)


def _rows(source: Any, task: Any, config: DataConfig, model_kind: str, tokenizer: Tokenizer | None) -> Rows:
    for field in ("train_images", "label_noise"):
        check(not getattr(config, field) or source.content == "images", f"data.{field}", getattr(config, field),
              f"is of labelled images, and data.source {config.source!r} holds {source.content}")
    if source.content == "text":
        spec = Given(tokenizer) if tokenizer else resolve("tokenizer", config.tokenizer, "data.tokenizer")
        return TextRows(source, spec, task, config, model_kind)
    if source.content == "images":
        check(model_kind == "vit", "model.kind", model_kind, f"data.source {config.source!r} holds images: allowed is 'vit'")
        return ImageRows(source, config.train_images, config.label_noise)
    classify = isinstance(task, Classification)
    check(model_kind != "vit", "model.kind", model_kind, f"data.source {config.source!r} holds symbols, not images")
    check(not classify or source.num_classes, "data.source", config.source, "has no labels to classify; listops has")
    return SymbolRows(source, classify, config.sequence_length)
