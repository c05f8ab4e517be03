"""Tests plans on a mesh: bytes of one device, traffic between devices, time of the traffic."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from qlora_jax.commands import plan as command
from qlora_jax.config import Config, changed, from_tree
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.gpu.compile import has_plugin
from qlora_jax.gpu.links import link_of
from qlora_jax.models import sharding, trees
from qlora_jax.models.shapes import find
from qlora_jax.plan import compiled_memory, device_bytes, fit, traffic_text
from qlora_jax.plan.advice import changes
from qlora_jax.plan.exact import count
from qlora_jax.plan.ledger import ledger, total
from qlora_jax.plan.traffic import as_traffic, times, traffic
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import device_mesh
from qlora_jax.train.assemble import assemble
from qlora_jax.train.mesh import split_over
from qlora_jax.train.setup import load_run_model

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
ROW_OF_EACH = {"data": 2, "fsdp": 4}


class Card:
    """A fake device with a memory limit."""

    device_kind = "a card"

    def __init__(self, limit: int):
        self.limit = limit

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit}


@pytest.fixture
def small_arrays_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "WHOLE_BELOW", 64)


def small(**more: str) -> Config:
    tree = {
        "model": {"path": str(LLAMA), "remat": "full"},
        "data": {"source": "none", "sequence_length": 16},
        "output": "none",
        "lora": {"rank": 8},
        "train": {"batch_size": 8},
        "mesh": ROW_OF_EACH,
    }
    return changed(from_tree(tree, "test"), {k.replace("__", "."): x for k, x in more.items()})


def planned(run: Config) -> compiled_memory.AbstractStep:
    decoder = open_folder(LLAMA).config
    return compiled_memory.abstract_step(run, decoder, jax.devices()[0], device_mesh(**ROW_OF_EACH))


def homes(tree: Any) -> list[tuple[Any, ...]]:
    leaves = jax.tree.leaves(tree)
    return [(x.sharding.shard_shape(x.shape), x.dtype, x.sharding.spec) for x in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_a_plan_has_every_array_where_the_run_has_it(method: str, small_arrays_split: None) -> None:
    run, mesh = small(method=method), device_mesh(**ROW_OF_EACH)
    model, _ = load_run_model(run, open_folder(LLAMA), print, mesh)
    parts, layout = split_over(mesh, trees.split(model, method), print)
    real, step = assemble(run, parts, layout=layout), planned(run)
    assert homes((step.state, step.frozen)) == homes((real.state, real.frozen))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_what_a_compiled_gradient_takes_and_exchanges(
    method: str, small_arrays_split: None
) -> None:
    step, kept = planned(small(method=method)), []

    def compiled(*arguments: Any, **options: Any) -> Any:
        kept.append(fit.compiled(*arguments, **options))
        return kept[-1]

    (gradient,) = compiled_memory.gradient_memory(step, compiled)
    trees_ = device_bytes.nbytes((step.state.trained, step.frozen, dict(step.batch)))
    assert gradient.arguments == trees_ + 4  # the loss scale
    sent = traffic(kept[0].as_text(), step, open_folder(LLAMA).config, ROW_OF_EACH["fsdp"])
    assert {one.kind for one in sent.collectives} >= {"all-gather", "reduce-scatter"}
    assert all(sent.received[part] for part in ("weights", "gradients", "rest"))
    assert bool(sent.received["adapters"]) == (method != "full")
    if method == "qlora":  # once in each pass, also with remat "full"
        assert sent.ratio == pytest.approx((4 + 8 / 64) / 16)
    assert as_traffic(json.loads(json.dumps(sent))) == sent


def test_a_run_that_does_not_fit_says_so_of_each_device(small_arrays_split: None) -> None:
    with pytest.raises(UserError, match=r"on each of 8 a card, which has 0\.00; to fit") as told:
        fit.fit(small(), open_folder(LLAMA).config, Card(2**10), False)
    assert "--train.batch_size" not in str(told.value)  # a device already has just one row


def of_model(name: str, **overrides: str) -> Config:
    return command.of_model(name, {k.replace("__", "."): text for k, text in overrides.items()})


def test_a_shape_that_does_not_say_where_it_lives_is_on_each_device() -> None:
    mesh = AbstractMesh((2, 4), ("data", "fsdp"))
    home = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    part = jax.ShapeDtypeStruct((3, 8), jnp.bfloat16, sharding=home)
    assert device_bytes.nbytes(part) == 3 * 2 * 2
    assert device_bytes.nbytes((part, jax.ShapeDtypeStruct((5,), jnp.int32))) == 12 + 20
    assert device_bytes.nbytes(jnp.zeros((3, 8))) == 96


def test_the_ledger_is_of_one_device() -> None:
    model = find("llama3-8b")
    alone, eight = (of_model("llama3-8b", mesh__fsdp=str(n)) for n in (1, 8))
    one, each = count(model, alone), count(model, eight)
    for part in ("embeddings", "head", "codes", "scales"):
        assert each.model[part] == one.model[part] // 8
    assert each.model["adapters"] == one.model["adapters"] // 8
    assert each.moments == one.moments // 8
    assert each.gradients == one.gradients // 8
    assert each.model["norms and biases"] == one.model["norms and biases"]
    # Each device has one row, so the estimated parts are those of one row.
    estimated = total(ledger(model, changed(eight, {"optimizer.offload": "host"})), exact=False)
    assert estimated == total(ledger(model, alone), exact=False)
    copies = of_model("llama3-8b", mesh__data="8")
    assert count(model, copies).model == one.model


def test_a_smaller_batch_is_one_that_the_mesh_divides() -> None:
    model = find("llama-7b")
    run = of_model("llama-7b", mesh__fsdp="4", train__batch_size="8", optimizer__offload="host")
    made, _ = changes(model, changed(run, {"model.remat": "full"}), 1)
    assert [change.setting for change in made] == ["--train.batch_size=4"]


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("none", {"mesh": "none"}),
        ("fsdp=8", {"mesh.fsdp": "8"}),
        ("data=2,fsdp=4", {"mesh.data": "2", "mesh.fsdp": "4"}),
    ],
)
def test_the_short_form_of_a_mesh(text: str, settings: dict[str, str]) -> None:
    assert command.mesh_settings(text) == settings


@pytest.mark.parametrize("text", ["8", "tensor=2", "fsdp=8,", ""])
def test_a_mesh_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"must be none, or sizes of data and fsdp such as"):
        command.mesh_settings(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mesh", "fsdp=0"], "mesh.fsdp"),
        (["--mesh.fsdp=8", "--train.batch_size=12"], "give --train.batch_size=16"),
        (["--mesh", "rows=2"], "must be none, or sizes of data and fsdp"),
    ],
)
def test_a_bad_mesh(run_cli, arguments: list[str], message: str) -> None:
    ended = run_cli("plan", "--model", "llama-7b", *arguments)
    assert ended.code == 2
    assert message in ended.message


@pytest.mark.skipif(has_plugin(), reason="the compile-only GPU packages are here")
def test_the_command_without_the_packages(run_cli) -> None:
    arguments = ("plan", "--model", "llama3-70b", "--seq", "2048", "--gpu", "a100")
    out = run_cli(*arguments, "--mesh", "data=2,fsdp=4").out
    assert "8 x 2048 tokens, mesh data 2 x fsdp 4" in out
    assert "The figures are for each of the 8 GPUs." in out
    (row,) = json.loads(run_cli(*arguments, "--mesh.fsdp=8", "--json").out)
    (alone,) = json.loads(run_cli(*arguments, "--mesh", "none", "--json").out)
    codes = [x["components"]["codes"]["nbytes"] for x in (row, alone)]
    assert codes[0] * 8 == codes[1]


def test_modelled_times_follow_what_they_depend_on() -> None:
    model = find("llama3-8b")
    run = of_model("llama3-8b", mesh__fsdp="2", data__sequence_length="2048", model__remat="full")

    def compute(gpu: str = "a100", **more: str) -> float:
        given = {key.replace("__", "."): text for key, text in more.items()}
        made = times(changed(run, given), model, gpu, 0)
        assert made is not None
        return made.compute

    products = 2 * 2048 * 3 * sum(k * n for k, n in _matrices())
    assert compute(lora__rank="1") > 32 * products / 312e12
    assert compute(model__remat="dots") < compute() < 2 * compute(model__remat="dots")
    assert compute(train__batch_size="4") == pytest.approx(2 * compute(), rel=0.1)
    assert compute(train__gradient_accumulation="3") == pytest.approx(3 * compute())
    assert compute("h100") < compute() < compute("a6000")
    sent = times(run, model, "a6000", 10**12)
    assert sent is not None
    link = link_of("a6000", 2)
    assert link is not None
    assert sent.sending == 10**12 / link.bandwidth
    assert sent.bound == "the links"
    assert sent._replace(sending=0.0).bound == "compute"
    assert times(run, model, "own.txtpb", 1) is None


def _matrices() -> list[tuple[int, int]]:
    return [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)]


@pytest.mark.skipif(not has_plugin(), reason="compile-only GPU packages absent: make gpu-check")
@pytest.mark.parametrize("gpu", ["a100", "a6000"])
def test_compiled_for_eight_gpus(run_cli, gpu: str) -> None:
    arguments = ("--model", "smollm2-135m", "--seq", "256", "--model.remat=full", "--no-search")
    given = (*arguments, "--gpu", gpu, "--mesh", "fsdp=8", "--json")
    (row,) = json.loads(run_cli("plan", *given).out)
    run = of_model("smollm2-135m", mesh__fsdp="8", data__sequence_length="256")
    parts = {n: x.nbytes for n, x in ledger(find("smollm2-135m"), run).items() if x.exact}
    apart = parts["gradients"] + parts["moments"] + parts["counters"]
    assert row["programs"][0]["arguments"] == sum(parts.values()) - apart + 4
    assert row["traffic"]["ratio"] < 0.27
    assert row["traffic"]["gathers"] >= 2
    assert "modelled from data sheets, not measured" in "\n".join(traffic_text.lines(row))
