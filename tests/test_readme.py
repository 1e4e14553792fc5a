"""The code of the README runs as written, from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest

README = Path(__file__).parents[1] / "README.md"


def test_the_code_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(block, scope)
    assert len(blocks) == 7
    assert scope["grads"]["projector"]["linear"]["kernel"].shape == (512, 1024)
    assert scope["logits"].shape == (8, 10)
    assert (tmp_path / "model.jc").exists()
    assert (tmp_path / "factored.jc").stat().st_size > 0
    assert "bitmask int4 g64" in str(scope["jc"].report.size(scope["packed"]))
