"""Tests the folder of the compilation cache."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_jax.runtime import compilation, versions

CHILD = """
import json
from qlora_jax.runtime import compilation
compilation.enable_cache()
import jax, jax.numpy as jnp
jax.jit(lambda x: jnp.linalg.svd(x @ x.T)[0])(jnp.ones((9, 9))).block_until_ready()
print(json.dumps([jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache]))
"""
CHANGED = {name for name in os.environ if name.startswith(("JAX_", "XDG_CACHE", "QLORA_JAX_"))}


def run(**environment: str) -> list:
    """Returns jax's cache settings in a new process that compiles a function."""
    root = Path(__file__).parents[2]
    inherited = {k: v for k, v in os.environ.items() if k not in CHANGED}
    everything = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=inherited | everything | environment | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.rglob("*-cache")}


def test_programs_are_kept_in_the_users_cache(tmp_path: Path) -> None:
    kept = run(QLORA_JAX_CACHE=str(tmp_path))
    assert kept == [str(tmp_path / "compiled" / compilation.processor()), True]
    first = files(tmp_path / "compiled")
    assert first
    run(QLORA_JAX_CACHE=str(tmp_path))
    assert files(tmp_path / "compiled") == first


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "--xla_cpu_prefer_vector_width=512"),
        ("--xla_dump_to=x", "--xla_dump_to=x --xla_cpu_prefer_vector_width=512"),
        ("--xla_cpu_prefer_vector_width=256", "--xla_cpu_prefer_vector_width=256"),
    ],
)
def test_wide_vectors_beside_the_users_flags(before: str, after: str) -> None:
    environment = {"XLA_FLAGS": before}
    compilation.use_wide_vectors(environment)
    assert environment == {"XLA_FLAGS": after}


def test_another_folder(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    run(QLORA_JAX_CACHE=str(own), JAX_COMPILATION_CACHE_DIR=str(other))
    assert files(other)
    assert not own.exists()


def test_declined(tmp_path: Path) -> None:
    assert run(QLORA_JAX_CACHE=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="0")[1] is False
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    run(QLORA_JAX_CACHE=str(file))


@pytest.mark.parametrize("name", compilation.SETTINGS)
def test_what_is_set_stays(name: str) -> None:
    environment = {name: "7"}
    compilation.enable_cache(environment)
    assert environment.pop(name) == "7"
    assert environment.keys() == {compilation.FOLDER, *compilation.SETTINGS} - {name}


def test_processors_of_other_abilities_share_nothing(tmp_path: Path) -> None:
    names = []
    for flags in ("sse avx", "sse"):
        (tmp_path / "cpuinfo").write_text(f"model : x\nflags\t: {flags}\n")
        names.append(compilation.processor(tmp_path / "cpuinfo"))
    assert len(set(names)) == 2
    assert compilation.processor(tmp_path / "none")


MEMORY = """
import sys
from qlora_jax.runtime import compilation
if sys.argv[1] == "give back":
    compilation.give_memory_back()
    compilation.give_memory_back()
import jax, jax.numpy as jnp
def deep(x):
    for i in range(150):
        x = jnp.sort(jnp.sin(x @ x + i), axis=i % 2)
    return x
jax.jit(deep).lower(jnp.ones((8, 8))).compile()
lines = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("RssAnon")))
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_trim is glibc's")
def test_the_compilers_memory_is_given_back() -> None:
    def resident(how: str) -> int:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        environment |= {"JAX_ENABLE_COMPILATION_CACHE": "0", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", MEMORY, how]
        return int(subprocess.check_output(command, env=environment, text=True)) >> 10

    kept, given = resident("keep"), resident("give back")
    print(f"MiB after compiling: {kept} kept, {given} given back")
    assert given < kept - 20


def test_a_mesh_asks_for_gathers_beside_work(monkeypatch) -> None:
    monkeypatch.setattr(versions, "jax", lambda: (0, 10))
    environment = {"XLA_FLAGS": "--a=b --xla_gpu_enable_latency_hiding_scheduler=false"}
    compilation.overlap(environment)
    flags = environment["XLA_FLAGS"].split()
    assert flags == [
        "--a=b",
        "--xla_gpu_enable_latency_hiding_scheduler=false",
        "--xla_gpu_enable_pipelined_all_gather=true",
    ]
    compilation.overlap(environment)
    assert environment["XLA_FLAGS"].split() == flags
    monkeypatch.setattr(versions, "jax", lambda: (0, 12))
    newer = {"XLA_FLAGS": "--a=b"}
    compilation.overlap(newer)
    assert newer == {"XLA_FLAGS": "--a=b"}


def test_the_version_of_jax_is_known_without_it() -> None:
    import jax

    assert versions.jax() == jax.__version_info__[:2]
