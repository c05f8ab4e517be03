"""Fresh adapters change no linear's product; the check names adapters that do."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qlora_jax import config as configs
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.models import trees
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.train import identity
from qlora_jax.train.identity import check_identity, starts_as_base
from qlora_jax.train.setup import load_run_model

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"
ADAPTED = {"q_proj": (64, 64), "down_proj": (128, 64)}
"""(in_features, out_features) of the linears that get an adapter."""
RANK = 4


@functools.cache
def split(method="lora", compute="float32", **lora):
    """Returns structure, trained, frozen and config of the reference llama, adapters fresh."""
    tree = {
        "model": {"path": str(LLAMA), "compute_dtype": compute},
        "data": {"source": "d"},
        "output": "run",
        "method": method,
        "lora": {"rank": RANK, "target_modules": list(ADAPTED)} | lora,
    }
    config = configs.from_tree(tree, "test")
    return *trees.split(load_run_model(config, open_folder(LLAMA), pytest.fail)[0], method), config


def changed(tree, path, layer, number):
    """Returns the tree with the first number of one layer of a leaf replaced."""
    leaves, structure = jax.tree.flatten(tree)
    place = list(trees.flatten(tree)).index(path)
    first = layer, *[0] * (leaves[place].ndim - 1)
    leaves[place] = leaves[place].at[first].set(number)
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize(
    ("method", "compute", "more"),
    [
        ("lora", "float32", {}),
        ("qlora", "bfloat16", {}),
        pytest.param("lora", "float16", {"variant": "dora"}, marks=pytest.mark.slow),
        pytest.param("qlora", "float32", {"variant": "dora"}, marks=pytest.mark.slow),
        pytest.param(
            "qlora", "bfloat16", {"variant": "dora", "freeze_a": True}, marks=pytest.mark.slow
        ),
    ],
)
def test_a_fresh_adapter_is_the_base_to_the_bit(monkeypatch, method, compute, more):
    monkeypatch.setitem(identity.TOLERANCE, "dora", 0.0)
    *parts, config = split(method, compute, **more)
    assert starts_as_base(config)
    check_identity(*parts, config)


@pytest.mark.parametrize("number", [0.01, float("nan"), float("inf")])
def test_a_b_that_is_not_zero_is_found_and_its_linear_named(number):
    graph, trained, frozen, config = split("qlora", "bfloat16")
    trained = changed(trained, "runs.0.down_proj.adapter.b", 2, number)
    with pytest.raises(
        RunFailed, match=r"first at model\.layers\.2\.mlp\.down_proj; this is a bug"
    ):
        check_identity(graph, trained, frozen, config)
    trained = changed(trained, "runs.0.q_proj.adapter.b", 2, number)
    with pytest.raises(RunFailed, match=r"first at model\.layers\.2\.self_attn\.q_proj;"):
        check_identity(graph, trained, frozen, config)
    trained = changed(trained, "runs.0.down_proj.adapter.b", 1, number)
    with pytest.raises(RunFailed, match=r"first at model\.layers\.1\.mlp\.down_proj;"):
        check_identity(graph, trained, frozen, config)


@pytest.mark.parametrize("number", [float("nan"), 0.0])
@pytest.mark.quick
def test_a_magnitude_that_is_not_the_norm_is_found(number):
    graph, trained, frozen, config = split(variant="dora")
    check_identity(graph, trained, frozen, config)
    wrong = changed(trained, "runs.0.q_proj.adapter.magnitude", 1, number)
    with pytest.raises(RunFailed, match=r"first at model\.layers\.1\.self_attn\.q_proj;"):
        check_identity(graph, wrong, frozen, config)
    longer = jax.tree.map(lambda x: x * 1.0001, trained)
    with pytest.raises(RunFailed, match=r"first at model\.layers\.0\.self_attn\.q_proj;"):
        check_identity(graph, longer, frozen, config)


def test_nan_in_the_base_is_found():
    graph, trained, frozen, config = split()
    frozen = changed(frozen, "runs.0.q_proj.weight", 1, float("nan"))
    with pytest.raises(RunFailed, match=r"first at model\.layers\.1\.self_attn\.q_proj;"):
        check_identity(graph, trained, frozen, config)


@pytest.mark.parametrize(("method", "variant"), [("lora", "dora"), ("qlora", "lora")])
def test_both_sides_share_one_product(method, variant):
    *parts, _ = split(method, "float32", variant=variant)
    program = identity.unchanged.lower(*parts, jnp.dtype("float32"), 0.0).compile().as_text()
    found = []
    for body in re.split(r"\n(?=[%E])", program):
        rows = dict(re.findall(rf"(%[\w.-]+) = f32\[{identity.ROWS},(\d+)\]", body))
        for name, left in re.findall(r"(%[\w.-]+) = \S+ dot\((?:\S+ )?(%[\w.-]+), ", body):
            if name in rows and left in rows:
                found.append((int(rows[left]), int(rows[name])))
    # the search finds x @ A and (x @ A) @ B too, so it would find a second product with W
    assert sorted(found) == sorted(
        product for k, n in ADAPTED.values() for product in ((k, n), (k, RANK), (RANK, n))
    )


def test_adapters_taken_from_the_weights_are_not_checked():
    *_, config = split()
    pissa = dataclasses.replace(config, lora=dataclasses.replace(config.lora, init="pissa"))
    assert not starts_as_base(pissa)
