"""Tests the plan: memory of compiled programs, search, temporaries, refusal and command."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.commands import plan as command
from qlora_jax.config import Config, changed, from_tree
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.gpu.compile import compile_for, has_plugin
from qlora_jax.gpu.described import GPUS, description, read_gpu
from qlora_jax.lora import choose_adapters as adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import attach
from qlora_jax.models.shapes import find
from qlora_jax.plan import choose, compiled_memory, fit, plan, search
from qlora_jax.plan.advice import changes
from qlora_jax.plan.compiled import Plan
from qlora_jax.plan.compiled_memory import ProgramMemory
from qlora_jax.plan.ledger import ledger, total
from qlora_jax.plan.temporaries import Temporary, temporaries
from qlora_jax.quant import nbytes
from qlora_jax.runtime import gpu_memory
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.paths import PACKAGE
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import init_state

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
GIB = 2**30


def config(**more: str) -> Config:
    tree = {
        "model": {"path": str(LLAMA), "remat": "full", "storage_dtype": "float32"},
        "data": {"source": "none", "sequence_length": 32},
        "output": "none",
        "lora": {"rank": 4, "alpha": 8},
        "train": {"batch_size": 2},
    }
    overrides = {key.replace("__", "."): value for key, value in more.items()}
    return changed(from_tree(tree, "test"), overrides)


def abstract(run: Config, gpu: str | None = None) -> compiled_memory.AbstractStep:
    device = read_gpu(gpu) if gpu else jax.devices("cpu")[0]
    return compiled_memory.abstract_step(run, open_folder(LLAMA).config, device)


@pytest.mark.parametrize("folder", sorted(LLAMA.parent.glob("*/")), ids=lambda path: path.name)
def test_every_family_reaches_the_compiling_process_whole(folder: Path) -> None:
    decoder = open_folder(folder).config
    sent = json.loads(json.dumps(plan.DECODER.dump_python(decoder, mode="json")))
    assert plan.DECODER.validate_python(sent) == decoder


@pytest.mark.parametrize(
    ("method", "variant"),
    [("qlora", "lora"), ("lora", "lora"), ("full", "lora"), ("qlora", "dora")],
)
@pytest.mark.quick
def test_shapes_alone_give_the_tree_of_the_real_model(method: str, variant: str) -> None:
    run = config(method=method, lora__variant=variant)
    quant = run.quant if method == "qlora" else None
    model = load_model(open_folder(LLAMA), quant=quant, dtype=jnp.float32)
    if method != "full":
        specs = adapters(run.lora, model.linears())
        attach(model, specs, jax.random.key(0), variant=variant)
    _, trained, frozen = trees.split(model, method)
    state = init_state(trained, adamw(run.optimizer, run.train.step_count), False)
    step = abstract(run)
    for ours, real in ((step.state, state), (step.frozen, frozen)):
        assert jax.tree.structure(ours) == jax.tree.structure(real)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(real)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def compiled(function, *arguments, donate=()):
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.quick
def test_arguments_are_the_trees_bytes(method: str) -> None:
    run = config(method=method, model__remat="dots")
    step = abstract(run)
    (account,) = compiled_memory.gradient_memory(step, compiled)
    trained, frozen = nbytes(step.state.trained), nbytes(step.frozen)
    inputs = nbytes(dict(step.batch)) + 4  # the loss scale
    assert account.arguments == trained + frozen + inputs
    assert nbytes(step.gradients) <= account.outputs < nbytes(step.gradients) + 1024
    parts = ledger(open_folder(LLAMA).config, run)
    held = sum(size for name, size in exact(parts).items() if name not in ("gradients", "moments"))
    moments = sum(nbytes(unit) for unit in step.state.optimizer)
    # the step, the loss scale, the finite steps and the optimizer's counts
    counters = 4 * 3 + moments - exact(parts)["moments"]
    assert held == trained + frozen + nbytes(dict(step.batch)) + counters


def exact(parts) -> dict[str, int]:
    return {name: part.nbytes for name, part in parts.items() if part.exact}


@pytest.mark.parametrize("remat", ["full", "host"])
def test_what_lives_beside_a_layer_is_counted_once(remat: str) -> None:
    step = abstract(config(model__remat=remat, optimizer__clip_norm="0"), "a100")
    assert step.program.direct is not None
    layers = {piece.name: piece for piece in compiled_memory.list_gradient_programs(step)}
    backward = layers["backward of a layer"]
    _, _, x, g, shared, own = backward.arguments
    model = nbytes((step.state.trained, step.frozen, dict(step.batch)))
    count = open_folder(LLAMA).config.num_layers
    inputs = min(count, 3) if remat == "host" else count
    assert backward.alive == model + nbytes((shared, own, g)) + inputs * nbytes(x)
    assert backward.host == (count * nbytes(x) if remat == "host" else 0)
    whole = abstract(config(model__remat=remat), "a100")
    assert whole.program.direct is None
    clipping = {piece.name: piece for piece in compiled_memory.list_gradient_programs(whole)}
    more = clipping["backward of a layer"].alive - backward.alive
    assert more == nbytes(whole.gradients)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_nothing_as_large_as_tokens_by_tokens_exists(remat: str) -> None:
    length = 2**15
    step = abstract(
        config(data__sequence_length=str(length), train__batch_size="1", model__remat=remat), "a100"
    )
    for piece in compiled_memory.list_gradient_programs(step):
        made = compiled(piece.function, *piece.arguments, donate=piece.donate)
        assert made.memory_analysis().temp_size_in_bytes < length**2 / 2


def test_what_is_auto_is_the_fastest_that_fits() -> None:
    sizes = {"dots": 100, "full": 60, "host": 40}

    def compile_(run: Config) -> choose.Compiled:
        account = ProgramMemory("gradient", 0, 0, 0, sizes[run.model.remat], 0)
        return choose.Compiled(moments_of(10), [account], [])

    def chosen(limit: int, **settings: str) -> tuple[str, str]:
        found = choose.choose(config(**settings), limit, compile_)
        return found.remat, found.offload

    auto = {"model__remat": "auto"}
    assert chosen(110, **auto) == ("dots", "device")
    assert chosen(105, **auto) == ("dots", "host")
    assert chosen(70, **auto) == ("full", "device")
    assert chosen(41, **auto) == ("host", "host")
    assert chosen(1, **auto) == ("host", "host")
    assert chosen(41, model__remat="full") == ("full", "host")
    assert chosen(105, optimizer__offload="device", **auto) == ("full", "device")


def moments_of(size: int) -> compiled_memory.AbstractStep:
    """Returns a step whose moments take `size` bytes; nothing else of the step is used."""
    step = abstract(config(model__remat="dots"))
    unit = jax.ShapeDtypeStruct((size,), jnp.uint8)
    return step._replace(state=step.state._replace(optimizer=(unit,)))


@pytest.mark.quick
def test_moments_are_counted_once_wherever_they_are() -> None:
    step = abstract(config(method="full"))
    sizes = [nbytes(unit) for unit in step.state.optimizer]
    assert compiled_memory.held_moments(step, False, False) == (sum(sizes), 0)
    assert compiled_memory.held_moments(step, False, True) == (sum(sizes) - max(sizes), 0)
    assert compiled_memory.held_moments(step, True, False) == (0, sum(sizes))
    assert compiled_memory.held_moments(step, True, True) == (2 * max(sizes), sum(sizes))
    for update in compiled_memory.update_memory(step, compiled):
        everything = nbytes((step.state.trained, step.gradients, step.frozen))
        moments = update.arguments + update.elsewhere - everything
        assert any(size <= moments <= size + 64 for size in sizes)


@pytest.mark.parametrize("limit", [100, 101, 137, 163, 5000])
@pytest.mark.parametrize(("unit", "most"), [(1, 1024), (128, 4096), (7, 64)])
def test_the_search_finds_the_largest_that_fits(limit: int, unit: int, most: int) -> None:
    tried = []

    def needs(value: int) -> int:
        tried.append(value)
        return 90 + value * 3 // (2 * unit) + (20 if value > 20 * unit else 0)

    first = 3
    values = range(first, most + 1, unit)
    expected = max((v for v in values if needs(v) <= limit), default=first)
    tried.clear()
    assert search.largest(needs, limit, (first, needs(first)), unit, most) == expected
    assert len(tried) <= 12


BUFFERS = """BufferAssignment:
allocation 0: size 64, parameter 0, shape |f32[16]| at ShapeIndex {}:
 value: <1 p @0> (size=64,offset=0): f32[16]{0}
