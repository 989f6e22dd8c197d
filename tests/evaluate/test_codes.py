"""Activation codes: packing, Hamming distances and distinct codes against plain numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.evaluate.codes import CodeStatistics, code_statistics, hamming, pack, unpack


@settings(max_examples=12, deadline=None)
@given(width=st.sampled_from((1, 32, 70)), seed=st.integers(0, 99))  # few widths: each is compiled
def test_packed_codes_come_back_and_differ_in_as_many_bits(width, seed):
    count = 5
    bits = np.random.default_rng(seed).random((2, count, width)) < 0.4
    words = np.asarray(pack(bits))
    assert words.dtype == np.uint32 and words.shape == (2, count, -(-width // 32))
    np.testing.assert_array_equal(unpack(words, width), bits)
    np.testing.assert_array_equal(hamming(words[0], words[1]), (bits[0] != bits[1]).sum(-1))
    np.testing.assert_array_equal(hamming(words[0], words[0]), np.zeros(count))


def test_distinct_codes_are_counted_by_layer_and_over_layers():
    bits = np.zeros((2, 6, 40), bool)
    bits[0, :, 0] = [0, 1, 0, 1, 0, 1]  # two codes
    bits[1, 3:, 39] = True  # two others; four together
    found = code_statistics(np.asarray(pack(bits)), length=3)
    assert found.distinct.tolist() == [2, 2] and found.distinct_all_layers == 4 and found.tokens == 6
    np.testing.assert_allclose(found.redundancy, 4 / 6)
    # Neighbours within the two sequences of three: four pairs that all differ in layer 0, none in layer 1.
    np.testing.assert_allclose(found.hamming_neighbours, [1, 0])
    assert 0 < found.hamming_random[1] < 1
    again = CodeStatistics.of({name: np.asarray(value) for name, value in vars(found).items()})
    assert again.tokens == 6 and again.distinct_all_layers == 4


def test_one_unit_has_two_codes_at_most_and_scaling_its_input_keeps_them():
    z = np.random.default_rng(1).standard_normal((1, 50, 1))
    codes = [code_statistics(np.asarray(pack(scale * z > 0)), 50).distinct[0] for scale in (1, 7.5)]
    assert codes == [2, 2]
    assert np.isnan(code_statistics(np.asarray(pack(z[:, :1] > 0)), 1).hamming_neighbours).all()
    assert code_statistics(np.asarray(pack(z > 9)), 50).redundancy[0] == pytest.approx(49 / 50)
