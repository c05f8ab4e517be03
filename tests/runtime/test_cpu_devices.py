import os

import pytest

from qlora_jax.runtime import cpu_devices


@pytest.fixture
def environment(monkeypatch):
    def of(**values: str) -> None:
        for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PJRT_NPROC"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return of


@pytest.mark.parametrize(
    ("values", "devices"),
    [
        ({}, 1),
        ({"JAX_NUM_CPU_DEVICES": "8"}, 8),
        ({"JAX_NUM_CPU_DEVICES": "many"}, 1),
        ({"XLA_FLAGS": "--a=b --xla_force_host_platform_device_count=4"}, 4),
    ],
)
def test_a_cpu_of_several_devices_has_threads_for_all(environment, values, devices) -> None:
    environment(**values)
    assert cpu_devices.requested_devices() == devices
    cpu_devices.give_threads()
    expected = str(4 * devices) if devices > 1 else None
    assert os.environ.get("PJRT_NPROC") == expected


def test_what_the_user_asks_for_stays(environment) -> None:
    environment(JAX_NUM_CPU_DEVICES="8", PJRT_NPROC="3")
    cpu_devices.give_threads()
    assert os.environ["PJRT_NPROC"] == "3"
