"""Checks the exact parts of the ledger: the program's gradients, one count for equal runs."""

from pathlib import Path

import jax
import pytest

from qlora_jax.config import Config, changed, from_tree
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.models.shapes import find
from qlora_jax.plan.compiled_memory import abstract_step
from qlora_jax.plan.exact import ORDER, PARTS, QUANTIZED, count, gradients

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"


def config(**more: str) -> Config:
    tree = {"model": {"path": "m"}, "data": {"source": "d", "sequence_length": 32}, "output": "o"}
    return changed(
        from_tree(tree, "test"), {k.replace("__", "."): text for k, text in more.items()}
    )


@pytest.mark.parametrize(
    ("dtype", "micro_batches"), [("bfloat16", 1), ("bfloat16", 3), ("float16", 1)]
)
def test_gradients_are_those_of_the_program(dtype: str, micro_batches: int) -> None:
    run = config(lora__dtype=dtype, train__gradient_accumulation=str(micro_batches))
    step = abstract_step(run, open_folder(LLAMA).config, jax.devices("cpu")[0])
    ours = gradients(step.state.trained, micro_batches)
    assert jax.tree.structure(ours) == jax.tree.structure(step.gradients)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(step.gradients)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_runs_that_differ_elsewhere_are_counted_once() -> None:
    model, first = find("smollm2-135m"), count(find("smollm2-135m"), config())
    same = {"train__batch_size": "9", "optimizer__offload": "host", "model__remat": "full"}
    for setting, text in same.items():
        assert count(model, config(**{setting: text})) is first
    other = {"lora__rank": "9", "optimizer__moments": "int8", "method": "lora"}
    for setting, text in other.items():
        assert count(model, config(**{setting: text})) != first


def test_every_part_has_its_place_in_the_order() -> None:
    assert {part for *_, part in PARTS} | set(QUANTIZED.values()) == set(ORDER)
