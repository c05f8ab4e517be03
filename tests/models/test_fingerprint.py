"""The hash of the base: its definition, and the changes that affect it or do not."""

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from selection import mostly_slow

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats import load as loading
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.lora import choose_adapters
from qlora_jax.models import fingerprint, trees
from qlora_jax.models.decoder import attach
from qlora_jax.quant.dynamic8 import dynamic_map
from qlora_jax.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
GOLDEN = "2:11c6db3ef37261cf27df2c5f5173ae9f13e7fa510a54c450d8237553d62132c7"
"""Hash of the reference llama's file. If it changes, every earlier run has another base."""


def mix(x):
    """Computes MurmurHash3's fmix32 on Python integers or NumPy uint64."""
    x = x ^ x >> 16
    x = x * 0x85EBCA6B % 2**32
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def expected_hash(parameters):
    """Computes the hash by its definition in NumPy, from the checkpoint's arrays by name."""
    text = "base 2\n"
    for name in sorted(parameters):
        number = np.ascontiguousarray(parameters[name].astype(np.float32))
        number[np.abs(number) < 2.0**-126] = 0.0
        bits = np.atleast_2d(number).view(np.uint32).astype(np.uint64)
        r, c = (np.arange(n, dtype=np.uint64) for n in bits.shape)
        lanes = [
            int(mix(bits ^ (mix(r + row)[:, None] + mix(c + column)) % 2**32).sum()) % 2**32
            for row, column in [
                (0x9E3779B9, 0x7F4A7C15),
                (0xBF58476D, 0x1CE4E5B9),
                (0x94D049BB, 0x133111EB),
                (0xD6E8FEB8, 0x6659FD93),
            ]
        ]
        shape = "x".join(map(str, number.shape))
        text += f"{name} {shape} " + "".join(f"{lane:08x}" for lane in lanes) + "\n"
    return "2:" + hashlib.sha256(text.encode()).hexdigest()


def decoded(q, layer):
    """Decodes one layer of a QTensor, element by element, from its invariants: f32[in, out]."""
    part = {f.name: getattr(q, f.name) for f in dataclasses.fields(q)}
    codes, scales, nested, offset, book = (
        None if part[name] is None else np.asarray(part[name])[layer]
        for name in ("codes", "scales", "nested", "offset", "codebook")
    )
    k, n = np.indices((q.in_features, codes.shape[1]))
    byte = codes[k // 64 * 32 + k % 32, n]
    code = np.where(k % 64 >= 32, byte >> 4, byte & 15)
    block = k // q.block_size
    scale = scales[block, n]
    if nested is not None:
        outer = nested[(n * scales.shape[0] + block) // q.nested_block]
        scale = np.asarray(dynamic_map())[scale] * outer + offset
    return book[code] * scale


def as_stored(source, model):
    """Returns every parameter by name: the file's, or decoded in NumPy if it is quantized."""
    found = {name: source.read(name) for name in source.names()}
    for path, linear, layer in model.walk():
        found[f"{path}.weight"] = decoded(linear.weight.get_value(), layer).T
    return found


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "opt"])
@pytest.mark.quick
def test_it_is_that_of_the_files_numbers(models, kind):
    source = open_folder(models / kind)
    found = fingerprint.base_hash(load_model(source, quant=None, dtype=jnp.float32), "lora")
    assert found == expected_hash({name: source.read(name) for name in source.names()})
    if kind == "llama":
        assert found == GOLDEN


@pytest.mark.parametrize("dtype", mostly_slow([ml_dtypes.bfloat16, np.float16], ml_dtypes.bfloat16))
@pytest.mark.quick
def test_a_dtype_counts_by_the_numbers_it_holds(models, dtype):
    source = open_folder(models / "llama")
    model = load_model(source, quant=None, dtype=dtype)
    rounded = {name: source.read(name).astype(dtype) for name in source.names()}
    found = fingerprint.base_hash(model, "lora")
    assert found == expected_hash(rounded)
    graph, state = nnx.split(model)
    wide = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.float32), state))
    assert fingerprint.base_hash(wide, "lora") == found


@pytest.mark.parametrize(
    "quant",
    [
        QuantConfig(),
        *(
            pytest.param(quant, marks=pytest.mark.slow)
            for quant in (
                QuantConfig(codebook="fp4_bnb", double_quant=False, block_size=32),
                QuantConfig(codebook="int4", nested_block=64, block_size=128),
            )
        ),
    ],
    ids=lambda quant: quant.codebook,
)
@pytest.mark.quick
def test_a_quantized_weight_counts_by_its_decoded_numbers(models, quant):
    source = open_folder(models / "llama")
    model = load_model(source, quant=quant, dtype=jnp.float32)
    assert fingerprint.base_hash(model, "qlora") == expected_hash(as_stored(source, model))


@pytest.mark.quick
def test_stacks_do_not_matter_nor_do_adapters(models, monkeypatch):
    source = open_folder(models / "llama")
    model = load_model(source, quant=QuantConfig(), dtype=jnp.float32)
    found = fingerprint.base_hash(model, "qlora")
    monkeypatch.setattr(loading, "_stacks", lambda c: ([(0, 0), (0, 1), (1, 0)], [2, 1]))
    parts = load_model(source, quant=QuantConfig(), dtype=jnp.float32)
    assert len(parts.runs) == 2
    assert fingerprint.base_hash(parts, "qlora") == found
    specs = choose_adapters(LoraConfig(rank=3), model.linears())
    attach(model, specs, jax.random.key(0), freeze_a=True)
    assert fingerprint.base_hash(model, "qlora") == found
    assert fingerprint.like("1:", parts, "qlora") != fingerprint.like("1:", model, "qlora")


