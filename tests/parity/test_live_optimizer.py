"""Compares our 8-bit AdamW with the installed bitsandbytes' on a CPU, step by step.

bitsandbytes has two rules to find the nearest code. Its CPU kernel looks it up in a table of 65536
steps of [-1, 1]. Its kernel for any device compares with the midpoints between the map's values,
as our code does.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pairs import REASON, torch

from qlora_jax.config import OptimizerConfig
from qlora_jax.lora.variables import Weight
from qlora_jax.train.optimizer import adamw

bitsandbytes = pytest.importorskip("bitsandbytes", reason=REASON)
pytestmark = pytest.mark.parity

SHAPE = (90, 97)
STEPS = 6
CONFIG = OptimizerConfig(
    learning_rate=0.01, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.1, moments="int8"
)


def nearest(
    x: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, codes: torch.Tensor, block: int
) -> None:
    """Replaces the CPU kernel with bitsandbytes' kernel for any device."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)
    quantize = torch.ops.bitsandbytes.quantize_blockwise.default
    for target, value in zip((codes, absmax), quantize.redispatch(keys, x, code, block)):
        target.copy_(value)


def gradient(step: int, decades: float) -> np.ndarray:
    """Returns a gradient with random signs; magnitudes span `decades` and change little by step."""
    size = 10 ** np.random.default_rng(0).uniform(-decades, 0, SHAPE)
    random = np.random.default_rng(step + 1)
    return (size * random.uniform(0.5, 1, SHAPE) * random.choice([-1, 1], SHAPE)).astype(np.float32)


def theirs(start: np.ndarray, decades: float):
    weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = bitsandbytes.optim.AdamW8bit(
        [weight],
        lr=CONFIG.learning_rate,
        betas=(CONFIG.beta1, CONFIG.beta2),
        eps=CONFIG.epsilon,
        weight_decay=CONFIG.weight_decay,
    )
    for step in range(STEPS):
        weight.grad = torch.from_numpy(gradient(step, decades))
        optimizer.step()
        state = {key: x.numpy() for key, x in optimizer.state[weight].items() if key != "step"}
        yield weight.detach().numpy(), *((state[f"state{i}"], state[f"absmax{i}"]) for i in (1, 2))


def ours(start: np.ndarray, decades: float):
    optimizer = adamw(CONFIG, STEPS)
    params = {"weight": Weight(jnp.asarray(start))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(STEPS):
        grads = {"weight": Weight(jnp.asarray(gradient(step, decades)))}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        adam = state.inner_states["matrix"].inner_state[0]
        moments = adam.mu["weight"].get_value(), adam.nu["weight"].get_value()
        yield params["weight"].get_value(), *((np.asarray(q.codes), q.absmax) for q in moments)


def both(decades: float):
    start = np.random.default_rng(9).normal(size=SHAPE).astype(np.float32)
    return zip(ours(start, decades), theirs(start, decades), strict=True)


@pytest.mark.parametrize("decades", [0.3, 3])
def test_codes_and_weights_are_theirs(monkeypatch, decades: float) -> None:
    """Few codes may differ: float32 rounding decides between two equally near values of the map."""
    kernels = bitsandbytes.backends.cpu.ops
    monkeypatch.setattr(kernels, "_quant_blockwise_fp32_direct", nearest)
    for (weight, *moments), (their_weight, *their_moments) in both(decades):
        off = np.abs(weight - their_weight) / CONFIG.learning_rate
        assert np.quantile(off, 0.999) < 2e-4
        for (codes, absmax), (their_codes, their_absmax) in zip(moments, their_moments):
            assert (codes != their_codes).mean() < 1e-3
            np.testing.assert_allclose(absmax, their_absmax, rtol=1e-6)


def test_their_cpu_kernel_stays_beside_us_while_gradients_are_alike() -> None:
    """The table is coarse only far below a block's absmax; these gradients span a factor of 2."""
    for (weight, *moments), (their_weight, *their_moments) in both(decades=0.3):
        off = np.abs(weight - their_weight) / CONFIG.learning_rate
        assert np.quantile(off, 0.99) < 0.02
        for (codes, absmax), (their_codes, their_absmax) in zip(moments, their_moments):
            assert (codes != their_codes).mean() < 0.02
            np.testing.assert_allclose(absmax, their_absmax, rtol=0.01)
