"""A damaged file is refused, never misread; an interrupted save costs no older file."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

import jaxcompress as jc

load = lambda path: jc.io.load(path, as_numpy=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.jc"


def quantized() -> dict[str, Any]:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    return {"w": jc.quant.quantize(w, jc.quant.int4(group_size=8)), "n": 0.5}


def sealed(manifest: dict[str, Any]) -> str:
    """A manifest behind its checksum, as the format describes it."""
    body = json.dumps(manifest, separators=(",", ":"))
    return f"{hashlib.sha256(body.encode()).hexdigest()} {body}"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a file and seal it again."""
    arrays = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as file:
        _, _, body = file.metadata()["jaxcompress"].partition(" ")
    manifest = json.loads(body)
    change(manifest)
    safetensors.numpy.save_file(arrays, path, {"jaxcompress": sealed(manifest)})


def rewrite_directory(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    _, _, body = (path / "manifest.json").read_text().partition(" ")
    manifest = json.loads(body)
    change(manifest)
    (path / "manifest.json").write_text(sealed(manifest))


# -- damage of a file


@pytest.mark.parametrize("bit", range(8))
def test_any_bit_flipped_in_any_byte_is_seen(bit: int, path: Path) -> None:
    jc.io.save(path, {"w": np.arange(3, dtype=np.int16), "n": 0.5, "none": None})
    data = path.read_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(jc.io.FileError, match=r"m\.jc"):
            load(path)


def test_any_byte_of_a_file_with_a_leaf_changed_is_seen(path: Path) -> None:
    jc.io.save(path, quantized(), recipe="W4", metadata={"by": "me"})
    data = path.read_bytes()
    for i in range(len(data)):
        damaged = bytearray(data)
        damaged[i] = (data[i] + 1 + i % 255) % 256
        path.write_bytes(damaged)
        with pytest.raises(jc.io.FileError, match=r"m\.jc"):
            load(path)


def test_a_file_cut_off_anywhere_is_refused(path: Path) -> None:
    jc.io.save(path, quantized())
    data = path.read_bytes()
    for n in range(len(data)):
        path.write_bytes(data[:n])
        with pytest.raises(jc.io.FileError, match=r"m\.jc"):
            load(path)


@pytest.mark.parametrize("extra", [b"\0", b" ", b"\0" * 8, None], ids=repr)
def test_bytes_behind_the_end_are_refused(extra: bytes | None, path: Path) -> None:
    jc.io.save(path, quantized())
    data = path.read_bytes()
    path.write_bytes(data + (data if extra is None else extra))
    with pytest.raises(jc.io.FileError, match="left over"):
        load(path)


@pytest.mark.parametrize("read", [jc.io.load, jc.io.verify, jc.io.read_manifest])
def test_every_reader_checks_the_arrays(read: Any, path: Path) -> None:
    jc.io.save(path, quantized())
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(jc.io.FileError, match=r"'w/\w+' does not match its checksum"):
        read(path)


# -- files of others


def safetensors_bytes(metadata: dict[str, str] | None) -> bytes:
    return safetensors.numpy.save({"w": np.ones(2, np.float32)}, metadata)


def with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


entry = lambda **changes: json.dumps(
    {"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], **changes}}
).encode()

FOREIGN = {
    "empty": b"",
    "text": b"Lorem ipsum dolor sit amet. " * 100,
    "short text": b"hello",
    "json": b'{"format": "jaxcompress"}',
    "pickle": b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01w\x94N.",
    "zeros": bytes(1000),
    "safetensors": safetensors_bytes(None),
    "safetensors with metadata": safetensors_bytes({"format": "pt"}),
    "own metadata, no manifest": safetensors_bytes({"jaxcompress": "1"}),
    "manifest of another format": safetensors_bytes(
        {"jaxcompress": sealed({"format": "other"})}
    ),
    "header without end": with_header(b"{"),
    "header of a list": with_header(b"[]"),
    "header of numbers": with_header(b'{"w": 1}'),
    "metadata of a number": with_header(b'{"__metadata__": 5}'),
    "metadata of numbers": with_header(b'{"__metadata__": {"jaxcompress": 5}}'),
    "dtype unknown": with_header(entry(dtype="F7")),
    "dtype a list": with_header(entry(dtype=["F32"])),
    "shape huge": with_header(entry(shape=[10**30])),
    "shape negative": with_header(entry(shape=[-1])),
    "offsets outside": with_header(entry(data_offsets=[0, 10**30])),
    "offsets backwards": with_header(entry(data_offsets=[8, 0])),
    "offsets missing": with_header(b'{"w": {"dtype": "F32", "shape": [0]}}'),
    "length huge": b"\xff" * 8 + b"{}",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_file_is_refused_by_name(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(jc.io.FileError, match=r"m\.jc"):
        load(path)


def test_a_header_nested_too_deep_is_refused(path: Path) -> None:
    path.write_bytes(with_header(b'{"w":' + b"[" * 100_000))
    with pytest.raises(jc.io.FileError, match=r"m\.jc"):
        load(path)


def test_a_safetensors_file_of_others_is_told_from_a_damaged_one(path: Path) -> None:
    path.write_bytes(safetensors_bytes({"format": "pt"}))
    with pytest.raises(jc.io.FileError, match="without a jaxcompress manifest"):
        load(path)


def test_metadata_beside_the_manifest_is_refused(path: Path) -> None:
    jc.io.save(path, quantized())
    with safetensors.safe_open(path, "np") as file:
        metadata = file.metadata()
    arrays = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(arrays, path, {**metadata, "a": "b"})
    with pytest.raises(jc.io.FileError, match=r"m\.jc: its header"):
        load(path)


@pytest.mark.parametrize("read", [jc.io.load, jc.io.verify, jc.io.read_manifest])
def test_a_missing_file_is_named(read: Any, path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"m\.jc"):
        read(path)


# -- files of other versions


def test_a_newer_format_asks_for_an_update(path: Path) -> None:
    jc.io.save(path, quantized())
    rewrite(path, lambda manifest: manifest.update(version=2))
    with pytest.raises(jc.io.FileError, match=r"version 2.*Update jaxcompress"):
        load(path)


def set_tree(tree: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest.update(tree=tree)


def set_leaf(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tree"]["dict"][0][1].update(changes)


def set_settings(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tree"]["dict"][0][1]["static"].update(changes)


def set_array(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["arrays"]["w/words"].update(changes)


CHANGED = {
    "leaf of no known type": (set_leaf(leaf="Fancy"), "leaf of the type 'Fancy'"),
    "settings of no known type": (
        set_settings(element={"settings": "Octal", "fields": {}}),
        "settings of the type 'Octal'",
    ),
    "leaf without a setting": (set_leaf(static={}), "malformed"),
    "leaf with one more setting": (set_settings(colour=1), "malformed"),
    "node of no known kind": (set_tree({"pickle": "gASVBAAA"}), "no known kind"),
    "node that is a number": (set_tree(3), "no known kind"),
    "array that is not stored": (set_tree({"array": "gone"}), "refers to 'gone'"),
    "array too few": (
        lambda manifest: manifest["arrays"].update(gone={"dtype": "int8", "shape": []}),
        "'gone' is in the manifest but not stored",
    ),
    "array too many": (
        lambda manifest: manifest["arrays"].pop("w/words"),
        "'w/words' is stored but not in the manifest",
    ),
    "shape of another size": (set_array(shape=[6, 9]), r"shape \(6, 9\)"),
    "checksum of another array": (set_array(sha256="0" * 64), "checksum"),
}


@pytest.mark.parametrize(("change", "message"), CHANGED.values(), ids=CHANGED)
def test_a_sealed_manifest_that_does_not_fit_is_refused(
    change: Any, message: str, path: Path
) -> None:
    jc.io.save(path, quantized())
    rewrite(path, lambda manifest: None)
    load(path)
    rewrite(path, change)
    with pytest.raises(jc.io.FileError, match=message):
        load(path)


MALFORMED = {
    "unknown dtype": set_array(dtype="float7"),
    "shape of text": set_array(shape="wide"),
    "version of text": lambda manifest: manifest.update(version="one"),
    "no version": lambda manifest: manifest.pop("version"),
    "no arrays": lambda manifest: manifest.pop("arrays"),
    "no dtype": lambda manifest: manifest["arrays"]["w/words"].pop("dtype"),
    "items that are no pairs": set_tree({"dict": [["a"]]}),
    "key of no known kind": set_tree({"key": "w/words", "impl": "dice"}),
    "float of text": set_tree({"value": {"float": "many"}}),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED)
def test_a_sealed_manifest_that_is_malformed_is_refused(
    change: Any, path: Path
) -> None:
    jc.io.save(path, quantized())
    rewrite(path, change)
    with pytest.raises(jc.io.FileError, match=r"m\.jc"):
        load(path)


# -- directories


def save_directory(path: Path) -> list[Path]:
    jc.io.save(path, quantized(), max_shard_bytes=16)
    return sorted(path.glob("*.safetensors"))


def test_any_byte_of_a_directory_changed_is_seen(path: Path) -> None:
    shards = save_directory(path)
    assert len(shards) == 2
    for file in (path / "manifest.json", *shards):
        data = file.read_bytes()
        for i in range(len(data)):
            damaged = bytearray(data)
            damaged[i] ^= 1 << i % 8
            file.write_bytes(damaged)
            with pytest.raises(jc.io.FileError, match=r"m\.jc"):
                load(path)
        file.write_bytes(data)
    assert load(path)["n"] == 0.5


def test_a_shard_cut_off_is_refused_by_name(path: Path) -> None:
    shard = save_directory(path)[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(jc.io.FileError, match=shard.name):
        load(path)


def test_a_directory_with_a_file_missing_is_damaged(path: Path) -> None:
    for file in (*save_directory(path), path / "manifest.json"):
        data = file.read_bytes()
        file.unlink()
        with pytest.raises(jc.io.FileError, match=f"{file.name}: it is missing"):
            load(path)
        file.write_bytes(data)


def test_arrays_are_found_in_whatever_shard_they_lie(path: Path) -> None:
    first, second = save_directory(path)
    expected = load(path)["w"]
    first.rename(path / "spare")
    second.rename(first)
    (path / "spare").rename(second)
    found = load(path)["w"]
    np.testing.assert_array_equal(found.words, expected.words)
    np.testing.assert_array_equal(found.scale, expected.scale)


def test_a_shard_in_the_place_of_another_is_refused(path: Path) -> None:
    first, second = save_directory(path)
    shutil.copy(first, second)
    with pytest.raises(jc.io.FileError, match=r"'w/.*' is in the manifest but not"):
        load(path)


def test_a_shard_of_another_model_is_refused(path: Path, tmp_path: Path) -> None:
    save_directory(path)
    other = {"w": quantized()["w"].replace(scale=jnp.ones((6, 2)))}
    jc.io.save(tmp_path / "other", other, max_shard_bytes=16)
    names = lambda folder: json.loads(
        (folder / "manifest.json").read_text().partition(" ")[2]
    )["shards"]
    for array, name in names(path).items():
        shutil.copy(tmp_path / "other" / names(tmp_path / "other")[array], path / name)
    with pytest.raises(jc.io.FileError, match="'w/scale' does not match its checksum"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "folder/0.safetensors",
        ".",
        "/etc/hostname",
        "..",
        "",
        5,
    ],
)
def test_a_shard_outside_the_directory_is_refused(name: Any, path: Path) -> None:
    shards = save_directory(path)
    shutil.copy(shards[0], path.parent / "outside.safetensors")
    shutil.copytree(path, path / "folder")
    rewrite_directory(path, lambda m: m["shards"].update({"w/words": name}))
    with pytest.raises(jc.io.FileError, match="outside"):
        load(path)


def test_a_directory_of_a_newer_format_asks_for_an_update(path: Path) -> None:
    save_directory(path)
    rewrite_directory(path, lambda manifest: manifest.update(version=7))
    with pytest.raises(jc.io.FileError, match=r"version 7.*Update jaxcompress"):
        load(path)


# -- saving is all or nothing

LIMITS = {"file": 2**20, "directory": 256}
limits = pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)


def save_value(path: Path, value: int, limit: int) -> None:
    tree = {name: np.full(64, value, np.int32) for name in "ab"}
    jc.io.save(path, tree, overwrite=True, max_shard_bytes=limit)


def saved_value(path: Path) -> int:
    (value,) = {int(x) for a in load(path).values() for x in a}
    return value


@limits
def test_an_existing_file_is_only_replaced_when_asked(limit: int, path: Path) -> None:
    save_value(path, 1, limit)
    with pytest.raises(FileExistsError, match=r"m\.jc exists; pass overwrite=True"):
        jc.io.save(path, {"a": 2})
    assert saved_value(path) == 1
    save_value(path, 2, limit)
    assert saved_value(path) == 2
    assert [p.name for p in path.parent.iterdir()] == ["m.jc"]


def test_a_directory_stays_one(path: Path) -> None:
    save_value(path, 1, LIMITS["directory"])
    save_value(path, 2, LIMITS["file"])
    assert saved_value(path) == 2
    assert len(list(path.iterdir())) == 2
    save_value(path, 3, LIMITS["directory"])
    assert saved_value(path) == 3
    assert len(list(path.iterdir())) == 3


def test_a_file_is_not_replaced_by_a_directory(path: Path) -> None:
    save_value(path, 1, LIMITS["file"])
    with pytest.raises(FileExistsError, match=r"m\.jc is a file.*max_shard_bytes"):
        save_value(path, 2, LIMITS["directory"])
    assert saved_value(path) == 1


def test_missing_folders_are_made(tmp_path: Path) -> None:
    jc.io.save(tmp_path / "a" / "b" / "m.jc", {"n": 1})
    assert load(tmp_path / "a" / "b" / "m.jc") == {"n": 1}


def test_a_folder_that_is_no_model_is_never_replaced(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises((FileExistsError, jc.io.FileError), match=r"m\.jc"):
        save_value(path, 1, LIMITS["file"])
    assert (path / "thesis.tex").exists()


def fail_at(call: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the first, second, ... call of `os.<name>` find the disk full."""
    calls = itertools.count(1)
    real = getattr(os, name)

    def patched(*args: Any) -> Any:
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, name, patched)


# What is left when the first, second, ... of these calls fails: 1 is the older file.
SURVIVORS = {
    ("file", "fsync"): (1, 2),
    ("file", "replace"): (1,),
    ("directory", "fsync"): (1, 1, 1, 1, 2),
    ("directory", "replace"): (1, 1, 1),
}


@pytest.mark.parametrize(
    ("kind", "name", "call", "survivor"),
    [
        pytest.param(kind, name, call, survivor, id=f"{kind}, {name} {call}")
        for (kind, name), survivors in SURVIVORS.items()
        for call, survivor in enumerate(survivors, 1)
    ],
)
def test_a_full_disk_leaves_a_whole_file_and_nothing_else(
    kind: str,
    name: str,
    call: int,
    survivor: int,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_value(path, 1, LIMITS[kind])
    with monkeypatch.context() as patch:
        fail_at(call, name, patch)
        with pytest.raises(OSError, match="No space left"):
            save_value(path, 2, LIMITS[kind])
    assert saved_value(path) == survivor
    assert [p.name for p in path.parent.iterdir()] == ["m.jc"]
    if path.is_dir():
        assert len(list(path.iterdir())) == 3


@limits
def test_a_full_disk_without_an_older_file_leaves_nothing(
    limit: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(1, "fsync", monkeypatch)
    with pytest.raises(OSError, match="No space left"):
        save_value(path, 2, limit)
    assert list(path.parent.iterdir()) == []


# Children are forked from a process that has imported the library but not run JAX.
CRASHES = """
import json, os, random, resource, signal, sys, time, traceback, warnings
from pathlib import Path
from tests.io.test_damage import LIMITS, save_value, saved_value

warnings.simplefilter("ignore", RuntimeWarning)


def child(act):
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    except OSError as error:
        os._exit(error.errno)
    except BaseException:
        traceback.print_exc()
        os._exit(255)


def state(path):
    try:
        return saved_value(path)
    except Exception as error:
        return repr(error)


def dying_after(call, name, act):
    real, calls = getattr(os, name), []

    def patched(*args):
        real(*args)
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        setattr(os, name, patched)
        act()

    return run


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_each_call(path, name, limit):
    found, code = [], -signal.SIGKILL
    while code == -signal.SIGKILL:
        save_value(path, 1, limit)
        save = lambda: save_value(path, 2, limit)
        code = exit_code(child(dying_after(len(found) + 1, name, save)))
        found.append([code, state(path)])
    return found


def at_random_moments(path, limit):
    draw, found = random.Random(0), []
    save_value(path, 0, limit)

    def forever():
        value = 0
        while True:
            value += 1
            save_value(path, value, limit)

    for _ in range(30):
        pid = child(forever)
        time.sleep(draw.uniform(0.0, 0.04))
        os.kill(pid, signal.SIGKILL)
        exit_code(pid)
        found.append(state(path))
    return found


def with_a_limit(path, limit):
    save_value(path, 1, limit)

    def act():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        save_value(path, 2, limit)

    code = exit_code(child(act))
    return [code, state(path), [p.name for p in path.parent.iterdir()]]


root = Path(sys.argv[1])
result = {}
for kind, limit in LIMITS.items():
    (root / f"limited {kind}").mkdir()
    result[f"limited {kind}"] = with_a_limit(root / f"limited {kind}" / "m.jc", limit)
    for name in ("fsync", "replace"):
        result[f"{name} {kind}"] = at_each_call(root / f"{name}-{kind}", name, limit)
result["random"] = at_random_moments(root / "random", LIMITS["file"])
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is found after saves that were killed, by where they were killed."""
    ran = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path_factory.mktemp("crashes"))],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(ran.stdout)


KILLED, COMPLETE = -9, 0


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("fsync file", [1, 2, 2]),
        ("replace file", [2, 2]),
        ("fsync directory", [1, 1, 1, 1, 2, 2]),
        ("replace directory", [1, 1, 2, 2]),
    ],
)
def test_a_save_killed_anywhere_leaves_the_old_file_or_the_new(
    where: str, expected: list[int], crashes: dict[str, Any]
) -> None:
    codes, values = zip(*crashes[where], strict=True)
    assert codes == (*[KILLED] * (len(expected) - 1), COMPLETE)
    assert list(values) == expected


def test_a_save_killed_at_a_random_moment_leaves_a_whole_file(
    crashes: dict[str, Any],
) -> None:
    values = crashes["random"]
    assert all(isinstance(value, int) for value in values), values
    assert len(set(values)) > 1


@pytest.mark.parametrize("kind", LIMITS)
def test_a_file_that_may_not_grow_leaves_the_older_one(
    kind: str, crashes: dict[str, Any]
) -> None:
    assert crashes[f"limited {kind}"] == [errno.EFBIG, 1, ["m.jc"]]
