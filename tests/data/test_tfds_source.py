"""TFDS sets: prepared and read without TensorFlow, text and images, and clear words where a set is not there."""

import itertools
import sys

import numpy as np
import pytest
from PIL import Image

from sparsejax.data.config import DataConfig
from sparsejax.data.pipeline import build_data
from sparsejax.data.tfds_builders import main, prepare_images, prepare_text
from sparsejax.data.tfds_source import open_prepared, resized
from sparsejax.plugs import ConfigError

tfds = pytest.importorskip("tensorflow_datasets")


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch, tmp_path):
    """No test imports TensorFlow; nothing is looked for in the user's own TFDS folder."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "default"))
    yield
    assert "tensorflow" not in sys.modules


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "a.jsonl").write_text("".join(f'{{"text": "document {i} é"}}\n' for i in range(60)))
    prepare_text("sj_lines", [folder / "a.jsonl"], folder / "tfds")
    for label, i in itertools.product(("cat", "dog"), range(20)):
        (folder / "pictures" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 5), 10 * i + (label == "dog"), np.uint8)).save(folder / "pictures" / label / f"{i}.png")
    prepare_images("sj_pictures", folder / "pictures", folder / "tfds")
    return folder


def build(source, task, kind, data_dir="", **changes):
    config = DataConfig(source=source, task=task, data_dir=str(data_dir), sequence_length=16, **changes)
    return build_data(config, model_kind=kind, batch_size=4, seed=0)


@pytest.mark.parametrize("name", ["imdb_reviews", "lm1b"])
def test_a_mocked_text_set_trains_a_language_model(name):
    with tfds.testing.mock_data(num_examples=20):
        data = build(f"tfds:{name}", "causal_lm", "decoder")
        batch = data.batch(0)
        assert batch["tokens"].shape == (4, 16) and batch["weights"].sum() == 64
        assert len(data.documents("train")) == 20
        assert data.fingerprint == build(f"tfds:{name}", "causal_lm", "decoder").fingerprint


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_a_mocked_image_set_trains_a_classifier(name, shape):
    with tfds.testing.mock_data(num_examples=5):
        data = build(f"tfds:{name}", "classification", "vit")
        batch = data.batch(0)
        assert data.image_shape == shape and batch["images"].shape == (4, *shape) and data.num_classes == 10
        assert batch["images"].dtype == np.float32 and batch["images"].min() >= 0 and batch["images"].max() <= 1


def test_images_of_different_sizes_need_a_size():
    with tfds.testing.mock_data(num_examples=5):
        with pytest.raises(ConfigError, match="differ in size; give one, e.g. tfds:NAME,size=64"):
            build("tfds:cats_vs_dogs", "classification", "vit")
        assert build("tfds:cats_vs_dogs,size=12", "classification", "vit").batch(0)["images"].shape == (4, 12, 12, 3)


def test_local_text_becomes_a_set_with_disjoint_splits(prepared):
    data = build("tfds:sj_lines", "causal_lm", "decoder", prepared)
    train, evaluation = (list(data.documents(s)) for s in ("train", "evaluation"))
    assert sorted(train + evaluation) == sorted(f"document {i} é" for i in range(60)) and train and evaluation
    iterator = data.iterator()
    assert bytes(next(iterator)["targets"].clip(0, 255).astype(np.uint8)[0]).decode("utf-8", "replace")
    iterator.close()


def test_a_large_set_is_sampled_without_being_tokenized_beforehand(prepared, monkeypatch):
    monkeypatch.setattr("sparsejax.data.pipeline.IN_MEMORY_BYTES", 100)
    data = build("tfds:sj_lines", "causal_lm", "decoder", prepared)
    assert data.rows.count("train") is None and "without end" in "\n".join(data.describe())
    batch = data.batch(2)
    assert (batch["tokens"] == build("tfds:sj_lines", "causal_lm", "decoder", prepared).batch(2)["tokens"]).all()
    assert (batch["weights"] == 1).all() and len(list(data.evaluation_batches(3))) == 3
    documents = {d.encode() for d in data.documents("train")}
    for targets, segments in zip(batch["targets"], batch["segment_ids"], strict=True):
        piece = targets[(segments == 1) & (targets < 256)].astype(np.uint8).tobytes()
        assert any(piece in document for document in documents)


def test_local_images_become_a_set(prepared):
    data = build("tfds:sj_pictures", "classification", "vit", prepared)
    assert data.image_shape == (6, 5, 1) and data.num_classes == 2
    source = data.rows.images
    images = [source.example(split, i) for split in ("train", "evaluation") for i in range(source.size(split))]
    assert sorted((round(float(x[0, 0, 0] * 255)), label) for x, label in images) == sorted(
        (10 * i + label, label) for label in (0, 1) for i in range(20))


def test_resizing_takes_the_centred_square():
    image = np.zeros((4, 8, 3), np.uint8)
    image[:, 2:6] = 200
    assert (resized(image, 2) == 200).all() and resized(image[..., :1], 4).shape == (4, 4, 1)


@pytest.mark.parametrize("name", ["mnist", "no_such_set_at_all"])
def test_a_set_that_is_not_prepared_says_where_it_was_looked_for_and_how_to_get_it(tmp_path, name):
    message = rf"tfds:{name}': not prepared in array_record; looked in {tmp_path}.*download_and_prepare"
    with pytest.raises(ConfigError, match=message):
        open_prepared(name, [tmp_path])


def test_the_command_prepares_text_files_and_refuses_bad_ones(tmp_path, capsys):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    files = [str(tmp_path / f"{i}.txt") for i in range(30)]
    assert main(["text", "sj_files", str(tmp_path / "out"), *files]) == 0
    assert "tfds:sj_files" in capsys.readouterr().out
    assert len(open_prepared("sj_files", [tmp_path / "out"]).documents("train")) > 15
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": 1}\n')
    for arguments, message in (
            (["text", "x", str(tmp_path), str(tmp_path / "bad.jsonl")], "bad.jsonl:2: expected a JSON object"),
            (["text", "x", str(tmp_path), str(tmp_path / "none.txt")], "no such file"),
            (["text", "Bad-Name", str(tmp_path), files[0]], "name = 'Bad-Name'"),
            (["images", "x", str(tmp_path), str(tmp_path / "none")], "one folder per label")):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "pictures/cat").mkdir(parents=True)
    (tmp_path / "pictures/cat/1.png").write_bytes(b"not an image")
    with pytest.raises(ConfigError, match="1.png: not an image"):
        prepare_images("x", tmp_path / "pictures", tmp_path)
