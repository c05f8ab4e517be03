"""Tests the list of programs that a GPU would run, and the outcome of compiling each."""

import io
import json
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.bench.gpu import compile_check
from qlora_jax.bench.gpu.compile_check import GPUS, LISTING, CompileOutcome, CompileTask, tasks
from qlora_jax.bench.gpu.parts import PARTS
from qlora_jax.bench.gpu.programs import BenchProgram, as_options
from qlora_jax.runtime.errors import UserError

WITHOUT = {"peers"}
"""Parts that run no program of ours."""

TRACED_LONG = {"large", "steps"}
"""Parts that trace slowly (steps of whole models); `training` has such a step, too."""

WORKER = r"""
import json, os, sys
gpu, part = sys.argv[1:]
for line in sys.stdin:
    if int(line) == 1:
        print("F0101 gemm.cc:7] Check failed: no\n  @ 0x1 trace", file=sys.stderr, flush=True)
        os.abort()
    flags = part in os.environ["XLA_FLAGS"]
    print(json.dumps([None if flags else "no flags", 0.5, int(line) == 2]), flush=True)
"""

SHAPE = jax.ShapeDtypeStruct((2,), jnp.float32)


def part(name: str, programs: Any = None) -> Any:
    return SimpleNamespace(
        name=name, flags=f"--a --{name}", module=SimpleNamespace(programs=programs)
    )


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param(part, id=part.name, marks=[pytest.mark.slow] * (part.name in TRACED_LONG))
        for part in PARTS
    ],
)
def test_each_part_lists_its_programs(chosen: Any) -> None:
    (task,) = tasks(["h100"], [chosen])
    assert task.error is None
    assert bool(task.names) == (chosen.name not in WITHOUT)
    assert len(set(task.names)) == len(task.names)


def test_a_part_that_cannot_list_its_programs_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def programs(scale: str, device: Any) -> Any:
        yield BenchProgram("first", abs, (SHAPE,))
        raise ValueError("no such shape\nand more")

    monkeypatch.setattr(compile_check, "has_plugin", lambda: True)
    found = list(tasks(["h100"], [part("steps", programs)]))
    outcomes = compile_check.compile_all(found, lambda outcome: None)
    assert outcomes == [CompileOutcome("h100", "steps", LISTING, "ValueError: no such shape")]


def test_a_compiler_that_aborts_takes_one_program_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compile_check, "has_plugin", lambda: True)
    monkeypatch.setattr(compile_check, "COMMAND", [sys.executable, "-c", WORKER])
    chosen = [CompileTask(gpu, part("steps"), ["a", "b", "c"]) for gpu in GPUS]
    told: list[CompileOutcome] = []
    outcomes = compile_check.compile_all(chosen, told.append)
    assert sorted(told) == sorted(outcomes)
    assert [outcome[:3] for outcome in outcomes] == [
        (gpu, "steps", name) for gpu in GPUS for name in "abc"
    ]
    died = "the compiler's process ended with -6: F0101 gemm.cc:7] Check failed: no"
    assert [outcome.error for outcome in outcomes] == [None, died, None] * 2
    assert str(outcomes[1]) == f"h100, steps, b: {died}"
    assert compile_check.summary(outcomes) == "2 programs of bench gpu x 2 GPUs compiled, 2 failed"
    assert compile_check.table(outcomes)[0] == "h100 steps: 3 programs, 2 different, 1 s"


def test_equal_programs_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    double, other = (lambda x: 2 * x), {"options": {"xla_a": True}}

    def fails(x: jax.Array) -> jax.Array:
        raise TypeError("not for you\nat all")

    def programs(scale: str, device: Any) -> list[BenchProgram]:
        return [
            BenchProgram("a", double, (SHAPE,)),
            BenchProgram("b", lambda y: 2 * y, (SHAPE,)),
            BenchProgram("c", double, (SHAPE,), **other),
            BenchProgram("d", double, (SHAPE,), donate=(0,)),
            BenchProgram("e", fails, (SHAPE,)),
            BenchProgram("f", double, (jax.ShapeDtypeStruct((3,), jnp.float32),)),
        ]

    def lower(gpu: str, function: Any, *arguments: Any, donate: Any) -> jax.stages.Lowered:
        return jax.jit(function, donate_argnums=donate).lower(*arguments)

    def compile_lowered(lowered: jax.stages.Lowered, options: Any) -> None:
        if "3xf32" in lowered.as_text():
            raise RuntimeError("INTERNAL: three\nmore")

    monkeypatch.setattr(compile_check, "lower_for", lower)
    monkeypatch.setattr(compile_check, "compile_lowered", compile_lowered)
    monkeypatch.setattr(compile_check, "PARTS", [part("x", programs)])
    monkeypatch.setattr(sys, "argv", ["compile_check", "h100", "x"])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{i}\n" for i in range(6))))
    compile_check.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(error, repeated) for error, _, repeated in lines] == [
        (None, False),
        (None, True),
        (None, False),
        (None, False),
        ("TypeError: not for you", False),
        ("RuntimeError: INTERNAL: three", False),
    ]


def test_without_the_compiler_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_check, "has_plugin", lambda: False)
    with pytest.raises(UserError, match="not installed; run make gpu-check"):
        compile_check.compile_all([], lambda outcome: None)


def test_flags_as_options() -> None:
    assert as_options("--xla_a=false --xla_b=true") == {"xla_a": False, "xla_b": True}
    assert as_options("--xla_a=+B --xla_c=2") == {"xla_c": 2}
    assert as_options("") == {}
