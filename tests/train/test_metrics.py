"""Metrics from the device to the files of a run folder."""

import csv
import importlib.util
import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.plugs import ConfigError
from sparsejax.train import metrics
from sparsejax.train.metrics import (
    DebiasedEMA,
    MetricStream,
    WatchLog,
    Writers,
    mfu,
    mfu_formula,
    peak_flops,
    read_metrics,
    read_watch,
)


def test_each_step_is_fetched_once_and_only_after_the_next_was_dispatched(monkeypatch):
    events = []
    fetch = metrics.fetch
    monkeypatch.setattr(metrics, "fetch", lambda tree: events.append(f"fetch {int(tree['loss'])}") or fetch(tree))
    step = jax.jit(lambda x: {"loss": x})
    stream, records = MetricStream(), []
    for t in range(4):
        device_metrics = step(jnp.float32(t))
        events.append(f"dispatch {t}")
        records.append(stream.push(t, device_metrics))
    records += [stream.flush(), stream.flush()]
    assert events == ["dispatch 0", "dispatch 1", "fetch 0", "dispatch 2", "fetch 1", "dispatch 3", "fetch 2", "fetch 3"]
    assert [r and r.step for r in records] == [None, 0, 1, 2, 3, None]
    assert [r.scalars["loss"] for r in records if r] == [0.0, 1.0, 2.0, 3.0]


def test_a_record_separates_numbers_from_arrays_and_joins_nested_names():
    stream = MetricStream()
    stream.push(7, {"loss": jnp.float32(2), "norm": {"mlp": jnp.bfloat16(3), "per_layer": jnp.arange(3.0)}})
    record = stream.flush()
    assert record.scalars == {"loss": 2.0, "norm/mlp": 3.0} and list(record.arrays) == ["norm/per_layer"]
    np.testing.assert_array_equal(record.arrays["norm/per_layer"], [0, 1, 2])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.floats(0.1, 0.99))
def test_the_average_is_the_normalised_exponential_weighting(values, beta):
    ema = DebiasedEMA(beta)
    for x in values:
        ema = ema.update(x)
    weights = beta ** np.arange(len(values))[::-1].astype(float)
    assert ema.value == pytest.approx(weights @ np.array(values) / weights.sum(), rel=1e-6, abs=1e-6)


def test_the_average_of_a_constant_is_that_constant_from_the_first_value_on():
    ema = DebiasedEMA()
    assert math.isnan(ema.value)
    for _ in range(5):
        ema = ema.update(3.25).update(math.nan).update(math.inf)  # losses of skipped steps
        assert ema.value == pytest.approx(3.25)
    assert ema.count == 5


def test_mfu_is_its_formula_and_nan_without_a_peak():
    assert mfu(6e9, 1e5, 8, 312e12) == pytest.approx(6e9 * 1e5 / (8 * 312e12))
    assert math.isnan(mfu(6e9, 1e5, 1, peak_flops("cpu")))
    formula = mfu_formula(6e9, 8, "NVIDIA A100", 312e12)
    assert formula == "MFU = 6e+09 flops/token x tokens/s / (8 x 312 Tflop/s peak of NVIDIA A100)"
    assert "'cpu' is not known" in mfu_formula(6e9, 1, "cpu", math.nan)


@pytest.mark.parametrize(
    ("kind", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "bfloat16", 989e12),
        ("NVIDIA H200 NVL", "bfloat16", 835e12),
        ("NVIDIA B200", "bfloat16", 2250e12),
        ("TPU v4", "float32", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
        ("TPU7x", "bfloat16", 2307e12 / 2),
    ],
)
def test_known_devices_have_their_published_peak(kind, dtype, expected):
    assert peak_flops(kind, dtype) == expected


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA GH200 480GB", "TPU v4 lite", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"])
def test_devices_without_a_row_have_no_peak_unless_the_config_gives_one(kind):
    assert math.isnan(peak_flops(kind))
    assert peak_flops(kind, override=5e12) == 5e12
    assert math.isnan(peak_flops("NVIDIA H200", "float16"))
    with pytest.raises(ConfigError, match="log.peak_flops"):
        peak_flops(kind, override=-1.0)


