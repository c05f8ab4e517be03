import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from qlora_jax.runtime import device


@pytest.fixture
def idle_gpu(monkeypatch):
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def fake_nvidia_smi(folder, monkeypatch, script):
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_the_devices_are_those_of_jax():
    devices = device.describe_devices()
    assert devices.count == len(jax.devices())
    assert devices.backend == jax.default_backend()
    assert devices.kind in str(devices)
    assert devices.backend in str(devices)


def test_several_devices_are_counted():
    assert str(device.Devices("gpu", "NVIDIA L4", 2)) == "2 x NVIDIA L4 (gpu)"


def test_an_idle_gpu_is_one_line_with_the_remedy(idle_gpu):
    warning = device.warn_if_gpu_idle()
    assert "make install EXTRA=cuda13" in warning
    assert "\n" not in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [("JAX_PLATFORMS", "cpu"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")],
)
def test_a_setting_that_hides_the_gpu_is_named(idle_gpu, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    warning = device.warn_if_gpu_idle()
    assert f"unset {name}" in warning
    assert "make install" not in warning


def test_no_warning_without_a_gpu_or_when_jax_uses_it(idle_gpu, monkeypatch):
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: False)
    assert device.warn_if_gpu_idle() is None
    monkeypatch.setattr(device, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert device.warn_if_gpu_idle() is None


@pytest.mark.parametrize(
    ("path", "present"),
    [
        ("proc/driver/nvidia/gpus/0000:3b:00.0/information", True),
        ("dev/nvidia0", True),
        ("dev/nvidiactl", False),
    ],
)
def test_the_drivers_files_tell_of_a_gpu(tmp_path, monkeypatch, path, present):
    monkeypatch.setenv("PATH", "")
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()
    assert device.has_nvidia_gpu(tmp_path) is present


@pytest.mark.parametrize(
    ("script", "present"),
    [
        ("echo 'GPU 0: Tesla T4 (UUID: GPU-1)'", True),
        ("echo 'No devices found.'", False),
        ("echo 'GPU 0: driver mismatch'; exit 18", False),
    ],
)
def test_nvidia_smi_is_believed_when_it_lists_a_gpu(tmp_path, monkeypatch, script, present):
    fake_nvidia_smi(tmp_path, monkeypatch, script)
    assert device.has_nvidia_gpu(tmp_path) is present


def test_an_nvidia_smi_that_hangs_is_no_gpu(tmp_path, monkeypatch):
    def hang(*args, **kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    fake_nvidia_smi(tmp_path, monkeypatch, "")
    monkeypatch.setattr(subprocess, "run", hang)
    assert not device.has_nvidia_gpu(tmp_path)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_there_is_one_line(run_process, platform):
    if platform == "cuda" and device.describe_devices().backend == "gpu":
        pytest.skip("it is there")
    ended = run_process(
        "generate", "no-such-model", "--adapter=a=b", "--prompt=a", JAX_PLATFORMS=platform
    )
    assert ended.code == 2
    assert ended.message.startswith(f"qlora-jax: JAX_PLATFORMS is '{platform}', and jax cannot")


@pytest.mark.parametrize(
    ("fault", "platforms", "code", "lines"),
    [
        ("raise OSError('no driver')", "nonsense", 2, ["cannot start that here (no driver)"]),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", "", 130, ["interrupted"]),
        (
            "raise OSError('no driver')",
            "",
            2,
            ["Traceback", "OSError: no driver", "b: no such folder"],
        ),
    ],
    ids=["asked for", "interrupted", "not asked for"],
)
def test_a_plugin_of_jax_that_fails(tmp_path, fault, platforms, code, lines):
    """Without JAX_PLATFORMS, jax continues without the plugin and logs its traceback."""
    plugin = tmp_path / "jax_plugins" / "fake"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(f"import os, signal, time\ndef initialize(): {fault}\n")
    paths = f"{Path(__file__).parents[2]}:{tmp_path}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "qlora_jax",
            "generate",
            "no-such-model",
            "--adapter=a=b",
            "--prompt=a",
        ],
        env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": platforms},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    assert all(line in done.stderr for line in lines)
    assert len(lines) > 1 or done.stderr.count("\n") == 1
