"""Checks the ledger against the bytes of real trees and of what JAX saves for the backward pass."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from selection import mostly_slow

from qlora_jax.config import Config, from_tree
from qlora_jax.data.packing import fill
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import LoraParam, Weight, choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.models.shapes import find
from qlora_jax.plan.abstract import abstract_model
from qlora_jax.plan.exact import by_part, optimizer_bytes
from qlora_jax.plan.ledger import ledger, parameters, text, total
from qlora_jax.quant import nbytes, quantize
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import step as steps
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import init_state

MODELS = Path(__file__).parents[1] / "golden" / "models"
ROWS, LENGTH = 7, 24
"""Batch rows and length; no array of a reference model has these leading sizes."""


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {"path": "m"},
        "data": {"source": "d", "sequence_length": LENGTH},
        "output": "o",
        "lora": {"rank": 5},
        "train": {"batch_size": ROWS, "gradient_accumulation": 3},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return from_tree(tree, "test")


def loaded(name: str, run: Config) -> Any:
    """Returns (graph, trained, frozen) of a loaded reference model with a run's config."""
    full, lora = run.method == "full", run.lora
    model = load_model(
        open_folder(MODELS / name),
        quant=run.quant if run.method == "qlora" else None,
        dtype=jnp.dtype(lora.dtype if full else run.model.storage_dtype),
    )
    if not full:
        specs, dtype = choose_adapters(lora, model.linears()), jnp.dtype(lora.dtype)
        attach(model, specs, jax.random.key(0), dropout=lora.dropout, dtype=dtype)
    return trees.split(model, run.method)


def abstract(name: str, run: Config) -> Any:
    """Returns the same trees as shapes and dtypes only; this saves compiling the quantizer."""
    checkpoint, quant, graphs = open_folder(MODELS / name), run.quant, []
    names = checkpoint.config.names
    full, layer = run.method == "full", f"{names.layers}.0."
    dtype = run.lora.dtype if full else run.model.storage_dtype

    def stack(shape: tuple[int, ...]) -> Any:
        x = jnp.zeros((checkpoint.config.num_layers, *shape[::-1]), dtype)
        if len(shape) == 1 or run.method != "qlora":
            return x
        sizes = quant.block_size, quant.double_quant, quant.nested_block
        return quantize(x, quant.codebook, *sizes)

    def make() -> Any:
        inside = [name for name in checkpoint.names() if name.startswith(layer)]
        weights = {n.removeprefix(layer): stack(checkpoint.shape(n)) for n in inside}
        embed = jnp.zeros(checkpoint.shape(f"{names.embed}.weight"), dtype)
        head = None if checkpoint.config.tie_embeddings else embed.T
        outer = {
            n: jnp.zeros(checkpoint.shape(n), dtype)
            for n in (f"{names.norm}.bias", f"{names.positions}.weight")
            if n in checkpoint.names()
        }
        model = Decoder(
            checkpoint.config,
            embed,
            [weights],
            embed[0],
            head,
            outer.get(f"{names.norm}.bias"),
            outer.get(f"{names.positions}.weight"),
        )
        if not full:
            specs = choose_adapters(run.lora, model.linears())
            attach(
                model,
                specs,
                jax.random.key(0),
                dtype=jnp.dtype(run.lora.dtype),
                variant=run.lora.variant,
                freeze_a=run.lora.freeze_a,
            )
        graph, *states = trees.split(model, run.method)
        graphs.append(graph)
        return states

    states = jax.eval_shape(make)
    return graphs[0], *states


def part_of(path: str) -> str:
    """Returns the ledger's part to which a leaf of a real tree belongs."""
    ends = {
        "embed": "embeddings",
        "positions": "embeddings",
        "head": "head",
        "adapter.a": "adapters",
        "adapter.b": "adapters",
        "adapter.magnitude": "adapters",
        "adapter.scale": "adapter scales",
        "adapter.norm": "adapter scales",
        "norm.weight": "norms and biases",
        "bias": "norms and biases",
        "codes": "codes",
        "scales": "scales",
        "nested": "nested scales and codebooks",
        "offset": "nested scales and codebooks",
        "codebook": "nested scales and codebooks",
        ".weight": "linears",
    }
    return next(part for end, part in ends.items() if path.endswith(end))


