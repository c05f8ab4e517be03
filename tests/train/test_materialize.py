"""`kernels.materialize: never`: the compiled gradient step holds no dequantized weight.

Run as a script with the names of a GPU and of an implementation, it compiles the step for that GPU
with each remat policy, and prints the weights, code copies and kernel calls found as JSON.
"""

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.config import Config, LoraConfig, from_tree
from qlora_jax.gpu.compile import NO_SPILLS, compile_for, environment, has_plugin
from qlora_jax.gpu.hlo import weight_shaped
from qlora_jax.kernels import select, triton
from qlora_jax.kernels.select import FUSED, choose_kernel, trusted_kernel
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.config import DecoderConfig, Rope
from qlora_jax.models.decoder import Decoder, attach, use_kernel
from qlora_jax.quant import quantize
from qlora_jax.runtime.errors import RunFailed, UserError
from qlora_jax.train import step as steps
from qlora_jax.train.state import init_state

pytestmark = pytest.mark.slow

LAYERS, HIDDEN, FEED, VOCAB = 3, 192, 320, 128
ROWS, LENGTH = 2, 41
"""82 rows are more than a tile; no activation has as many elements as a weight or its stack."""

POLICIES = ("none", "full")
"""Keys of `decoder.REMAT`: without and with a second forward pass."""

LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, FEED),
    "mlp.up_proj": (HIDDEN, FEED),
    "mlp.down_proj": (FEED, HIDDEN),
}


def model(implementation: str | None) -> Decoder:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=shape) / 16, jnp.bfloat16)

    config = DecoderConfig(
        family="llama",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FEED,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=2,
        head_dim=HIDDEN // 4,
        max_positions=64,
        norm_eps=1e-5,
        rope=Rope(),
        tie_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        windows=(None,) * LAYERS,
    )
    weights: dict[str, Any] = {
        f"{path}.weight": quantize(normal(LAYERS, *shape)) for path, shape in LINEARS.items()
    }
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    weights |= {name: jnp.ones((LAYERS, HIDDEN), jnp.bfloat16) for name in norms}
    built = Decoder(config, normal(VOCAB, HIDDEN), [weights], normal(HIDDEN), normal(HIDDEN, VOCAB))
    attach(built, choose_adapters(LoraConfig(rank=4), built.linears()), jax.random.key(0))
    use_kernel(built, implementation)
    return built


def step_hlo(
    compiled: Callable[..., jax.stages.Compiled], implementation: str | None, remat: str
) -> str:
    """Returns the HLO of a bfloat16 QLoRA gradient program, made by `compiled(function, *args)`."""
    graph, trained, frozen = trees.split(model(implementation), "qlora")
    program = steps.build(
        graph,
        optax.sgd(1.0),
        compute_dtype=jnp.bfloat16,
        remat=remat,
        clip_norm=1.0,
        method="qlora",
    )
    state = init_state(trained, optax.sgd(1.0), False)
    tokens = jnp.ones((1, ROWS, LENGTH), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), tokens)
    batch |= {"mask": tokens > 0}

    def gradient(state: Any, frozen: Any, batch: Any) -> Any:
        return program.gradient(state, frozen, batch, None)

    text = compiled(gradient, state, frozen, batch).as_text()
    assert text is not None
    return text


def on_cpu(function: Callable[..., Any], *arguments: Any) -> jax.stages.Compiled:
    return jax.jit(function).lower(*arguments).compile()


find = functools.partial(weight_shaped, shapes=set(LINEARS.values()), layers=LAYERS)

