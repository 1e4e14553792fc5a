"""Eight host devices, strict promotion, NaN checks, quick compilation: set first."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import hypothesis
import jax
import jaxlib
import pytest

flags = "--xla_force_host_platform_device_count=8"
if jaxlib.__version__.startswith("0.10."):
    # Its older emitters compile in half the time; later versions have only the newer.
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_nans", True)
# Most of the tests' time is XLA's, for programs that run once.
jax.config.update("jax_disable_most_optimizations", True)

hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    max_examples=15,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Keep every SHARE-th test, by a hash of its name: a sample for another version."""
    share = int(os.environ.get("SHARE", "1"))
    left_out = {i for i in items if zlib.crc32(i.nodeid.encode()) % share}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [i for i in items if i not in left_out]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The real data sets, where they are."""
    default = Path(__file__).parents[1].parent / "shared" / "data"
    path = Path(os.environ.get("JAXCOMPRESS_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no data at {path}; set JAXCOMPRESS_DATA")
    return path
