"""What the devices cannot do is refused before the step is made."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from sealion_jax.errors import UserError
from sealion_jax.hardware import chip_of_kind
from sealion_jax.model.config import ComputeConfig
from sealion_jax.run import update
from sealion_jax.run.update import check_compute, update_parts
from sealion_jax.sharding import MeshConfig, make_mesh
from tests.tiny_recipe import config as tiny


@pytest.mark.parametrize(
    ("platform", "kind", "can"),
    [
        ("tpu", "TPU v4", {"int8"}),
        ("tpu", "TPU v5 lite", {"int8"}),
        ("tpu", "TPU v5", {"int8"}),
        ("tpu", "TPU v6 lite", {"int8"}),
        ("tpu", "TPU7x", {"fp8"}),
        ("gpu", "NVIDIA A100-SXM4-80GB", {"int8"}),
        ("gpu", "NVIDIA H100 80GB HBM3", {"int8", "fp8"}),
        ("gpu", "NVIDIA B200", {"int8", "fp8"}),
        ("gpu", "one that is not known", {"int8", "fp8"}),
        ("cpu", "cpu", {"int8", "fp8"}),  # emulated, for tests
    ],
)
def test_eight_bits_are_for_chips_that_have_them(platform, kind, can):
    for quantization in ("none", "int8", "fp8"):
        compute = ComputeConfig(quantization=quantization)
        if quantization in {"none", *can}:
            check_compute(compute, platform=platform, chip=chip_of_kind(kind))
            continue
        with pytest.raises(
            UserError, match=f"is not known to multiply {quantization}.*take {can.copy().pop()} or"
        ):
            check_compute(compute, platform=platform, chip=chip_of_kind(kind))


def test_the_step_is_refused_on_the_devices_of_its_mesh(monkeypatch):
    config = tiny()
    config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, quantization="fp8"))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert config.model is not None
    update_parts(config, config.model, mesh, num_sources=1)  # a CPU
    a100 = SimpleNamespace(platform="gpu", kind="NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(update, "Target", SimpleNamespace(of=lambda device: a100))
    with pytest.raises(UserError, match="a100 is not known to multiply fp8"):
        update_parts(config, config.model, mesh, num_sources=1)
