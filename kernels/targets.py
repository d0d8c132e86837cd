"""For which device a kernel is made: known when it is traced, and not always the device that traces it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, kw_only=True)
class Target:
    """The device that will run what is traced now; compiling ahead of time, it is not one of this process."""

    platform: str
    """cpu, gpu or tpu."""
    kind: str
    """As `jax.Device.device_kind` has it: "TPU v5", "NVIDIA H100 80GB HBM3", "cpu"."""

    @classmethod
    def of(cls, device: Any) -> Target:
        """The target that a device is, one of this process or of a topology that is only described."""
        platform = "gpu" if device.platform in ("cuda", "rocm") else device.platform
        return cls(platform=platform, kind=device.device_kind)

    @classmethod
    def here(cls) -> Target:
        """JAX's first device."""
        return cls.of(jax.devices()[0])
