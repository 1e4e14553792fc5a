"""Teacher outputs on disk: written once, read in any order, damage named."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distill import offline
from jaxcompress.distill.offline import TopK

RNG = np.random.default_rng(0)
EXAMPLES, SHARD, CLASSES = 23, 5, 40
LOGITS = RNG.normal(size=(EXAMPLES, 3, CLASSES)).astype(np.float32)
HIDDEN = jnp.asarray(RNG.normal(size=(EXAMPLES, 4)), jnp.bfloat16)
KEPT = TopK(
    indices=RNG.integers(0, CLASSES, (EXAMPLES, 3, 2)).astype(np.uint16),
    values=-RNG.random((EXAMPLES, 3, 2)).astype(np.float16),
    residual=-RNG.random((EXAMPLES, 3, 2)).astype(np.float32),
    temperatures=(1.0, 3.0),
    classes=CLASSES,
)
SETTINGS: dict[str, Any] = {"examples": EXAMPLES, "batch_size": 4}
SETTINGS |= {"shard_examples": SHARD}


def some(i: Any) -> TopK:
    fields = ("indices", "values", "residual")
    return dataclasses.replace(KEPT, **{f: getattr(KEPT, f)[i] for f in fields})


def teacher(i: np.ndarray) -> dict[str, Any]:
    return {"top": some(i), "logits": LOGITS[i], "hidden": np.asarray(HIDDEN)[i]}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    offline.write(folder, teacher, **SETTINGS, fingerprint="a", metadata={"by": "me"})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    offline.write(tmp_path / "outputs", teacher, **SETTINGS)
    return tmp_path / "outputs"


@pytest.mark.parametrize(
    "indices",
    [
        np.array([22, 0, 7, 7, 13, 20]),
        RNG.permutation(EXAMPLES),
        np.array([[1, 21], [-1, 3]]),
        slice(3, 12, 2),
        np.array([], np.int32),
        [],
        6,
    ],
    ids=["some", "all", "matrix", "slice", "none", "empty list", "one"],
)
def test_outputs_are_read_in_any_order(written: Path, indices: Any) -> None:
    found = offline.open(written)[indices]
    if isinstance(indices, list):
        indices = np.array(indices, np.int64)
    np.testing.assert_array_equal(found["logits"], LOGITS[indices])
    np.testing.assert_array_equal(found["hidden"], np.asarray(HIDDEN)[indices])
    assert (found["logits"].dtype, found["hidden"].dtype) == (np.float32, jnp.bfloat16)
    assert found["logits"].flags.writeable  # A copy: nothing can reach the files.
    expected = some(indices)
    for field in dataclasses.fields(TopK):
        ours, theirs = (getattr(t, field.name) for t in (found["top"], expected))
        np.testing.assert_array_equal(ours, theirs)
        assert getattr(ours, "dtype", None) == getattr(theirs, "dtype", None)


def test_what_is_read_goes_to_a_jitted_loss(written: Path) -> None:
    stored, loss_of = offline.open(written), jc.distill.top_k_loss
    loss_of = jax.jit(loss_of, static_argnames="temperature")
    for i in ([2, 19], [7, 7]):
        loss = loss_of(LOGITS[i], stored[i]["top"], temperature=3.0)
        assert loss.shape == (2, 3)
    assert loss_of._cache_size() == 1


def test_the_folder_says_what_it_holds(written: Path) -> None:
    stored = offline.open(written, fingerprint="a")
    assert (len(stored), stored.shards, stored.fingerprint) == (23, 5, "a")
    assert stored.metadata == {"by": "me"}
    assert stored.outputs["top"]["top_k"] == {"temperatures": [1, 3], "classes": 40}
    assert stored.outputs["logits"]["arrays"][""]["shape"] == [3, 40]
    assert stored.stored_bytes == sum(f.stat().st_size for f in written.iterdir())
    with pytest.raises(ValueError, match=r"fingerprint 'a'; got 'b'.*another teacher"):
        offline.open(written, fingerprint="b")


def test_the_last_batch_of_a_shard_is_full() -> None:
    seen = []

    def counting(i: np.ndarray) -> dict[str, Any]:
        seen.append(i.tolist())
        return {"x": i}

    writer_settings = SETTINGS | {"examples": 7}
    with_folder(lambda path: offline.write(path, counting, **writer_settings))
    assert seen == [[0, 1, 2, 3], [4, 4, 4, 4], [5, 6, 6, 6]]


def with_folder(f: Callable[[Path], Any]) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as path:
        return f(Path(path))


def test_floats_are_stored_as_asked(tmp_path: Path) -> None:
    offline.write(tmp_path, teacher, **SETTINGS, dtype=jnp.float16)
    found = offline.open(tmp_path)[:]
    np.testing.assert_array_equal(found["logits"], LOGITS.astype(np.float16))
    assert found["top"].residual.dtype == np.float32
    assert found["top"].indices.dtype == np.uint16


def test_top_64_of_32k_take_less_than_a_hundredth(tmp_path: Path) -> None:
    """At most 1.5% of the full logits, in whichever dtype these are stored."""
    tokens, classes, k = 512, 32_768, 64
    top = TopK(
        indices=np.zeros((tokens, k), np.uint16),
        values=np.zeros((tokens, k), np.float16),
        residual=np.zeros((tokens, 2), np.float32),
        temperatures=(1.0, 2.0),
        classes=classes,
    )
    offline.write(tmp_path, lambda i: {"t": top}, examples=tokens, batch_size=tokens)
    size = offline.open(tmp_path).stored_bytes
    assert size <= 0.015 * tokens * classes * 2
    assert size / tokens == pytest.approx(64 * 4 + 2 * 4, abs=6)


def test_a_second_call_writes_nothing_and_a_new_one_what_is_missing(
    folder: Path,
) -> None:
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    asked = []
    again = lambda i: asked.append(i) or teacher(i)
    offline.write(folder, again, **SETTINGS)
    assert asked == []
    (folder / "shard_000002.jc").unlink()
    offline.write(folder, again, **SETTINGS)
    assert np.unique(asked).tolist() == [10, 11, 12, 13, 14]
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before


def test_each_process_writes_its_part(tmp_path: Path, folder: Path) -> None:
    path, asked = tmp_path / "parts", {}
    for process in range(3):
        taught = lambda i, p=process: asked.setdefault(p, []).extend(i) or teacher(i)
        offline.write(path, taught, **SETTINGS, process_index=process, process_count=3)
    parts = [set(map(int, part)) for part in asked.values()]
    assert sorted(i for part in parts for i in part) == list(range(EXAMPLES))
    for file in folder.iterdir():
        assert (path / file.name).read_bytes() == file.read_bytes()


def test_a_process_keeps_to_its_part_and_to_what_is_missing(tmp_path: Path) -> None:
    settings = {"examples": EXAMPLES, "shard_examples": SHARD}
    settings |= {"process_index": 1, "process_count": 2}
    writer = offline.Writer(tmp_path, **settings)
    assert writer.missing == [1, 3]
    writer.write(1, teacher(writer.indices(1)))
    for shard in (0, 1, 5):
        with pytest.raises(ValueError, match=rf"shard {shard}: a process writes only"):
            writer.write(shard, teacher(np.arange(5)))


def test_parts_that_a_kill_left_are_removed_but_not_those_of_others(
    tmp_path: Path,
) -> None:
    settings = {"examples": EXAMPLES, "shard_examples": SHARD}
    left = [".dataset.jc.abc", ".shard_000001.jc.abc", ".shard_000002.jc.abc"]
    for name in left:
        (tmp_path / name).mkdir()
    offline.Writer(tmp_path, **settings, process_index=1, process_count=2)
    assert {p.name for p in tmp_path.iterdir()} == {left[0], left[2]}
    offline.Writer(tmp_path, **settings)
    assert not list(tmp_path.iterdir())


def test_missing_shards_are_named(folder: Path) -> None:
    stored = offline.open(folder)
    for shard in (1, 3):
        (folder / f"shard_00000{shard}.jc").unlink()
    message = r"shard_000001\.jc: it is missing, and 2 of 5 .* Run the writing again"
    with pytest.raises(jc.io.FileError, match=message):
        offline.open(folder)
    with pytest.raises(jc.io.FileError, match=r"shard_000003\.jc: it is missing"):
        stored[np.array([0, 17])]
    with pytest.raises(jc.io.FileError, match=r"000001\.jc.*\n.*000003\.jc"):
        stored.verify()
    np.testing.assert_array_equal(stored[np.array([0])]["logits"], LOGITS[:1])


def damaged(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = folder / "shard_000002.jc"
    file.write_bytes(change(file.read_bytes()))


def flipped(at: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        i = min(int(at * len(data)), len(data) - 1)
        return data[:i] + bytes([data[i] ^ 4]) + data[i + 1 :]

    return change


@pytest.mark.parametrize(
    "change",
    [
        *[flipped(at) for at in (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)],
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data + b"\0",
        lambda data: b"",
    ],
)
def test_a_damaged_shard_is_named_with_the_remedy(
    folder: Path, change: Callable[[bytes], bytes]
) -> None:
    damaged(folder, change)
    stored = offline.open(folder)
    message = r"shard_000002\.jc.*[Rr]emove the file and run the writing again"
    with pytest.raises(jc.io.FileError, match=message):
        stored[np.array([11])]
    with pytest.raises(jc.io.FileError, match=message):
        stored.verify()
    np.testing.assert_array_equal(stored[np.array([0])]["logits"], LOGITS[:1])
    (folder / "shard_000002.jc").unlink()
    offline.write(folder, teacher, **SETTINGS)
    offline.open(folder).verify()


def test_no_flipped_byte_gives_other_outputs(tmp_path: Path) -> None:
    path = tmp_path / "small"
    offline.write(path, lambda i: {"x": i}, examples=2, batch_size=2)
    file = path / "shard_000000.jc"
    data, unnoticed = file.read_bytes(), b""
    for i in range(len(data)):
        file.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        try:
            np.testing.assert_array_equal(offline.open(path)[:]["x"], [0, 1])
            unnoticed += data[i : i + 1]
        except jc.io.FileError:
            pass
    assert len(unnoticed) < 40  # A copy, in the header, of what the manifest says.


def test_a_shard_of_another_dataset_or_place_is_refused(
    tmp_path: Path, folder: Path
) -> None:
    offline.write(tmp_path / "other", teacher, **SETTINGS, fingerprint="b")
    theirs = (tmp_path / "other" / "shard_000002.jc").read_bytes()
    for data in (theirs, (folder / "shard_000001.jc").read_bytes()):
        damaged(folder, lambda _, data=data: data)
        with pytest.raises(jc.io.FileError, match=r"000002\.jc: it belongs to another"):
            offline.open(folder)[np.array([11])]


def test_checksums_may_be_left_to_verify(folder: Path) -> None:
    damaged(folder, flipped(1.0))
    stored = offline.open(folder, check=False)
    assert stored[np.array([11])]["logits"].shape == (1, 3, 40)
    with pytest.raises(jc.io.FileError, match="does not match its checksum"):
        stored.verify()


def test_a_damaged_dataset_file_is_named(folder: Path) -> None:
    file = folder / "dataset.jc"
    file.write_bytes(flipped(0.5)(file.read_bytes()))
    with pytest.raises(jc.io.FileError, match=r"dataset\.jc"):
        offline.open(folder)
    file.unlink()
    with pytest.raises(jc.io.FileError, match=r"missing, so the folder holds no"):
        offline.open(folder)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"examples": 24}, "examples = 23; got 24"),
        ({"shard_examples": 6}, "shard_examples = 5; got 6"),
        ({"fingerprint": "b"}, "fingerprint = ; got b"),
        ({"metadata": {"a": "b"}}, "metadata = {}; got {'a': 'b'}"),
    ],
)
def test_other_settings_are_refused_before_the_teacher_runs(
    folder: Path, change: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"was begun with {re.escape(name)}"):
        offline.write(folder, pytest.fail, **(SETTINGS | change))


def test_outputs_of_another_form_are_refused(folder: Path) -> None:
    (folder / "shard_000004.jc").unlink()
    narrow = lambda i: teacher(i) | {"logits": LOGITS[i, :, :39]}
    with pytest.raises(ValueError, match="was begun with outputs"):
        offline.write(folder, narrow, **SETTINGS)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda i: {"x": np.where(i == 7, np.nan, 1.0)}, "'x': .*NaN.*at example 7"),
        (
            lambda i: {"x": dataclasses.replace(some(i), values=np.full(4, np.nan))},
            "must not be NaN; got 5 of 5",
        ),
        (lambda i: {"x": np.ones(3)}, r"first axis must be 4 examples; got shape \(3,"),
        (lambda i: {"x": np.float32(1)}, r"got shape \(\)"),
        (lambda i: {}, r"one array or more.*got \[\]"),
        (lambda i: {"x": some(i), "x.values": i}, "a name of its own.*Rename"),
    ],
    ids=["nan", "nan in top-k", "too few", "scalar", "none", "one name twice"],
)
def test_outputs_that_mean_nothing_are_refused(
    tmp_path: Path, outputs: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        offline.write(tmp_path, outputs, **SETTINGS)


def test_an_overflow_is_refused_and_an_infinity_kept(tmp_path: Path) -> None:
    overflow = lambda i: {"x": np.full((len(i), 2), 1e5)}
    with pytest.raises(ValueError, match=r"10 of 10 overflow float16"):
        offline.write(tmp_path, overflow, **SETTINGS, dtype=np.float16)
    excluded = lambda i: {"x": np.full((len(i), 2), -np.inf)}
    offline.write(tmp_path, excluded, **SETTINGS, dtype=np.float16)
    assert np.isneginf(offline.open(tmp_path)[:]["x"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": 0}, "examples must be at least 1; got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"shard_examples": -1}, "shard_examples must be at least 1"),
        ({"process_index": 2, "process_count": 2}, r"in \[0, 2\); got 2"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        offline.write(tmp_path, pytest.fail, **(SETTINGS | change))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.array([23]), "below the 23 examples .* got 23"),
        (np.array([-24]), "got -24"),
        (np.array([True]), r"integers; got bool.*flatnonzero"),
        (1.0, "got float64"),
    ],
)
def test_bad_indices_are_refused(written: Path, indices: Any, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        offline.open(written)[indices]


def test_fingerprints_tell_params_apart() -> None:
    params = {"w": np.ones((2, 2)), "b": np.zeros(2)}
    print_of = offline.fingerprint
    assert print_of(params) == print_of({k: v.copy() for k, v in params.items()})
    assert print_of(params) != print_of(params | {"b": np.array([0.0, 1e-30])})
