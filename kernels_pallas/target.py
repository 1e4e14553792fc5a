"""The device that a kernel is chosen for."""

from __future__ import annotations

from typing import NamedTuple

import jax


class Target(NamedTuple):
    """What the choice of a kernel depends on.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      kind: The device's own name: ``"TPU v5e"``, ``"NVIDIA H200"``.
    """

    platform: str
    kind: str

    @property
    def reads(self) -> str:
        """Name of the layout that kernels for this device read.

        Those for GPUs are written in Hopper's instructions, and need jax 0.11.
        """
        hopper = any(name in self.kind for name in ("H100", "H200", "H800", "GH200"))
        if self.platform == "gpu" and hopper and jax.__version_info__ >= (0, 11):
            return "gpu"
        return "tpu" if self.platform == "tpu" else "portable"


class Choice(NamedTuple):
    """What an operation runs.

    Attributes:
      kernel: ``"tpu"``, ``"gpu"`` or ``"xla"``.
      how: In words, for reports.
    """

    kernel: str
    how: str


def current_target() -> Target:
    """The device that a function traced now will run on.

    That of the abstract mesh in use, if it names one (lowering ahead of time), else
    `jax.config.jax_default_device`, else the first device.

    Examples:
      >>> current_target().platform in ("cpu", "gpu", "tpu")
      True
    """
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if abstract is not None:
        return Target(_platform(abstract.platform), abstract.device_kind)
    device = getattr(jax.config, "jax_default_device", None)
    if isinstance(device, str):
        device = jax.devices(device)[0]
    device = jax.devices()[0] if device is None else device
    return Target(_platform(device.platform), device.device_kind)


def _platform(name: str | None) -> str:
    return "gpu" if name in ("cuda", "rocm", "gpu") else str(name)
