"""Synthetic tasks: the targets are what a second algorithm finds, and examples are pure functions of (seed, split, index)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.data import synthetic
from sparsejax.data.synthetic import EQUALS, FIRST_SYMBOL, PAD, ListOps, ModularArithmetic, MultiQueryRecall
from sparsejax.plugs import ConfigError, resolve

SPECS = ["copy", "copy:symbols=3", "induction", "induction:8,2", "mqar:pairs=4,symbols=32", "modular:7", "modular:11,mul",
         "modular:operation=sub", "dyck", "dyck:1,3", "listops", "listops:2,5"]


@pytest.mark.parametrize("spec", SPECS)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 10**6), extra=st.integers(0, 60),
       split=st.sampled_from(["train", "evaluation"]))
def test_weighted_targets_are_what_the_oracle_finds(spec, seed, index, extra, split):
    task = resolve("source", spec)
    length = task.least_length + extra
    example = task.example(seed, split, index, length)
    answers, weighted = task.answers(example.tokens), example.weights > 0
    assert (example.targets[weighted] == answers[weighted]).all()
    assert (answers[~weighted & (example.segment_ids > 0)] == synthetic.NO_ANSWER).all()
    assert all(len(array) == length for array in example[:5])
    assert example.tokens.min() >= 0 and max(example.tokens.max(), example.targets.max()) < task.vocab_size
    assert not weighted[example.segment_ids == 0].any() and (example.tokens[example.segment_ids == 0] == PAD).all()


@pytest.mark.parametrize("spec", SPECS)
def test_an_example_depends_on_seed_split_and_index_alone(spec):
    task, again = resolve("source", spec), resolve("source", spec)
    first = task.example(3, "train", 5, 64)
    assert all((a == b).all() for a, b in zip(first[:5], again.example(3, "train", 5, 64)[:5], strict=True))
    others = [task.example(4, "train", 5, 64), task.example(3, "evaluation", 5, 64), task.example(3, "train", 6, 64)]
    assert all((first.tokens != other.tokens).any() for other in others)


@pytest.mark.parametrize("spec", [s for s in SPECS if not s.startswith("mqar")])
def test_targets_are_the_next_tokens_of_their_segment(spec):
    task = resolve("source", spec)
    example = task.example(0, "train", 1, 48)
    inside = (example.segment_ids[1:] == example.segment_ids[:-1]) & (example.segment_ids[1:] > 0)
    assert (example.targets[:-1][inside] == example.tokens[1:][inside]).all()


def test_mqar_has_the_published_layout():
    task = MultiQueryRecall(pairs=8, symbols=64)
    for index in range(30):
        example = task.example(1, "train", index, 64)
        keys, values = example.tokens[0:16:2], example.tokens[1:16:2]
        places = np.flatnonzero(example.weights)
        assert len(set(keys)) == 8 and (keys < FIRST_SYMBOL + 32).all() and (values >= FIRST_SYMBOL + 32).all()
        assert sorted(example.tokens[places]) == sorted(keys) and (places >= 16).all() and (places % 2 == 0).all()


def test_mqar_queries_come_soon_after_their_pairs():
    task = MultiQueryRecall(pairs=1, symbols=64)
    gaps = [int(np.flatnonzero(task.example(0, "train", i, 64).weights)[0]) - 2 for i in range(400)]
    density = np.arange(1, 32) ** (0.01 - 1)
    assert np.mean(gaps) == pytest.approx(2 * np.sum(np.arange(31) * density / density.sum()), rel=0.15)


def test_modular_evaluation_pairs_are_never_trained_on():
    task = ModularArithmetic(modulus=13)
    trained, held_out = set(task.pairs("train").tolist()), set(task.pairs("evaluation").tolist())
    assert not trained & held_out and len(trained | held_out) == 169
    example = task.example(9, "train", 0, 64)
    at = np.flatnonzero(example.tokens == EQUALS)
    a, b = example.tokens[at - 3] - FIRST_SYMBOL - 1, example.tokens[at - 1] - FIRST_SYMBOL - 1
    assert set((a * 13 + b).tolist()) <= trained


def test_listops_of_its_paper_is_nine():
    symbols = {"[MAX": 11, "[MIN": 10, "]": 14}
    text = ["[MAX", 2, 9, "[MIN", 4, 7, "]", 0, "]"]
    tokens = [1, *(FIRST_SYMBOL + symbols.get(symbol, symbol) for symbol in text), EQUALS]
    assert ListOps().answers(np.array(tokens))[-1] == FIRST_SYMBOL + 9


def test_listops_labels_cover_the_digits_and_equal_the_answer():
    examples = [ListOps().example(0, "train", i, 40) for i in range(300)]
    assert {e.label for e in examples} == set(range(10))
    assert all(e.targets[e.weights > 0].tolist() == [FIRST_SYMBOL + e.label] for e in examples)


@pytest.mark.parametrize(("spec", "message"), [
    ("copy:0", "copy.symbols = 0"), ("induction:4,4", "induction.symbols = 4"),
    ("mqar:pairs=40,symbols=64", "mqar.symbols = 64"), ("modular:5,add,1", "modular.train_fraction = 1"),
    ("modular:operation=mull", "modular.operation = 'mull'.*Did you mean 'mul'"),
    ("dyck:kinds=0", "dyck.kinds = 0"), ("listops:arguments=1", "listops.arguments = 1"), ("mqra", "Did you mean 'mqar'")])
def test_a_task_that_cannot_be_generated_is_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        resolve("source", spec)
