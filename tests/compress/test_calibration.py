"""Which tokens calibrate, and that an evaluation that shares any run of 64 of them is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.compress.calibration import SHINGLE, CalibrationSpec, calibrate, check_disjoint, rolling_hashes
from sparsejax.compress.statistics import Quantiles, second_moment
from sparsejax.data.tokenizers import Bytes
from sparsejax.plugs import ConfigError

TOKENIZER = Bytes().build(None, 0, ())


def drawn(**fields):
    return calibrate(CalibrationSpec(**{"sequences": 4, "length": 128, **fields}), TOKENIZER, [])


def test_windows_are_drawn_by_seed_without_replacement():
    first, again, other = drawn(), drawn(), drawn(seed=1)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.tokens.shape == (4, 128) and len(np.unique(first.tokens, axis=0)) == 4
    assert first.describe()["source"] == "stdlib:calibration"


@given(offset=st.integers(0, 63), start=st.integers(0, 300), length=st.integers(SHINGLE, 128))
def test_a_shared_run_is_found_at_any_offset_if_it_covers_a_shingle(offset, start, length):
    calibration = drawn()
    run = calibration.tokens[1, offset : offset + length]
    evaluated = np.random.default_rng(0).integers(0, 256, (2, 512)).astype(np.int32)
    evaluated[1, start : start + len(run)] = run[: 512 - start]
    covered = min(len(run), 512 - start) >= (-offset) % SHINGLE + SHINGLE
    if covered:
        with pytest.raises(ConfigError, match="1 of 2 windows of c4"):
            check_disjoint(calibration.shingles, evaluated, "c4")
    elif len(run) < SHINGLE:
        check_disjoint(calibration.shingles, evaluated, "c4")


def test_hashes_are_of_the_run_alone_and_short_rows_have_none():
    row = np.arange(200, dtype=np.int32) % 50
    hashes = rolling_hashes(row)
    assert len(hashes) == 137 and hashes[0] == hashes[50] != hashes[1]
    assert len(rolling_hashes(row[:63])) == 0


def test_splits_of_the_embedded_text_are_disjoint():
    evaluation = drawn(source="stdlib:evaluation", sequences=8)
    check_disjoint(drawn().shingles, evaluation.tokens, "stdlib:evaluation")


def test_several_texts_take_turns(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name} is written here. " * 400)
    a, b = (f"text:{tmp_path / name}" for name in ("a", "b"))
    both = drawn(source=f"{a},{b}", sequences=5)
    np.testing.assert_array_equal(both.tokens[0::2], drawn(source=a, sequences=3).tokens)
    np.testing.assert_array_equal(both.tokens[1::2], drawn(source=b, sequences=2).tokens)
    assert both.spec.texts == [a, b] and both.text_sha256.count(",") == 1
    comma = tmp_path / "a, b"
    comma.write_text((tmp_path / "a").read_text())
    np.testing.assert_array_equal(drawn(source=f"text:{comma}", sequences=3).tokens, drawn(source=a, sequences=3).tokens)
    with pytest.raises(ConfigError, match=r"calibration\.sequences = 1: must be at least the 2 texts"):
        drawn(source=f"{a},{b}", sequences=1)


def test_what_makes_no_calibration_is_refused():
    with pytest.raises(ConfigError, match=r"calibration\.sequences = 10000000: .*windows of 128"):
        drawn(sequences=10**7)
    with pytest.raises(ConfigError, match=r"calibration\.skip_first"):
        drawn(skip_first=128)
    with pytest.raises(ConfigError, match="--data"):
        drawn(source="nothing:here")


@given(st.integers(1, 400), st.floats(0, 0.99), st.integers(0, 2**31))
def test_a_quantile_drops_that_share_to_within_one_entry(count, sparsity, seed):
    scores = np.abs(np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32))
    dropped = np.mean(scores <= Quantiles(scores)(sparsity))
    assert sparsity - 1e-9 <= dropped < sparsity + 1 / scores.size + 1e-9


def test_second_moments_leave_out_first_tokens():
    x = np.random.default_rng(0).normal(size=(2, 5, 3))
    np.testing.assert_allclose(second_moment(x, 2), np.einsum("bti,btj->ij", x[:, 2:], x[:, 2:]) / 6)