@pytest.mark.parametrize(
    ("build", "name", "changes"),
    [
        (loaded, "llama", {"lora__dtype": "bfloat16", "optimizer__offload": "host"}),
        (loaded, "llama", {"method": "full", "lora__dropout": 0.1}),
        (loaded, "qwen2", {"quant__codebook": "fp4_bnb", "lora__target_modules": ["q_proj"]}),
        (abstract, "qwen2", {"method": "full", "optimizer__offload": "host"}),
        (abstract, "mistral", {"lora__rank_pattern": {"1.self_attn.q_proj": 9, "down_proj": 2}}),
        (abstract, "qwen2", {"method": "full", "optimizer__moments": "int8"}),
        (abstract, "mistral", {"quant__double_quant": False, "quant__block_size": 32}),
        (abstract, "qwen2_window", {"quant__nested_block": 7, "quant__block_size": 128}),
        (abstract, "llama_rope_linear_biases", {"lora__target_modules": r".*\.0\..*"}),
        pytest.param(
            abstract,
            "llama",
            {"method": "lora", "train__gradient_accumulation": 1},
            marks=pytest.mark.slow,
        ),
        pytest.param(loaded, "opt", {"method": "full"}, marks=pytest.mark.slow),
        pytest.param(
            abstract,
            "gpt_neox",
            {"lora__target_modules": ["query_key_value"]},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            abstract, "gemma3", {"lora__rank_pattern": {"q_proj": 2}}, marks=pytest.mark.slow
        ),
        pytest.param(abstract, "phi3", {"method": "lora"}, marks=pytest.mark.slow),
        pytest.param(
            abstract,
            "qwen2",
            {"lora__variant": "dora", "lora__dtype": "bfloat16"},
            marks=pytest.mark.slow,
        ),
        (abstract, "llama", {"lora__freeze_a": True, "optimizer__moments": "int8"}),
    ],
)
@pytest.mark.quick
def test_what_a_step_takes_is_exact(
    build: Callable[..., Any], name: str, changes: dict[str, Any]
) -> None:
    run = config(**changes)
    checkpoint = open_folder(MODELS / name)
    _, trained, frozen = build(name, run)
    expected: dict[str, int] = {}
    for tree in (trained, frozen):
        for path, leaf in trees.flatten(tree).items():
            expected[part_of(path)] = expected.get(part_of(path), 0) + nbytes(leaf)

    optimizer = adamw(run.optimizer, run.train.step_count)
    state = jax.eval_shape(lambda t: init_state(t, optimizer, False), trained)
    count = run.train.batch_size * run.train.gradient_accumulation
    rows = fill([], [], run.data.sequence_length, count)
    key = [jax.random.key_data(jax.random.key(0))] if changes.get("lora__dropout") else []
    key = [] if run.method == "full" else key
    expected["batch"] = nbytes(rows)
    counters = nbytes((state.step, state.scale, state.finite_steps, key))
    host = run.optimizer.offload == "host"

    found = ledger(checkpoint.config, run)
    exact = {name: part for name, part in found.items() if part.exact}
    moments = exact.pop("moments on the host" if host else "moments")
    assert moments.place == ("host" if host else "device")
    assert moments.nbytes + exact.pop("counters").nbytes == nbytes(state.optimizer) + counters
    gradients = exact.pop("gradients").nbytes
    widths = {"bfloat16": 2, "float32": 4}
    accumulated = run.train.gradient_accumulation > 1
    assert gradients == sum(
        (4 if accumulated else widths[str(x.dtype)]) * x.size for x in jax.tree.leaves(trained)
    )
    assert {name: part.nbytes for name, part in exact.items()} == expected
    assert {part.place for part in exact.values()} == {"device"}


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "opt"])
@pytest.mark.quick
def test_a_plans_model_has_the_tree_of_the_real_one(name: str) -> None:
    run = config(method="lora")
    _, *real = loaded(name, run)
    _, *planned = abstract_model(run, open_folder(MODELS / name).config, None)
    for ours, expected in zip(planned, real):
        found = {path: (x.shape, x.dtype) for path, x in trees.flatten(ours).items()}
        assert found == {p: (x.shape, x.dtype) for p, x in trees.flatten(expected).items()}


