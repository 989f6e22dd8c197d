"""Pruning in cycles that also wakes silent units."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data.vision import DigitImages
from sparsejax.methods.pruning.activate_while_pruning import (
    activation_step,
    dead_rate,
    magnitude_step,
    mlp_trainer,
    prune_while_training,
    relu_mlp,
)
from sparsejax.plugs import ConfigError


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return {str(i): rng.normal(size=shape).astype(np.float32) / shape[0] ** 0.5 for i, shape in enumerate(shapes)}


def test_the_dead_rate_is_told_apart_into_units_that_never_answer_and_those_that_sometimes_do_not():
    hidden = np.array([[0, 1, 0, 2], [0, 0, 0, 1], [0, 3, 0, 0]])
    assert dead_rate(hidden) == pytest.approx((8 / 12, 2 / 4, 8 / 12 - 2 / 4))


@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_activation_step_takes_the_negative_weights_that_moved_least(seed, rate):
    start, end = draw(seed, (6, 5), (5, 3)), draw(seed + 1, (6, 5), (5, 3))
    alive = magnitude_step(end, {name: np.ones(w.shape, bool) for name, w in end.items()}, 0.2)
    assert sum(mask.sum() for mask in alive.values()) == 45 - 9
    left = activation_step(start, end, alive, rate)
    gone = {name: alive[name] & ~left[name] for name in alive}
    assert all((end[name][gone[name]] < 0).all() for name in end)
    negative = sum((alive[name] & (end[name] < 0)).sum() for name in end)
    assert sum(mask.sum() for mask in gone.values()) == min(int(rate * 36), negative)
    moved = {name: np.abs(end[name] - start[name]) for name in end}
    taken = np.concatenate([moved[name][gone[name]] for name in end])
    stayed = np.concatenate([moved[name][left[name] & (end[name] < 0)] for name in end])
    assert taken.max(initial=0) <= stayed.min(initial=np.inf)


@given(st.integers(0, 10**6))
def test_units_only_wake_when_negative_weights_go_and_inputs_are_not_negative(seed):
    kernels = draw(seed, (8, 12), (12, 3))
    x = np.abs(np.random.default_rng(seed).normal(size=(20, 8))).astype(np.float32)
    alive = {name: np.ones(w.shape, bool) for name, w in kernels.items()}
    left = activation_step(draw(seed + 1, (8, 12), (12, 3)), kernels, alive, 0.2)
    before, after = (relu_mlp({n: np.where(m[n], kernels[n], 0) for n in m}, x)[1][0] for m in (alive, left))
    assert (np.asarray(after)[np.asarray(before) > 0] > 0).all()
    assert dead_rate(after).total <= dead_rate(before).total


def digits():
    flat = lambda images: images.reshape(len(images), -1).astype(np.float32) / 16  # noqa: E731
    return {split: (flat(images), labels) for split, (images, labels) in DigitImages().load().items()}


def test_a_network_of_digits_keeps_its_accuracy_through_the_cycles_and_rewinds():
    data = digits()
    initial = draw(0, (64, 64), (64, 64), (64, 10))
    starts = []
    train = mlp_trainer(*data["train"], steps=150)

    def recorded(start, masks):
        starts.append((start, masks))
        return train(start, masks)

    cycles = list(prune_while_training(initial, recorded, cycles=4, rate=0.3, activation_rate=0.02))
    assert [cycle.sparsity for cycle in cycles] == pytest.approx([1 - 0.7**i for i in range(4)], abs=1e-3)
    for (start, masks), cycle in zip(starts, cycles, strict=True):
        for name in initial:
            np.testing.assert_array_equal(start[name], np.where(masks[name], initial[name], 0))
            assert not cycle.trained[name][~masks[name]].any()
    images, labels = data["evaluation"]
    accuracy = [np.mean(np.asarray(relu_mlp(cycle.trained, images)[0]).argmax(1) == labels) for cycle in cycles]
    assert min(accuracy) > 0.9


def test_no_activation_rate_is_iterative_magnitude_pruning():
    initial = draw(1, (6, 5), (5, 3))

    def train(start, masks):
        return {name: np.where(masks[name], start[name] * 1.5, 0) for name in start}

    last = list(prune_while_training(initial, train, cycles=3, rate=0.4, activation_rate=0))[-1]
    size = np.concatenate([np.abs(w).ravel() for w in initial.values()])
    kept = np.concatenate([mask.ravel() for mask in last.masks.values()])
    assert kept.sum() == 27 - int(0.4 * 27) and size[kept].min() > size[~kept].max()


@pytest.mark.parametrize("bad", [{"cycles": 0}, {"rate": 1.0}, {"activation_rate": 0.5}])
def test_rates_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        next(prune_while_training({}, lambda start, masks: start, **{"cycles": 2, **bad}))
