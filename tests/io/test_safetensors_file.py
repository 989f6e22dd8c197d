"""Safetensors files of the library are read, ours are read by the library, and no file whatsoever is half-read."""

import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.io.safetensors_file import DTYPES, INDEX, SINGLE, open_safetensors, write_safetensors
from sparsejax.plugs import ConfigError

A_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def encoded(header, data: bytes = bytes(8), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def planned(arrays):
    return [(name, array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()]


def as_bits(array) -> tuple:
    return array.shape, array.dtype, np.ascontiguousarray(array).tobytes()


def sample(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    count = int(np.prod(shape))
    raw = np.random.RandomState(seed).bytes(count * dtype.itemsize)
    array = np.frombuffer(raw, np.uint8)
    return (array % 2 if dtype == np.bool_ else array).view(dtype).reshape(shape)


shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(sample, st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 99)),
    min_size=1,
    max_size=6,
)
in_numpy = {dtype for dtype in DTYPES.values() if dtype.isbuiltin == 1 or dtype == ml_dtypes.bfloat16}


@given(tensors)
def test_what_the_library_writes_is_read_bit_for_bit(tmp_path_factory, arrays):
    path = tmp_path_factory.mktemp("lib") / "any.safetensors"
    arrays = {name: array for name, array in arrays.items() if array.dtype in in_numpy}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    source = open_safetensors(path)
    assert source.metadata == {"format": "np"}
    assert {name: as_bits(source.read(name)) for name in source.tensors} == {name: as_bits(a) for name, a in arrays.items()}
    assert all(source.tensors[name] == (array.shape, array.dtype) for name, array in arrays.items())


@given(tensors, st.integers(1, 400))
def test_what_is_written_is_read_again_and_by_the_library(tmp_path_factory, arrays, most):
    folder = tmp_path_factory.mktemp("own") / "model"
    written = write_safetensors(folder, planned(arrays), most)
    source = open_safetensors(folder)
    assert {name: as_bits(source.read(name)) for name in source.tensors} == {name: as_bits(a) for name, a in arrays.items()}
    assert source.metadata == {"format": "pt"}
    shards = [path for path in written.files if path.suffix == ".safetensors"]
    assert sorted(folder.iterdir()) == sorted(written.files) and written.size == sum(a.nbytes for a in arrays.values())
    for path in shards:
        library = dict(safetensors.deserialize(path.read_bytes()))
        sizes = [arrays[name].nbytes for name in library]
        assert sum(sizes) <= most or np.count_nonzero(sizes) == 1
        for name, there in library.items():
            assert (tuple(there["shape"]), DTYPES[there["dtype"]], bytes(there["data"])) == as_bits(arrays[name])
    assert len(shards) == 1 or json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == written.size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (b"\1\2\3", "truncated"),
        (encoded({}, b"", 2**60), "header length"),
        (encoded({}, b"", 2**64 - 1), "header length"),
        (encoded({}, b"", 1000), "header length"),
        (encoded(b"not JSON at all"), "not valid JSON"),
        (encoded(b"\xff\xfe{}"), "not valid JSON"),
        (encoded(b"[1, 2]"), "expected a JSON object"),
        (encoded(b"[" * 200_000), "not valid JSON"),
        (encoded(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (encoded(b'{"a": 1, "a": 2}'), "'a' is given twice"),
        (encoded({"a": 3}), "expected dtype, shape and data_offsets"),
        (encoded({"a": {**A_ENTRY, "more": 1}}), "expected dtype, shape and data_offsets"),
        (encoded({"a": {**A_ENTRY, "dtype": "F33"}}), "Did you mean 'F32'"),
        (encoded({"a": {**A_ENTRY, "dtype": ["F32"]}}), "dtype"),
        (encoded({"a": {**A_ENTRY, "shape": [-2]}}), "shape"),
        (encoded({"a": {**A_ENTRY, "shape": [2.0]}}), "shape"),
        (encoded({"a": {**A_ENTRY, "shape": [True, 2]}}), "shape"),
        (encoded({"a": {**A_ENTRY, "shape": [1] * 40 + [2]}}), "shape"),
        (encoded({"a": {**A_ENTRY, "shape": [3]}}), "F32 of shape [3] takes 12"),
        (encoded({"a": {**A_ENTRY, "shape": [10**9]}}), "takes 4000000000"),
        (encoded({"a": {**A_ENTRY, "shape": [2**62, 2**62]}}), "more bytes than can be addressed"),
        (encoded({"a": {**A_ENTRY, "shape": [0, 2**62], "data_offsets": [0, 0]}}), "more bytes than can be addressed"),
        (encoded({"a": {**A_ENTRY, "data_offsets": [8, 0]}}), "data_offsets"),
        (encoded({"a": {**A_ENTRY, "data_offsets": [0, 8, 9]}}), "data_offsets"),
        (encoded({"a": {**A_ENTRY, "data_offsets": [4, 12]}}), "a = 12: ends after the file"),
        (encoded({"a": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}), "ends after the file"),
        (encoded({"a": A_ENTRY, "b": {**A_ENTRY, "data_offsets": [4, 12]}}, bytes(12)), "b = 4: expected to begin at 8"),
        (encoded({"a": A_ENTRY, "b": {**A_ENTRY, "data_offsets": [12, 20]}}, bytes(20)), "leave gaps"),
        (encoded({"a": A_ENTRY}, bytes(9)), "end at byte 8"),
        (encoded({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    ],
)
def test_a_bad_header_is_refused_by_file_and_tensor(tmp_path, content, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(ConfigError) as error:
        open_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error.value) and str(path) in str(error.value) and len(str(error.value)) < 1500
    assert peak < 4 * 2**20


def small_file(tmp_path: Path) -> bytes:
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(True), "c": np.zeros((0, 3), np.int16)}
    (path,) = write_safetensors(tmp_path / "small", planned(arrays)).files
    return path.read_bytes()


def read_everything(path: Path) -> None:
    """Opens and reads; anything but success within the file's bytes, or a ConfigError, fails the test."""
    try:
        source = open_safetensors(path)
        for name in source.tensors:
            assert source.read(name).nbytes <= path.stat().st_size * 1000
    except ConfigError as error:
        assert str(path) in str(error)


def test_every_truncation_is_refused(tmp_path):
    whole = small_file(tmp_path)
    path = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="cut.safetensors"):
            open_safetensors(path)


def test_every_flipped_bit_is_survived(tmp_path):
    whole = small_file(tmp_path)
    path = tmp_path / "flipped.safetensors"
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        read_everything(path)


@given(st.binary(max_size=60), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_any_bytes_are_survived(tmp_path_factory, content, length):
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    path.write_bytes(encoded(content, b"", length))
    read_everything(path)


def sharded(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    arrays = {f"layer.{i}.weight": np.full((2, 2), i, np.float32) for i in range(4)}
    write_safetensors(tmp_path / "sharded", planned(arrays), 32)
    return tmp_path / "sharded", arrays


@pytest.mark.parametrize(
    ("name", "file", "message"),
    [
        ("layer.0.weight", "../small.safetensors", "expected a file beside the index"),
        ("layer.0.weight", "..\\small.safetensors", "expected a file beside the index"),
        ("layer.0.weight", 3, "expected a file beside the index"),
        ("layer.0.weight", "model-00009-of-00002.safetensors", "missing beside it"),
        ("layer.0.weight", "model-00002-of-00002.safetensors", "layer.0.weight"),
        ("layer.9.weight", "model-00001-of-00002.safetensors", "'layer.9.weight'"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, name, file, message):
    folder, _ = sharded(tmp_path)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="sharded") as error:
        open_safetensors(folder)
    assert message in str(error.value)


def test_shards_without_an_index_and_folders_without_weights_are_refused(tmp_path):
    folder, _ = sharded(tmp_path)
    (folder / INDEX).write_text('{"weight_map": {}}')
    with pytest.raises(ConfigError, match="weight_map"):
        open_safetensors(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ConfigError, match="no model.safetensors.index.json that joins them"):
        open_safetensors(folder)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="no such file or folder"):
        open_safetensors(folder)
    folder.mkdir()
    with pytest.raises(ConfigError, match="holds no safetensors file, but nothing"):
        open_safetensors(folder)


def test_an_unknown_tensor_gets_the_nearest_name(tmp_path):
    folder, _ = sharded(tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'layer.0.weight'"):
        open_safetensors(folder).read("layers.0.weight")


def test_a_bool_that_is_no_bool_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(encoded({"flags": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"))
    with pytest.raises(ConfigError, match="flags: a BOOL holds the byte 2"):
        open_safetensors(path).read("flags")


def zipped(path: Path, folder: Path, compression: int, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("odd", b"123")  # puts the next member at an odd offset
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{prefix}{file.name}")
    return path


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "some/where/"])
def test_an_archive_is_read_as_its_folder_is_without_a_copy_in_memory(tmp_path, compression, prefix):
    arrays = {"w": np.random.RandomState(0).standard_normal((512, 1024)).astype(np.float32), "b": np.arange(3, dtype=np.int8)}
    write_safetensors(tmp_path / "model", planned(arrays), 2**20)
    path = zipped(tmp_path / "model.zip", tmp_path / "model", compression, prefix)
    tracemalloc.start()
    source = open_safetensors(path)
    read = {name: source.read(name) for name in source.tensors}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 < 2 * 2**20 == arrays["w"].nbytes
    assert {name: as_bits(array) for name, array in read.items()} == {name: as_bits(array) for name, array in arrays.items()}


def test_the_model_beside_the_config_is_taken_and_two_models_are_refused(tmp_path):
    folder, arrays = sharded(tmp_path)
    path = zipped(tmp_path / "two.zip", folder, zipfile.ZIP_STORED, "a/")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("2_Dense/config.json", "{}")
        archive.writestr("a/config.json", "{}")
    assert open_safetensors(path).tensors.keys() == arrays.keys()
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("2_Dense/model.safetensors", b"")
    with pytest.raises(ConfigError, match="several models, in '2_Dense/', 'a/'"):
        open_safetensors(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_archive_is_survived(tmp_path, compression):
    small_file(tmp_path)
    whole = zipped(tmp_path / "whole.zip", tmp_path / "small", compression).read_bytes()
    path = tmp_path / "bad.zip"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="bad.zip"):
            open_safetensors(path)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        read_everything(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    path = tmp_path / "twice.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(SINGLE, b"")
        archive.writestr(SINGLE, b"")
    with pytest.raises(ConfigError, match="two of this name"):
        open_safetensors(path)


def failing():
    raise RuntimeError("the second tensor fails")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    good = np.ones(4, np.float32)
    wrong_shape, wrong_dtype = (lambda: np.ones(5, np.float32)), (lambda: np.ones(4))
    for second, error in ((failing, RuntimeError), (wrong_shape, ConfigError), (wrong_dtype, ConfigError)):
        with pytest.raises(error):
            write_safetensors(tmp_path, [("a", (4,), "f4", lambda: good), ("b", (4,), "f4", second)], 16)
        assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_refused_before_anything_is_produced(tmp_path):
    def plan(name, dtype="f4"):
        return (name, (1,), dtype, failing)

    for tensors, message in (
        ([], "nothing to write"),
        ([plan("a"), plan("a")], "given twice"),
        ([plan("a", "c8")], "a: dtype"),
        ([plan("__metadata__")], "__metadata__"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_safetensors(tmp_path / "out", tensors)
    with pytest.raises(ConfigError, match="max_shard_bytes"):
        write_safetensors(tmp_path / "out", [plan("a")], 0)
    (tmp_path / "model-00001-of-00003.safetensors").touch()
    with pytest.raises(ConfigError, match="already holds 'model-00001-of-00003.safetensors'"):
        write_safetensors(tmp_path, [plan("a")])
    with pytest.raises(ConfigError, match="cannot be written"):
        write_safetensors(tmp_path / "model-00001-of-00003.safetensors", [plan("a")])


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    tensors = [(f"t{i}", (2**18,), "f4", lambda i=i: np.full(2**18, i, np.float32)) for i in range(8)]
    tracemalloc.start()
    write_safetensors(tmp_path, tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 2**20
    assert open_safetensors(tmp_path).read("t7")[-1] == 7
