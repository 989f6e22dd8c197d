"""Noise on held-out images and on training labels: its size, that it is the same every time, and that nothing else changes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.config import finalize
from sparsejax.data.config import DataConfig
from sparsejax.data.corruptions import GaussianNoise, ImpulseNoise, ShotNoise
from sparsejax.data.pipeline import build_data
from sparsejax.plugs import ConfigError, resolve
from tests.train.tiny_run import get_config

KINDS = (GaussianNoise, ShotNoise, ImpulseNoise)


def digits(batch_size=32, seed=0, **changes):
    config = DataConfig(source="digits", task="classification", **changes)
    return build_data(config, model_kind="vit", batch_size=batch_size, seed=seed)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(0, 1000))
def test_a_corrupted_image_is_float32_in_the_unit_range(kind, severity, seed):
    image = np.random.default_rng(seed).random((5, 7, 3)).astype(np.float32)
    found = kind(severity)(image, np.random.default_rng(seed))
    assert found.dtype == np.float32 and found.shape == image.shape
    assert found.min() >= 0 and found.max() <= 1 and (found != image).any()


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_noise_has_the_published_size(severity):
    random, grey = np.random.default_rng(1), np.full((300, 300, 1), 0.5, np.float32)
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    added = GaussianNoise(severity)(grey, random) - grey
    assert np.quantile(added, [0.3, 0.7]) == pytest.approx([-0.5244 * sigma, 0.5244 * sigma], rel=0.05)
    photons = (60, 25, 12, 5, 3)[severity - 1]
    dim = ShotNoise(severity)(grey / 5, random)
    assert dim.mean() == pytest.approx(0.1, rel=0.05) and dim.var() == pytest.approx(0.1 / photons, rel=0.05)
    assert not ShotNoise(severity)(np.zeros_like(grey), random).any()
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    hit = ImpulseNoise(severity)(grey, random)
    assert [np.mean(hit == 0), np.mean(hit == 1)] == pytest.approx([share / 2] * 2, rel=0.1)


def test_a_corruption_changes_held_out_images_alone_and_always_in_the_same_way():
    plain, noisy = ([*digits().evaluation_batches(20, corruption=name)] for name in ("", "impulse_noise:2"))
    assert len(plain) == len(noisy) == 12  # 359 images
    for a, b in zip(plain, noisy, strict=True):
        np.testing.assert_array_equal(a["labels"], b["labels"])
        np.testing.assert_array_equal(a["weights"], b["weights"])
        assert (a["images"] != b["images"]).any()
    again = [*digits(seed=5).evaluation_batches(20, corruption="impulse_noise:2")]
    other = [*digits(batch_size=96).evaluation_batches(20, corruption="impulse_noise:2")]
    joined = [np.concatenate([b["images"] for b in batches])[:359] for batches in (noisy, again, other)]
    np.testing.assert_array_equal(joined[0], joined[1])
    np.testing.assert_array_equal(joined[0], joined[2])  # each image has noise of its own, whatever its batch
    halves = [next(digits().evaluation_batches(1, rows, "impulse_noise:2"))["images"] for rows in (slice(0, 16), slice(16, 32))]
    np.testing.assert_array_equal(np.concatenate(halves), noisy[0]["images"])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_of_the_training_labels_is_drawn_uniformly_once_and_for_all(share):
    clean, noisy = digits(), digits(label_noise=share)
    epoch = {}
    for data, name in ((clean, "clean"), (noisy, "noisy")):
        rows = [data.rows.row("train", 0, index) for index in range(2 * 1438)]
        keys = [row["images"].tobytes() for row in rows]
        labels = [int(row["labels"]) for row in rows]
        first, second = (dict(zip(keys[part], labels[part], strict=True)) for part in (slice(0, 1438), slice(1438, None)))
        assert first == second
        epoch[name] = np.array([first[key] for key in sorted(first)])
    wrong = np.mean(epoch["clean"] != epoch["noisy"])
    assert wrong == pytest.approx(0.9 * share, abs=0.04)  # a tenth of the draws hits the true label
    if share == 1:
        assert np.bincount(epoch["noisy"], minlength=10) / len(epoch["noisy"]) == pytest.approx([0.1] * 10, abs=0.03)
    for a, b in zip(clean.evaluation_batches(3), noisy.evaluation_batches(3), strict=True):
        np.testing.assert_array_equal(a["labels"], b["labels"])
    if share:
        assert clean.fingerprint != noisy.fingerprint


def test_noise_of_another_seed_is_other_noise():
    rows = digits(label_noise=0.5).rows
    first, second = ({rows.row("train", s, i)["images"].tobytes(): int(rows.row("train", s, i)["labels"]) for i in range(1438)}
                     for s in (0, 1))
    assert np.mean([first[key] != second[key] for key in first]) == pytest.approx(1 - 0.55**2 - 9 * 0.05**2, abs=0.05)


def test_an_epoch_may_be_cut_short_to_the_first_images():
    data = digits(train_images=40)
    assert data.rows.count("train") == 40 and data.rows.count("evaluation") == 359
    seen = {data.rows.row("train", 0, index)["images"].tobytes() for index in range(120)}
    first = {data.rows.images.example("train", index)[0].tobytes() for index in range(40)}
    assert seen == first and data.fingerprint != digits().fingerprint


@pytest.mark.parametrize(("field", "value", "match"), [
    ("label_noise", 0.1, "data.label_noise = 0.1: is of labelled images"),
    ("train_images", 5, "data.train_images = 5: is of labelled images"),
])
def test_text_has_neither_label_noise_nor_a_number_of_images(field, value, match):
    with pytest.raises(ConfigError, match=match):
        build_data(DataConfig(**{field: value}), model_kind="decoder", batch_size=2, seed=0)


def test_what_makes_no_sense_is_refused_by_name():
    with pytest.raises(ConfigError, match="severity = 6: must be 1 to 5"):
        resolve("corruption", "shot_noise:6")
    with pytest.raises(ConfigError, match="data.train_images = 2000: digits has 1438"):
        digits(train_images=2000).rows.count("train")
    config = get_config()
    config.evaluate.corruptions = ("gaussian_noise:1",)
    with pytest.raises(ConfigError, match="evaluate.corruptions.*are of images"):
        finalize(config)
    config.evaluate.corruptions = ("gaussian_nose",)
    with pytest.raises(ConfigError, match="Did you mean 'gaussian_noise'"):
        finalize(config)