def test_gradients_are_what_the_program_gives() -> None:
    run = config()
    graph, trained, frozen = abstract("llama", run)
    optimizer = adamw(run.optimizer, 10)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.bfloat16,
        remat="full",
        clip_norm=1.0,
        method="qlora",
    )
    batch = {n: x.reshape(3, ROWS, LENGTH) for n, x in fill([], [], LENGTH, 3 * ROWS).items()}
    state = jax.eval_shape(lambda t: init_state(t, optimizer, False), trained)
    grads, _ = jax.eval_shape(program.gradient, state, frozen, batch, None)
    model = open_folder(MODELS / "llama").config
    assert ledger(model, run)["gradients"].nbytes == nbytes(grads)


@given(
    k=st.integers(1, 700),
    n=st.integers(1, 300),
    layers=st.integers(1, 4),
    block=st.sampled_from([32, 64, 128, 4096]),
    nested=st.integers(1, 300),
    double=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_a_quantized_stack(k, n, layers, block, nested, double) -> None:
    weight = jax.ShapeDtypeStruct((layers, k, n), jnp.float32)
    real = jax.eval_shape(lambda w: quantize(w, "nf4", block, double, nested), weight)
    blocks, groups = -(-k // block), -(-k // 64)
    more = -(-blocks * n // nested) + 1 if double else 0
    found = by_part(nnx.State({"weight": Weight(real)}))
    assert {part: size for part, size in found.items() if size} == {
        "codes": layers * groups * 32 * n,
        "scales": layers * blocks * n * (1 if double else 4),
        "nested scales and codebooks": layers * 4 * (more + 16),
    }


@pytest.mark.parametrize("remat", mostly_slow(["none", "dots", "full"], "dots"))
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("mistral", {}),
        ("qwen2_window", {"method": "lora"}),
        ("olmo2", {}),
        ("gemma3", {}),
        ("phi3", {}),
        ("gpt_neox", {}),
        ("opt", {}),
        ("mistral", {"lora__variant": "dora"}),
    ],
)
def test_activations_are_what_jax_saves(name: str, changes: dict[str, Any], remat: str) -> None:
    run = config(**changes, model__remat=remat)
    graph, trained, frozen = abstract(name, run)
    tokens = jnp.ones((ROWS, LENGTH), jnp.int32)

    def saved(trained: Any, frozen: Any) -> list[jax.Array]:
        def hidden(trained: Any) -> jax.Array:
            model: Decoder = nnx.merge(graph, trained, frozen)
            return model.hidden(tokens, tokens, tokens, dtype=jnp.bfloat16, remat=remat)

        return jax.tree.leaves(jax.vjp(hidden, trained)[1])

    model = open_folder(MODELS / name).config
    stacked = (model.num_layers, ROWS)
    arrays = [
        x
        for x in jax.eval_shape(saved, trained, frozen)
        if (x.shape[:1] == (ROWS,) or x.shape[:2] == stacked) and x.dtype != jnp.int32
    ]
    assert len(arrays) >= 4
    assert ledger(model, run)["activations"].nbytes == nbytes(arrays)


def test_moments_in_fewer_bits() -> None:
    def moments(rows: int, **changes: str) -> int:
        stack = LoraParam(jax.ShapeDtypeStruct((3, rows, 5), jnp.float32))
        trained = nnx.State({"runs": {0: {"q_proj": {"adapter": {"a": stack}}}}})
        return optimizer_bytes(trained, config(**changes))[0]

    dtypes = ("float32", "bfloat16", "int8")
    sizes = {dtype: moments(1000, optimizer__moments=dtype) for dtype in dtypes}
    once = {"float32": 60000, "bfloat16": 30000, "int8": 3 * (5000 + 4 * 20)}
    assert sizes == {dtype: 2 * size for dtype, size in once.items()}
    assert moments(819, optimizer__moments="int8") == 2 * 3 * 4 * 4095
    assert moments(1000) == 2 * 60000


def test_estimates_follow_what_they_depend_on() -> None:
    model = find("llama-7b")

    def part(name: str, **changes: Any) -> int:
        found = ledger(model, config(lora__rank=64, train__batch_size=1, **changes))
        return found[name].nbytes if name in found else 0

    linears = 4 * 4096**2 + 3 * 4096 * 11008
    assert part("decoded weights") == 2 * linears
    assert part("decoded weights", model__compute_dtype="float32") == 4 * linears
    assert part("decoded weights", kernels__materialize="never") == 0
    assert part("decoded weights", method="lora") == 0
    assert part("decoded weights", method="lora", model__storage_dtype="float32") == 2 * linears
    long, longer = (part("layer's working set", data__sequence_length=n) for n in (4096, 8192))
    assert longer <= 2 * long  # linear: no [length, length] scores
    one = {"train__gradient_accumulation": 1}
    assert part("gradients of a micro-batch", **one) == 0
    assert part("gradients of a micro-batch", lora__dtype="bfloat16") == 2 * 159_907_840
    assert part("loss", data__sequence_length=4096) > part("loss")
    # The gradient of a trained head is summed in float32.
    full = part("loss", method="full") - part("loss")
    assert full == 4 * 32000 * 4096
    assert part("activations", lora__dropout=0.1, model__remat="none") > part(
        "activations", model__remat="none"
    )


def test_llama_7b_by_hand() -> None:
    """The reference is the QLoRA paper's storage (section 3, appendix G): rank 64, all linears."""
    run = config(lora__rank=64, lora__dtype="bfloat16", train__gradient_accumulation=1)
    parts = ledger(find("llama-7b"), run)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    adapters = 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert adapters == 159_907_840
    assert parts["codes"].nbytes == linears // 2
    assert parts["scales"].nbytes == linears // 64
    nested = linears / 64 / 256 * 4 + 32 * 7 * (4 + 64)
    assert parts["nested scales and codebooks"].nbytes == nested
    stored = sum(parts[n].nbytes for n in ("codes", "scales", "nested scales and codebooks"))
    assert 8 * stored / linears == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert parts["adapters"].nbytes == parts["gradients"].nbytes == 2 * adapters
    assert parts["moments"].nbytes == 8 * adapters


def test_totals() -> None:
    model = find("llama-65b")
    device = ledger(model, config(lora__rank=64))
    host = ledger(model, config(lora__rank=64, optimizer__offload="host"))
    assert total(device, "host") == 0
    assert total(host, "host") == device["moments"].nbytes
    assert total(device) - total(host) == device["moments"].nbytes
    assert total(device, exact=True) + total(device, exact=False) == total(device)
    assert ledger(model, config(lora__rank=64, optimizer__offload="auto")) == device


def test_adapters_that_match_nothing() -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules .* matches no linear"):
        ledger(find("llama-7b"), config(lora__target_modules=["query"]))


def test_parameters_and_text() -> None:
    assert parameters(find("smollm2-135m")) == 134_515_008
    assert text(12 * 65_285_660_672) == "783.428 GB (729.624 GiB)"
    assert text(2**40) == "1,099.512 GB (1,024.000 GiB)"
    assert math.isclose(float(text(5e9).split()[0]), 5.0)
