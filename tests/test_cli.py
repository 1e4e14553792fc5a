"""The command line: what it prints, where, and its exit codes."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.cli import main


class Ran(NamedTuple):
    code: Any
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; its exit code and what it printed."""

    def call(*argv: str) -> Ran:
        try:
            code = main(argv)
        except SystemExit as stop:
            code = stop.code
        return Ran(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 6)), jnp.float32)
    return {"layer": {"kernel": jc.quant.quantize(w, jc.quant.int8()), "bias": w[0]}}


@pytest.fixture
def model(params: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "model.jc"
    jc.io.save(path, params, recipe="W8A16", metadata={"licence": "Apache-2.0"})
    return str(path)


def test_inspect_prints_the_table_of_sizes_and_what_the_file_says(
    run: Run, model: str, params: dict[str, Any]
) -> None:
    ran = run("inspect", model)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(str(jc.report.size(params)))
    assert ran.out.endswith(
        "version: 1\nrecipe: W8A16\nmetadata: {'licence': 'Apache-2.0'}\n"
    )


def test_inspect_leaves_out_what_the_file_does_not_say(
    run: Run, tmp_path: Path
) -> None:
    jc.io.save(tmp_path / "m.jc", {"n": 1})
    ran = run("inspect", str(tmp_path / "m.jc"))
    assert ran.code == 0
    assert "version: 1" in ran.out
    assert "recipe" not in ran.out
    assert "metadata" not in ran.out


def test_inspect_prints_json(run: Run, model: str, params: dict[str, Any]) -> None:
    ran = run("inspect", model, "--json")
    assert (ran.code, ran.err) == (0, "")
    sizes = json.loads(json.dumps(jc.report.size(params).to_dict()))
    known = {"version": 1, "recipe": "W8A16", "metadata": {"licence": "Apache-2.0"}}
    assert json.loads(ran.out) == {**known, **sizes}


def test_inspect_of_a_file_with_a_typed_key(run: Run, tmp_path: Path) -> None:
    jc.io.save(tmp_path / "m.jc", {"key": jax.random.key(0)})
    assert run("inspect", str(tmp_path / "m.jc")).code == 0


def test_verify_counts_what_it_checked(run: Run, model: str) -> None:
    nbytes = 6 * 16 + 6 * 4 + 6 * 4
    ran = run("verify", model)
    assert ran == (0, f"{model}: 3 arrays, {nbytes} bytes, all intact\n", "")
    ran = run("verify", model, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == {"version": 1, "arrays": 3, "bytes": nbytes}


def test_verify_reads_a_directory(
    run: Run, params: dict[str, Any], tmp_path: Path
) -> None:
    jc.io.save(tmp_path / "model", params, max_shard_bytes=32)
    assert run("verify", str(tmp_path / "model")).code == 0


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "damaged": (damage, "does not match its checksum"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:99]), "cut off"),
    "foreign": (lambda path: path.write_text("hello"), "not a file written by"),
    "missing": (lambda path: path.unlink(), "there is no file"),
}


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["verify", "--json"]])
@pytest.mark.parametrize(("spoil", "message"), BAD.values(), ids=BAD)
def test_a_bad_file_is_told_on_stderr_alone(
    spoil: Any, message: str, command: list[str], run: Run, model: str
) -> None:
    spoil(Path(model))
    ran = run(*command, model)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("jaxcompress: ")
    assert ran.err.count("\n") == 1
    assert model in ran.err
    assert message in ran.err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["explode"],
        ["inspect"],
        ["verify"],
        ["verify", "a.jc", "b.jc"],
        ["verify", "a.jc", "--fast"],
        ["demo", "--out"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_with_2_and_says_how(argv: list[str], run: Run) -> None:
    ran = run(*argv)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("usage: jaxcompress")


def test_help_names_every_command(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    assert all(command in ran.out for command in ("demo", "inspect", "verify"))


def test_the_demo_without_its_packages_names_the_remedy(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="sklearn")

    monkeypatch.setattr(importlib, "import_module", import_module)
    ran = run("demo")
    assert (ran.code, ran.out) == (1, "")
    assert "the demo needs 'sklearn'" in ran.err
    assert "make demo" in ran.err


@pytest.mark.parametrize(
    ("argv", "out"), [([], "out/digits"), (["--out", "here"], "here")]
)
def test_the_demo_runs_the_digits_experiment(
    argv: list[str], out: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, list[str]]] = []

    def import_module(name: str) -> Any:
        return SimpleNamespace(main=lambda args: calls.append((name, args)))

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert run("demo", *argv).code == 0
    assert calls == [("experiments.digits.run", ["--out", out])]


def test_the_module_exits_with_the_code_of_the_command(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(Path(model))
    monkeypatch.setattr(sys, "argv", ["jaxcompress", "verify", model])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("jaxcompress", run_name="__main__")
    assert stop.value.code == 1
    assert model in capsys.readouterr().err


def test_python_m_prints_the_version(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "jaxcompress", "--version"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert ran.stdout.strip() == jc.__version__
