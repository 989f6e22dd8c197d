"""The pipeline: batches are pure functions of (seed, step), on any number of hosts, described before data is read."""

import itertools

import numpy as np
import pytest

from sparsejax.data.config import DataConfig
from sparsejax.data.pipeline import build_data
from sparsejax.data.sources import FileText
from sparsejax.plugs import ConfigError

TEXT = "".join(f"line {i} says {i * i} and naïve {chr(0x4E00 + i)}\n" for i in range(120))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEJAX_CACHE", str(folder / "cache"))
        yield folder


CASES = [
    ("text:a.txt", "bytes", "causal_lm", "decoder"), ("text:a.txt", "bpe:300", "prefix_lm", "decoder"),
    ("text:a.txt", "bytes", "ul2", "decoder"), ("text:a.txt", "bytes", "ul2:t5", "encoder_decoder"),
    ("text:a.txt", "bytes", "masked_lm", "encoder"), ("digits", "bytes", "classification", "vit"),
    ("mqar:symbols=64", "bytes", "causal_lm", "decoder"), ("listops", "bytes", "classification", "encoder"),
    ("modular", "bytes", "causal_lm", "decoder"),
]


def build(folder, source="text:a.txt", tokenizer="bytes", task="causal_lm", kind="decoder", *, batch_size=8, seed=0,
          **changes):
    changes = {"sequence_length": 32, "data_dir": str(folder), **changes}
    config = DataConfig(source=source, tokenizer=tokenizer, task=task, **changes)
    return build_data(config, model_kind=kind, batch_size=batch_size, seed=seed)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_batches_are_what_batch_spec_says(folder, case):
    data = build(folder, *case)
    spec = data.batch_spec()
    for split in ("train", "evaluation"):
        batch = data.batch(3, split)
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == spec
    for name in ("tokens", "targets", "encoder_tokens"):
        assert name not in batch or batch[name].max() < data.vocab_size
    assert "labels" not in batch or batch["labels"].max() < data.num_classes == 10


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_hosts_batches_joined_are_the_global_batch(folder, case, hosts):
    iterators = [build(folder, *case).iterator(5, host, hosts) for host in range(hosts)]
    reference = build(folder, *case)
    for step in (5, 6):
        parts = [next(iterator) for iterator in iterators]
        assert_equal({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}, reference.batch(step))
    for iterator in iterators:
        iterator.close()


@pytest.mark.parametrize("prefetch", [0, 3])
def test_an_iterator_restarted_at_a_step_continues_as_a_straight_run(folder, prefetch):
    data = build(folder, task="prefix_lm", prefetch=prefetch)
    straight = data.iterator()
    batches = [next(straight) for _ in range(9)]
    assert straight.get_state() == {"step": 9}
    restarted = build(folder, task="prefix_lm", prefetch=prefetch).iterator(start_step=4)
    assert restarted.step == 4
    for step in range(4, 9):
        assert_equal(next(restarted), batches[step])
    restarted.set_state({"step": 2})
    assert_equal(next(restarted), batches[2])
    straight.close()
    restarted.close()


def test_a_step_may_lie_many_epochs_ahead(folder):
    assert_equal(build(folder).batch(10**9), build(folder).batch(10**9))


def test_the_seed_orders_training_rows_and_leaves_evaluation_rows_alone(folder):
    first, second = (build(folder, seed=seed, task="masked_lm", kind="encoder") for seed in (0, 1))
    assert (first.batch(0)["tokens"] != second.batch(0)["tokens"]).any()
    assert_equal(first.batch(0, "evaluation"), second.batch(0, "evaluation"))