allocation 9: size 4096, page 0, preallocated-temp:
 value: <2 small.1 @0> (size=256,offset=0): f32[64]{0}
 value: <3 wide.2 @0> (size=2048,offset=0): bf16[32,32]{1,0}
 value: <4 other{} @0> (size=1024,offset=2048): f32[256]{0}
"""
OTHER = "/home/you/qlora_jax/.venv/lib"
"""A folder of an environment within the project's folder: its files are not this package's."""

INLINE = """
  %wide.2 = bf16[] convert(), metadata={op_name="f/a/mul" source_file="PACKAGE/b.py" source_line=7}
  ROOT %other = f32[] add(), metadata={op_name="while/add" source_file="OTHER/b.py" source_line=3}
"""
FRAMES = """
FileNames
1 "PACKAGE/b.py"
2 "OTHER/optax.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

  %wide.2 = bf16[32,32]{1,0} convert(%p), metadata={op_name="jit(f)/a/mul" stack_frame_id=1}
  ROOT %other = f32[256]{0} add(%p), metadata={op_name="jit(f)/while/add" stack_frame_id=2}
"""


@pytest.mark.parametrize(("program", "outer"), [(INLINE, ""), (FRAMES, "qlora_jax/b.py:7")])
def test_temporaries_with_their_lines(tmp_path: Path, program: str, outer: str) -> None:
    stem = "module_1.f.sm_8.0_gpu_after_optimizations"
    (tmp_path / f"{stem}-buffer-assignment.txt").write_text(BUFFERS)
    program = program.replace("PACKAGE", str(PACKAGE)).replace("OTHER", OTHER)
    (tmp_path / f"{stem}.txt").write_text(program)
    assert temporaries(tmp_path, 5) == [
        Temporary(2048, "bf16[32,32]", "a/mul", "qlora_jax/b.py:7"),
        Temporary(1024, "f32[256]", "while/add", outer),
    ]
    assert len(temporaries(tmp_path, 1)) == 1


class Card:
    """A fake device with a memory limit."""

    device_kind = "a card"

    def __init__(self, limit: int | None):
        self.limit = limit

    def memory_stats(self) -> dict[str, int] | None:
        return None if self.limit is None else {"bytes_limit": self.limit}


def needed(run: Config) -> int:
    found = fit.fit(run, open_folder(LLAMA).config, Card(2**40), False)
    assert found.device is not None
    return found.device


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_what_to_change() -> None:
    model = open_folder(LLAMA).config
    run = config(method="full", model__remat="none")
    here = needed(changed(run, {"optimizer.offload": "device"}))
    host = needed(changed(run, {"optimizer.offload": "host"}))
    assert host < here
    assert fit.fit(run, model, Card(here), False) == ("device", "none", here, "")
    assert fit.fit(run, model, Card(here - 1), False) == (
        "host",
        "none",
        host,
        "optimizer.offload=host",
    )
    with pytest.raises(UserError, match=r"needs .* on a card, .*--model.remat=full.*--force"):
        fit.fit(run, model, Card(host - 1), False)
    assert fit.fit(changed(run, {"optimizer.offload": "host"}), model, Card(1), True).device == host
    assert fit.fit(run, model, Card(None), False) == ("device", "none", None, "")


def test_changes_stop_when_enough_is_saved() -> None:
    model, run = find("llama-7b"), config(model__path="llama-7b", lora__rank="64")
    everything = total(ledger(model, run))
    made, missing = changes(model, run, 1)
    assert [change.setting for change in made] == ["--optimizer.offload=host"]
    moments = exact(ledger(model, run))["moments"]
    assert made[0].saved == moments
    assert missing == 1 - moments
    made, missing = changes(model, run, everything)
    assert missing == everything - sum(change.saved for change in made) > 0


def test_a_plan_fits_by_its_largest_program() -> None:
    programs = [ProgramMemory("a", 5, 2, 1, 3, 0), ProgramMemory("b", 1, 1, 0, 1, 7)]
    made = Plan("t4", "device", "dots", 9, 0, programs, [])
    assert made.device == 10
    assert not made.fits
    assert dataclasses.replace(made, limit=10).fits


def test_a_gpus_usable_memory() -> None:
    assert gpu_memory.usable(16 * GIB) == int(0.95 * 15.5 * GIB)
    environment: dict[str, str] = {}
    gpu_memory.claim(environment)
    assert environment == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    gpu_memory.claim(kept := {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"})
    assert kept == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}


@pytest.mark.skipif(has_plugin(), reason="the compile-only GPU packages are here")
def test_without_the_packages_the_ledger_alone(run_cli, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    ended = run_cli("plan", "--model", "llama-65b", "--seq", "512", "--plot", picture)
    assert ended.code == 0
    assert "Estimate: the ledger alone" in ended.out
    assert "783.4" in ended.out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    rows = json.loads(run_cli("plan", "--model", "llama-65b", "--json").out)
    assert {row["gpu"] for row in rows} == set(GPUS)
    assert not any(row["compiled"] for row in rows)
    small = next(row for row in rows if row["gpu"] == "t4")
    assert not small["fits"]
    assert small["changes"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("no.txtpb", None, "no.txtpb: no such file"),
        ("a.txtpb", "hello", "a.txtpb: has no name; a target file is XLA's GpuTargetConfigProto"),
        ("b.txtpb", 'name: "x" major: 8', "b.txtpb: has no minor"),
    ],
)
def test_a_target_file_that_is_not_one(
    run_cli, tmp_path: Path, name: str, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    ended = run_cli("plan", "--model", "llama-7b", "--gpu", tmp_path / name)
    assert ended.code == 2
    assert message in ended.message


def test_a_target_file_of_ones_own(run_cli, tmp_path: Path) -> None:
    own = tmp_path / "half.txtpb"
    text = description("t4")
    own.write_text(text.replace("device_memory_size: ", "device_memory_size: 1"))
    (row,) = json.loads(
        run_cli("plan", "--model", "smollm2-135m", "--gpu", own, "--json", "--no-search").out
    )
    assert row["limit_gib"] > 100


@pytest.mark.skipif(not has_plugin(), reason="compile-only GPU packages absent: make gpu-check")
def test_packages_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.1")
    with pytest.raises(UserError, match=r"jax-cuda13-plugin 0\.1 does not belong to jax"):
        compile_for("t4", jnp.sin, jnp.ones(3))


def test_a_run_that_no_gpu_holds(run_cli) -> None:
    ended = run_cli("plan", "--model", "llama-65b", "--method=full", "--gpu", "t4,h100")
    assert ended.code == 2
    assert "the largest GPU given, h100, lacks" in ended.message
    if not has_plugin():
        assert "--lora.dtype=bfloat16  saves" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either a CONFIG, or --model NAME"),
        (["--model", "llama-7b", "--gpu", "t5"], "GPU 't5' is not known; known: a100"),
        (["--model", "lama-7b"], "llama-7b"),
        (["--model", "llama-7b", "--rank", "0"], "lora.rank"),
        (["--model", "llama-7b", "--seq", "x"], "argument --seq: invalid int value: 'x'"),
        (["--model", "llama-7b", "--lora.rnk=3"], "--lora.rank"),
    ],
)
def test_bad_input(run_cli, arguments: list[str], message: str) -> None:
    ended = run_cli("plan", *arguments)
    assert ended.code == 2
    assert message in ended.message


@pytest.mark.skipif(not has_plugin(), reason="compile-only GPU packages absent: make gpu-check")
def test_compiled_for_a_t4(run_cli) -> None:
    arguments = ("--model", "smollm2-135m", "--gpu", "t4", "--no-search", "--json", "--seq", "256")
    (row,) = json.loads(run_cli("plan", *arguments).out)
    assert row["compiled"]
    assert row["fits"]
    run = command.of_model("smollm2-135m", {"lora.rank": "64", "data.sequence_length": "256"})
    run = command.suited(run, (7, 5))
    parts = exact(ledger(find("smollm2-135m"), run))
    gradient = row["programs"][0]
    apart = parts["gradients"] + parts["moments"] + parts["counters"]
    assert gradient["arguments"] == sum(parts.values()) - apart + 4
    assert row["temporaries"][0]["source"].startswith("qlora_jax/")


@pytest.mark.skipif(not has_plugin(), reason="compile-only GPU packages absent: make gpu-check")
def test_a_long_sequence_has_no_array_of_tokens_by_what_is_wide(tmp_path: Path) -> None:
    """No array is as large as [tokens, tokens], [tokens, vocab] or [tokens, intermediate]."""
    length, model = (
        32_768,
        dataclasses.replace(find("llama3-8b"), num_layers=2, windows=(None,) * 2),
    )
    settings = {"data.sequence_length": str(length), "model.remat": "full"}
    run = command.of_model("llama3-8b", settings)
    step = compiled_memory.abstract_step(run, model, read_gpu("a100"))
    narrowest = length * min(length, model.vocab_size, model.intermediate_size)
    for piece in compiled_memory.list_gradient_programs(step):
        folder = tmp_path / piece.name
        options = {"xla_dump_to": str(folder)}
        compile_for("a100", piece.function, *piece.arguments, donate=piece.donate, options=options)
        (largest,) = temporaries(folder, 1)
        assert largest.bytes < 2 * narrowest, largest