def read_csv(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_csv_holds_the_union_of_all_columns(tmp_path):
    with Writers(tmp_path, ("csv",), "{}") as writers:
        writers.write(0, {"loss": 1.5})
        writers.write(1, {"loss": math.nan, "eval/loss": 2.0})
        writers.write(2, {"zeros, counted": np.float32(0.1)})
    rows = read_csv(tmp_path)
    assert list(rows[0]) == ["step", "loss", "eval/loss", "zeros, counted"]
    assert [row["loss"] for row in rows] == ["1.5", "nan", ""]
    assert np.float32(rows[2]["zeros, counted"]) == np.float32(0.1)


def test_jsonl_is_strict_json_and_reads_back(tmp_path):
    with Writers(tmp_path, ("jsonl",), "{}") as writers:
        writers.write(0, {"loss": 1.5, "mfu": math.nan})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == {"step": 0, "loss": 1.5, "mfu": None}
    (row,) = read_metrics(tmp_path)
    assert row["loss"] == 1.5 and math.isnan(row["mfu"])


@settings(max_examples=25, deadline=None)
@given(killed_at=st.integers(1, 20), resumed_at=st.integers(0, 20), cut=st.integers(0, 12))
def test_a_resumed_curve_equals_the_curve_of_an_unbroken_run(tmp_path_factory, killed_at, resumed_at, cut):
    resumed_at = min(resumed_at, killed_at - 1)
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")

    def steps(folder, start, end):
        with Writers(folder, ("csv", "jsonl"), "{}", first_step=start) as writers:
            for t in range(start, end):
                writers.write(t, {"loss": 1 / (t + 1)})
                if t % 5 == 4:
                    writers.write(t, {"eval/loss": t / 7})

    steps(whole, 0, 24)
    steps(broken, 0, killed_at)
    for name in ("metrics.csv", "metrics.jsonl"):  # the last row was cut while being written
        content = (broken / name).read_bytes()
        last = len(content) - content[:-1].rfind(b"\n") - 1
        (broken / name).write_bytes(content[: len(content) - min(cut, last - 1)])
    steps(broken, resumed_at, 24)
    assert read_metrics(whole) == read_metrics(broken)
    # A column that came with a dropped row stays, so only the rows are compared.
    assert [set(row.items()) for row in read_csv(whole)] == [set(row.items()) for row in read_csv(broken)]


def test_a_file_that_holds_no_metrics_is_refused_and_kept(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,age\nx,3\n")
    with pytest.raises(ConfigError, match="metrics.csv is not a metrics file"):
        Writers(tmp_path, ("csv",), "{}")
    assert (tmp_path / "metrics.csv").read_text().startswith("name")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnoise\n')
    with pytest.raises(ConfigError, match="metrics.jsonl.*noise"):
        Writers(tmp_path, ("jsonl",), "{}")


def test_a_device_array_is_refused_by_the_writers(tmp_path):
    with Writers(tmp_path, ("jsonl",), "{}") as writers, pytest.raises(TypeError, match="loss"):
        writers.write(0, {"loss": jnp.float32(1)})


def test_tensorboard_gets_every_scalar_and_the_config(tmp_path):
    with Writers(tmp_path, ("tensorboard",), '{"steps": 3}') as writers:
        writers.write(4, {"loss": 1.5, "eval/loss": 2.5})
    with Writers(tmp_path, ("tensorboard",), "{}", first_step=5) as writers:
        writers.write(5, {"loss": 1.25})
    content = b"".join(path.read_bytes() for path in sorted((tmp_path / "tensorboard").iterdir()))
    assert b"eval/loss" in content and b'"steps": 3' in content
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    Writers(tmp_path, ("tensorboard",), "{}").close()  # a new run leaves no events of the old one
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_unknown_repeated_and_uninstalled_writers_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        Writers(tmp_path, ("tensorbord",), "{}")
    with pytest.raises(ConfigError, match="given twice"):
        Writers(tmp_path, ("csv", "csv"), "{}")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(ConfigError, match="pip install wandb"):
        Writers(tmp_path, ("csv", "wandb"), "{}")
    assert not list(tmp_path.iterdir())


def test_wandb_continues_the_run_it_started(tmp_path, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(id="abc", log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("end"))
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = lambda **options: started.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for first_step in (0, 3):
        with Writers(tmp_path, ("wandb",), '{"seed": 1}', first_step) as writers:
            writers.write(first_step, {"loss": 1.0})
    assert [options["id"] for options in started] == [None, "abc"] and started[0]["config"] == {"seed": 1}
    assert logged == [(0, {"loss": 1.0}), "end", (3, {"loss": 1.0}), "end"]


def test_watched_arrays_come_back_as_series_and_are_cut_on_resume(tmp_path):
    log = WatchLog(tmp_path)
    for step in (0, 20, 40):
        log.write(step, {"zero_fraction": np.full(3, step / 40), "grad_norm/mlp": 1.0})
    log = WatchLog(tmp_path, first_step=40)
    log.write(60, {"zero_fraction": np.ones(3)})
    watch = read_watch(tmp_path)
    assert watch["zero_fraction"][0].tolist() == [0, 20, 60] and watch["grad_norm/mlp"][0].tolist() == [0, 20]
    np.testing.assert_array_equal(watch["zero_fraction"][1], [[0] * 3, [0.5] * 3, [1] * 3])


def test_long_position_axes_are_averaged_into_bins(tmp_path):
    values = np.arange(2 * 1000, dtype=np.float32).reshape(2, 1000)
    WatchLog(tmp_path, max_positions=64).write(0, {"zero_fraction_position": values})
    watch = read_watch(tmp_path)
    binned = watch["zero_fraction_position"][1][0]
    assert binned.shape == (2, 64) and watch["zero_fraction_position_length"][1].tolist() == [1000]
    edges = np.linspace(0, 1000, 65).astype(int)
    expected = np.stack([values[:, a:b].mean(1) for a, b in zip(edges, edges[1:], strict=False)], axis=1)
    np.testing.assert_allclose(binned, expected, rtol=1e-6)


def test_a_watched_quantity_that_changes_shape_is_named(tmp_path):
    log = WatchLog(tmp_path)
    log.write(0, {"zero_fraction": np.zeros(3)})
    log.write(20, {"zero_fraction": np.zeros(4)})
    with pytest.raises(ConfigError, match=r"'zero_fraction' has shape \(4,\), but \(3,\) at step 0"):
        read_watch(tmp_path)