def test_an_epoch_trains_on_every_byte_once(folder):
    data = build(folder, batch_size=4)
    rows = data.rows.count("train")
    steps = [data.batch(s) for s in range(-(-rows // 4))]
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in steps][:rows])
    text = "".join(data.documents("train")).encode()
    ordinary = targets[targets < 256]
    extra = len(ordinary) - len(text)
    assert 0 <= extra < 4 * 32  # the last batch reaches into the next epoch
    assert (np.bincount(ordinary, minlength=256) >= np.bincount(np.frombuffer(text, np.uint8), minlength=256)).all()


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_evaluation_scores_every_held_out_byte_once(folder, tokenizer):
    data = build(folder, tokenizer=tokenizer)
    batches = list(data.evaluation_batches(1000))
    held_out = "".join(data.documents("evaluation")).encode()
    assert sum(data.target_bytes(b) for b in batches) == len(held_out)
    targets = sum(len(data.tokenizer.encode(d)) + 1 for d in data.documents("evaluation"))
    assert sum(b["weights"].sum() for b in batches) == targets
    halves = [list(data.evaluation_batches(1000, data.host_rows(i, 2))) for i in range(2)]
    for whole, low, high in zip(batches, *halves, strict=True):
        assert_equal({k: np.concatenate([low[k], high[k]]) for k in low}, whole)


def test_evaluation_of_images_counts_each_image_once(folder):
    batches = list(build(folder, *CASES[5], batch_size=50).evaluation_batches(100))
    assert len(batches) == 8 and sum(b["weights"].sum() for b in batches) == 359


def test_an_epoch_of_images_shows_each_once_in_another_order(folder):
    data = build(folder, *CASES[5], batch_size=1438)
    first, second = data.batch(0), data.batch(1)
    assert (first["labels"] != second["labels"]).any()
    assert np.sort(first["labels"]).tolist() == np.sort(second["labels"]).tolist()


def test_shapes_and_vocabulary_are_known_without_reading_the_text(folder, monkeypatch):
    monkeypatch.setattr(FileText, "load", lambda self: pytest.fail("the text was read"))
    for tokenizer, task in itertools.product(("bytes", "bpe:300"), ("causal_lm", "ul2")):
        data = build(folder, tokenizer=tokenizer, task=task)
        assert data.batch_spec()["tokens"] == ((8, 32), np.dtype(np.int32)) and data.vocab_size >= 264


def test_fingerprints_tell_text_tokenizer_task_and_shape_apart_but_not_seeds(folder):
    (folder / "b.txt").write_text(TEXT + "!")
    variants = [{}, {"source": "text:b.txt"}, {"tokenizer": "bpe:300"}, {"task": "prefix_lm"}, {"sequence_length": 33},
                {"packing": False}, {"source": "copy"}]
    prints = [build(folder, **v).fingerprint for v in variants]
    assert len(set(prints)) == len(variants)
    assert build(folder, seed=5, batch_size=2).fingerprint == prints[0]


def test_the_description_names_source_bytes_hash_and_batches_per_epoch(folder):
    data = build(folder)
    text = "\n".join(data.describe())
    size = len(TEXT.encode())
    assert f"{size:,} bytes, sha256 {data.rows.corpus.fingerprint[:16]}" in text
    assert f"{size * 9 // 10 + 1:,} tokens" in text and "batches of 8" in text and data.fingerprint[:16] in text
    assert "without end" in "\n".join(build(folder, "dyck").describe())
    assert "10 classes" in "\n".join(build(folder, *CASES[5]).describe())


def test_unpacked_rows_hold_one_document_each(folder):
    batch = build(folder, source="stdlib", packing=False, sequence_length=64).batch(0)
    assert batch["segment_ids"].max() == 1


def test_what_is_wrong_with_the_text_is_raised_before_the_threads_start(folder):
    (folder / "bad.txt").write_bytes(b"abc\xff" * 9)
    data = build(folder, source="text:bad.txt")
    with pytest.raises(ConfigError, match="byte 0xff at offset 3"):
        data.iterator()


@pytest.mark.parametrize(("changes", "message"), [
    ({"source": "text:none.txt"}, "no such file"), ({"source": "stdlb"}, "Did you mean 'stdlib'"),
    ({"tokenizer": "bites"}, "data.tokenizer.*Did you mean 'bytes'"), ({"task": "causal"}, "Did you mean 'causal_lm'"),
    ({"tokenizer": "file:none.json"}, "none.json"),
    ({"task": "masked_lm"}, "for a model of kind = 'decoder': allowed are 'encoder'"),
    ({"source": "digits"}, "content of data.source 'digits' = 'images': allowed are 'text', 'symbols'"),
    ({"source": "digits", "task": "classification"}, "allowed is 'vit'"),
    ({"source": "copy", "task": "classification"}, "no labels to classify"),
    ({"source": "listops", "task": "classification", "kind": "vit"}, "symbols, not images"),
    ({"source": "mqar:pairs=16", "sequence_length": 63}, "data.sequence_length = 63.*at least 64"),
    ({"batch_size": 0}, "batch_size = 0"), ({"sequence_length": 0}, "data.sequence_length = 0"),
    ({"prefetch": -1}, "data.prefetch = -1"),
])
def test_parts_that_cannot_work_are_refused_at_once(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        build(folder, **changes)


def test_a_batch_that_does_not_divide_over_the_hosts_is_refused(folder):
    with pytest.raises(ConfigError, match="batch_size = 8: must be divisible by the number of processes, 3"):
        build(folder).iterator(0, 0, 3)
