"""Writers that are killed, resumed, and compared with one that was left alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxcompress.distill import offline

EXAMPLES = 37
SETTINGS: dict[str, Any] = {"examples": EXAMPLES, "shard_examples": 4, "batch_size": 3}


def teacher(i: np.ndarray) -> dict[str, Any]:
    return {"x": np.stack([np.sin(i + j) for j in range(50)], axis=-1)}


# Writers are forked from a process that has imported the library but not run JAX.
KILLS = """
import json, os, random, signal, sys, time, warnings
from pathlib import Path
from jaxcompress.distill import offline
from tests.distill.test_offline_kill import SETTINGS, teacher

warnings.simplefilter("ignore", RuntimeWarning)


def child(act):
    pid = os.fork()
    if pid:
        return pid
    try:
        act()
        os._exit(0)
    except BaseException:
        os._exit(1)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(call, name, act):
    real, calls = getattr(os, name), []

    def patched(*args):
        calls.append(args)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    def run():
        setattr(os, name, patched)
        act()

    return run


def shards(folder):
    return sorted(p.name for p in folder.glob("shard_*"))


def slow(i):
    time.sleep(0.02)
    return teacher(i)


def part(folder, index, count, taught=teacher):
    return lambda: offline.write(
        folder, taught, **SETTINGS, process_index=index, process_count=count
    )


def at_each_call(folder, name):
    found = []
    while True:
        code = exit_code(child(dying_at(3, name, part(folder, 0, 1))))
        found.append([code, len(shards(folder))])
        if code != -signal.SIGKILL:
            return found


def at_random_moments(folder):
    # Some time after a new shard, so that every round makes progress.
    draw, found = random.Random(0), []
    while not found or found[-1][0] != [0, 0]:
        before = len(shards(folder))
        alive = [child(part(folder, i, 2, slow)) for i in range(2)]
        while len(shards(folder)) == before < 10:
            time.sleep(0.001)
        if before < 10:
            time.sleep(draw.uniform(0.0, 0.02))
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        found.append([[exit_code(pid) for pid in alive], len(shards(folder))])
    return found


root = Path(sys.argv[1])
result = {name: at_each_call(root / name, name) for name in ("fsync", "replace")}
result["random"] = at_random_moments(root / "random")
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def kills(root: Path) -> dict[str, Any]:
    """Exit codes and shards on disk after each run, by how the writer was killed."""
    ran = subprocess.run(
        [sys.executable, "-c", KILLS, str(root)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    return json.loads(ran.stdout)


@pytest.mark.parametrize("how", ["fsync", "replace", "random"])
def test_killed_writing_resumes_with_nothing_lost_or_doubled(
    how: str, root: Path, kills: dict[str, Any], tmp_path: Path
) -> None:
    runs = kills[how]
    progress = [shards for _, shards in runs]
    assert len(runs) > 2
    assert progress == sorted(progress)
    offline.write(tmp_path, teacher, **SETTINGS)
    # Of several processes none can tell whether another is writing the settings.
    left = {p.name for p in (root / how).iterdir() if ".dataset" not in p.name}
    assert left == {p.name for p in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        assert (root / how / file.name).read_bytes() == file.read_bytes()
    stored = offline.open(root / how)
    stored.verify()
    expected = teacher(np.arange(EXAMPLES))["x"]
    np.testing.assert_array_equal(stored[:]["x"], expected)


@pytest.mark.parametrize("how", ["fsync", "replace"])
def test_writers_were_killed_in_the_midst_of_a_file(
    how: str, kills: dict[str, Any]
) -> None:
    codes = [code for code, _ in kills[how]]
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-9}
