"""Teachers whose logits define no distribution are named, where that can be known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxcompress as jc

SOUND = np.array([[0.0, -np.inf, 2.0], [1.0, 2.0, 3.0]], np.float32)


@pytest.mark.parametrize(
    "row",
    [[np.nan, 0.0, 1.0], [np.inf, 0.0, 1.0], [-np.inf] * 3],
    ids=["nan", "infinite", "no class"],
)
def test_logits_that_define_nothing_are_refused(row: list[float]) -> None:
    logits = np.array([SOUND[0], row], np.float32)
    message = r"distill\.check_teacher: .*got 1 of 2 examples .*first at \(1,\)"
    with pytest.raises(ValueError, match=message):
        jc.distill.check_teacher(logits)
    where = np.array([True, False])
    assert jc.distill.check_teacher(logits, where=where) is logits


def test_sound_logits_come_back_as_they_are() -> None:
    assert jc.distill.check_teacher(SOUND) is SOUND


def test_a_compiled_step_reports_through_checkify_alone() -> None:
    def step(z: Any) -> jax.Array:
        return jnp.argmax(jc.distill.check_teacher(z), axis=-1)

    bad = SOUND.copy()
    bad[0, 2] = np.nan
    assert jax.jit(step)(bad).shape == (2,)
    checked = checkify.checkify(jax.jit(step))
    error, _ = checked(bad)
    with pytest.raises(checkify.JaxRuntimeError, match="got 1 of 2 examples"):
        error.throw()
    assert checked(SOUND)[0].get() is None