WHOLE = {(k // 2, n) for k, n in LINEARS.values() if n % 64 == 0}
"""Shapes of one layer's codes, for linears whose codes need no padding (padding copies them)."""

find_copies = functools.partial(weight_shaped, shapes=WHOLE, dtypes=("u8",))


@pytest.mark.parametrize("remat", POLICIES)
def test_the_step_on_a_cpu_in_interpret_mode(monkeypatch: pytest.MonkeyPatch, remat: str) -> None:
    monkeypatch.setattr(triton, "INTERPRET", True)
    assert find(step_hlo(on_cpu, "triton", remat)) == []


def test_the_detector_finds_decoded_weights() -> None:
    """Shows that an empty list of the other tests means that no weight is there."""
    found = find(step_hlo(on_cpu, "xla", "full"))
    sizes = {
        np.prod([int(d) for d in buffer.partition("[")[2][:-1].split(",")]) for buffer in found
    }
    assert {k * n for k, n in LINEARS.values()} <= sizes


@pytest.mark.skipif(not has_plugin(), reason="compile-only GPU packages absent: make gpu-check")
@pytest.mark.parametrize("implementation", FUSED)
def test_the_step_compiled_for_an_a100(implementation: str) -> None:
    if jax.__version_info__[:2] < FUSED[implementation].jax:
        pytest.skip(f"{implementation} needs a later jax")
    done = subprocess.run(
        [sys.executable, __file__, "a100", implementation],
        env=environment(NO_SPILLS) | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["decode first"][0], "the detector finds nothing at all"
    assert seen["decode first"][1] == []
    for remat in POLICIES:
        buffers, copies, kernels = seen[remat]
        assert buffers == [], remat
        assert (copies == []) == FUSED[implementation].stacks, remat
        # forward, backward and recomputed products; the last of a layer needs no recomputation
        assert kernels >= (3 * len(LINEARS) - 1 if remat == "full" else 2 * len(LINEARS)), remat


def config(method: str = "qlora", compute: str = "bfloat16", **kernels: str) -> Config:
    tree = {
        "model": {"path": "m", "compute_dtype": compute},
        "data": "d",
        "output": "o",
        "method": method,
        "kernels": kernels,
    }
    return from_tree({**tree, "data": {"source": "d"}}, "test")


class Gpu:
    device_kind, compute_capability = "NVIDIA A10", "8.6"


class Old:
    device_kind, compute_capability = "Tesla T4", "7.5"


CPU = jax.devices("cpu")[0]


@pytest.mark.parametrize(
    ("device", "kernels", "expected"),
    [
        (CPU, {}, None),
        (Gpu, {}, None),
        (CPU, {"implementation": "xla"}, "xla"),
        (Gpu, {"implementation": "triton"}, "triton"),
        (Gpu, {"implementation": "triton", "materialize": "never"}, "triton"),
        (CPU, {"materialize": "never", "method": "lora"}, None),
    ],
)
def test_which_kernel_a_config_gets(device: Any, kernels: dict[str, str], expected: str) -> None:
    assert choose_kernel(config(**kernels), device) == expected


def test_never_takes_a_kernel_that_runs_there() -> None:
    assert choose_kernel(config(materialize="never"), Gpu) in FUSED  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "kernels", "expected"),
    [
        (CPU, {"materialize": "never"}, r"kernels.materialize never: .* cpu in bfloat16.*to auto"),
        (Old, {"materialize": "never", "compute": "float16"}, "runs on Tesla T4 in float16"),
        (CPU, {"implementation": "triton"}, "kernels.implementation triton: .*; remove it"),
        (
            Gpu,
            {"implementation": "xla", "materialize": "never"},
            "kernels.implementation xla decodes whole weights.*set materialize to auto",
        ),
    ],
)
def test_what_cannot_be(device: Any, kernels: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        choose_kernel(config(**kernels), device)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_is_wrong_on_the_device_is_not_used(monkeypatch) -> None:
    tried, said = [], []
    monkeypatch.setattr(select, "usable", lambda capability, dtype: ["mosaic", "triton"])
    monkeypatch.setattr(select, "agrees", lambda name, dtype: tried.append(name))
    assert trusted_kernel(config(), Gpu, said.append) == "xla"  # type: ignore[arg-type]
    (line,) = said
    assert line.startswith("warning: kernel mosaic gives wrong products on NVIDIA A10")
    with pytest.raises(RunFailed, match="to xla, and please report"):
        trusted_kernel(config(implementation="triton"), Gpu, said.append)  # type: ignore[arg-type]
    monkeypatch.setattr(select, "agrees", lambda name, dtype: True)
    assert trusted_kernel(config(), Gpu, said.append) is None  # type: ignore[arg-type]
    assert said == [line]


def test_a_kernel_that_is_never_picked_is_not_tried(monkeypatch) -> None:
    tried: list[str] = []
    monkeypatch.setattr(select, "usable", lambda capability, dtype: ["mosaic", "triton"])
    monkeypatch.setattr(select, "agrees", lambda name, dtype: tried.append(name) or True)
    assert trusted_kernel(config(), Gpu, print) is None  # type: ignore[arg-type]
    assert tried == ["mosaic"]


def test_nothing_is_tried_where_no_kernel_runs(monkeypatch) -> None:
    monkeypatch.setattr(select, "agrees", None)
    assert trusted_kernel(config(), CPU, print) is None
    assert trusted_kernel(config(implementation="xla"), Gpu, print) == "xla"  # type: ignore[arg-type]
    assert trusted_kernel(config(method="lora"), Gpu, print) is None  # type: ignore[arg-type]


def main(gpu: str, implementation: str) -> None:
    # jax 0.10 cannot fuse plain products of these odd sizes; merged products would hide a
    # weight's shape
    options = {"xla_gpu_enable_triton_gemm": False, "xla_disable_hlo_passes": "dot-merger"}
    compiled = functools.partial(compile_for, gpu, options=options)
    first = step_hlo(compiled, "xla", "full")
    seen: dict[str, Any] = {"decode first": (find(first), find_copies(first))}
    for remat in POLICIES:
        text = step_hlo(compiled, implementation, remat)
        seen[remat] = find(text), find_copies(text), text.count(FUSED[implementation].target)
    print(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