def up_proj(model):
    return model.runs[0].linears()["mlp.up_proj"].weight


@pytest.mark.parametrize("version", mostly_slow(fingerprint.VERSIONS, "2"))
def test_one_flipped_code_is_found(open_model, version):
    model = open_model("llama", QuantConfig())
    before = fingerprint.like(f"{version}:", model, "qlora")
    weight = up_proj(model)
    q = weight.get_value()
    weight.set_value(dataclasses.replace(q, codes=q.codes.at[1, 3, 5].set(q.codes[1, 3, 5] ^ 16)))
    after = fingerprint.like(before, model, "qlora")
    assert after != before
    assert after.startswith(f"{version}:")


@pytest.mark.slow
def test_an_order_that_changes_is_found(open_model):
    model = open_model("llama")
    variable, seen = up_proj(model), {fingerprint.base_hash(model, "lora")}
    w = variable.get_value()

    def swapped(x, axis):
        return jnp.swapaxes(
            jnp.swapaxes(x, 0, axis)[jnp.array([1, 0, *range(2, x.shape[axis])])], 0, axis
        )

    two = w.at[0, 0, 0].set(w[0, 7, 9]).at[0, 7, 9].set(w[0, 0, 0])
    changes = [*(swapped(w, axis) for axis in range(3)), two, w[:, ::-1], w[:, :, ::-1], -w]
    for changed in changes:
        variable.set_value(changed)
        seen.add(fingerprint.base_hash(model, "lora"))
    variable.set_value(w)
    square = model.runs[0].linears()["self_attn.q_proj"].weight
    square.set_value(square.get_value().swapaxes(1, 2))
    seen.add(fingerprint.base_hash(model, "lora"))
    assert len(seen) == len(changes) + 2


def test_two_parameters_that_change_places_are_found(open_model):
    model = open_model("llama")
    before = fingerprint.base_hash(model, "lora")
    gate, up = (model.runs[0].linears()[f"mlp.{name}_proj"].weight for name in ("gate", "up"))
    first, second = gate.get_value(), up.get_value()
    gate.set_value(second)
    up.set_value(first)
    assert fingerprint.base_hash(model, "lora") != before


def test_numbers_that_some_devices_flush_are_zero(open_model):
    model = open_model("llama")
    first = np.asarray(model.embed.get_value())

    def hash_with(*numbers):
        embed = first.copy()
        embed[0, : len(numbers)] = numbers
        model.embed.set_value(jnp.asarray(embed))
        return fingerprint.base_hash(model, "lora")

    zero = hash_with(0.0, 0.0, 0.0)
    assert hash_with(-0.0, 1e-39, -1e-45) == zero
    smallest = np.finfo(np.float32).tiny
    assert len({zero, *(hash_with(x, 0.0, 0.0) for x in (smallest, -smallest))}) == 3


def test_only_the_sums_are_copied_to_the_host(open_model, monkeypatch):
    model = open_model("llama", QuantConfig())
    graph, state = nnx.split(model)
    # traced values cannot be copied to the host, so `sums` copies nothing
    abstract = jax.eval_shape(
        lambda tree: [layers for _, layers in fingerprint.sums(nnx.merge(graph, tree))], state
    )
    assert {(x.shape, x.dtype.name) for x in jax.tree.leaves(abstract)} == {((4,), "uint32")}
    fetched = []
    get = jax.device_get

    def fetch(tree):
        fetched.extend(jax.tree.leaves(tree))
        return get(tree)

    monkeypatch.setattr(jax, "device_get", fetch)
    fingerprint.base_hash(model, "qlora")
    names = [name for part in fingerprint.stored(model) for name in part.names]
    assert len(fetched) == len(names) == 3 + 3 * 9
    assert sum(x.size for x in fetched) == 4 * len(names)


def test_an_unknown_version_is_refused(open_model):
    with pytest.raises(UserError, match=r"3:ab: version 3 is not known, only 1, 2"):
        fingerprint.like("3:ab", open_model("llama"), "lora")


def test_version_1_is_of_the_tree_that_is_not_trained(open_model):
    model = open_model("llama")
    attach(model, choose_adapters(LoraConfig(rank=3), model.linears()), jax.random.key(0))
    _, trained, frozen = trees.split(model, "lora")
    assert fingerprint.like("1:ab", model, "lora") == f"1:{trees.sha256(frozen)}"
    _, trained, _ = trees.split(open_model("llama"), "full")
    assert fingerprint.like("1:ab", open_model("llama"), "full") == f"1:{trees.sha256(trained)}"


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pathlib import Path
from qlora_jax.config import QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.models import fingerprint

assert len(jax.devices()) == 2
mesh = Mesh(np.array(jax.devices()), ("x",))
source = open_folder(Path("tests/golden/models/llama"))
model = load_model(source, quant=QuantConfig(), dtype="bfloat16")
print(fingerprint.base_hash(model, "qlora"))
graph, state = nnx.split(model)
for axis in (-1, -2):
    def shard(x):
        if x.ndim < -axis or x.shape[axis] % 2:
            return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        spec = [None] * x.ndim
        spec[axis] = "x"
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
    sharded = jax.tree.map(shard, state)
    parts = sum(not x.is_fully_replicated for x in jax.tree.leaves(sharded))
    print(fingerprint.base_hash(nnx.merge(graph, sharded), "qlora"), parts)
"""


@pytest.mark.slow
def test_shards_do_not_matter():
    environment = {
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", SHARDED],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    whole, *sharded = done.stdout.splitlines()
    assert len(sharded) == 2
    for line in sharded:
        found, parts = line.split()
        assert found == whole
        assert int(parts) > 9
