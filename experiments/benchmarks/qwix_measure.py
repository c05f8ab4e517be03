"""Measures tunix's Gemma 3 in 4 bits by each library: bytes, times and errors."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.benchmarks.qwix_sides import (
    SHAPES,
    SIDES,
    Stored,
    bits,
    code_of,
    gemma3,
    stored,
)

ROWS, RATE = 4, 0.01

Batch = tuple[jax.Array, jax.Array, None, jax.Array]


class Figures(NamedTuple):
    """The figures of one library, all from one run.

    Attributes:
      code: lines and statements of the user's code.
      quantized: number of weights in 4 bits.
      nbytes: bytes of their arrays by numpy's `nbytes`, which counts a byte for each uint4.
      packed: bytes of their arrays with two uint4 in a byte.
      device: bytes of their arrays on the device.
      trained: number of elements of A and B.
      trained_dtype: dtype of A and B.
      trained_bytes: bytes of A, B and Adam's moments.
      arguments: bytes of the compiled step's arguments.
      temporaries: bytes that the compiled step allocates while it runs.
      step: median seconds of a step.
      forward: median seconds of a forward pass.
      weights: error of the quantized weights, relative root mean square.
      logits: error of the logits before training, relative root mean square.
      before: loss of the first step.
      after: loss of the last step.
    """

    code: tuple[int, int]
    quantized: int
    nbytes: int
    packed: int
    device: int
    trained: int
    trained_dtype: str
    trained_bytes: int
    arguments: int
    temporaries: int
    step: float
    forward: float
    weights: float
    logits: float
    before: float
    after: float


def batch(vocabulary: int, length: int) -> Batch:
    """Returns random tokens [ROWS, length], their positions, no cache and a causal mask."""
    tokens = jax.random.randint(jax.random.key(7), (ROWS, length), 1, vocabulary)
    positions = jnp.broadcast_to(jnp.arange(length), (ROWS, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (ROWS, length, length))
    return tokens, positions, None, mask


class Programs:
    """The compiled programs of one side and their arrays; `step` trains."""

    def __init__(self, model: Any, inputs: Batch):
        graph, *states = nnx.split(model, nnx.LoRAParam, ...)
        self.trained: Any = states[0]
        self.frozen: Any = states[1]
        optimizer = optax.adam(RATE)
        self.state: Any = optimizer.init(self.trained)
        tokens = inputs[0]

        def logits(trained: Any, frozen: Any) -> jax.Array:
            return nnx.merge(graph, trained, frozen, copy=True)(*inputs)[0]

        def loss(trained: Any, frozen: Any) -> jax.Array:
            rows = logits(trained, frozen)[:, :-1].astype(jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(rows, tokens[:, 1:]).mean()

        def step(trained: Any, state: Any, frozen: Any) -> Any:
            value, slope = jax.value_and_grad(loss)(trained, frozen)
            updates, state = optimizer.update(slope, state)
            return optax.apply_updates(trained, updates), state, value

        arguments = self.trained, self.state, self.frozen
        self._step = jax.jit(step).lower(*arguments).compile()
        self._forward = jax.jit(logits).lower(self.trained, self.frozen).compile()

    def counted(self) -> dict[str, Any]:
        """Returns the sizes of the trained arrays and the memory of the compiled step."""
        found: Any = self._step.memory_analysis()
        trained = jax.tree.leaves(self.trained)
        return {
            "trained": sum(x.size for x in trained),
            "trained_dtype": trained[0].dtype.name,
            "trained_bytes": sum(x.nbytes for x in jax.tree.leaves((trained, self.state))),
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
        }

    def forward(self) -> jax.Array:
        return self._forward(self.trained, self.frozen)

    def step(self) -> jax.Array:
        self.trained, self.state, loss = self._step(self.trained, self.state, self.frozen)
        return loss


def error(found: np.ndarray, exact: np.ndarray) -> float:
    """Returns ‖found - exact‖ / ‖exact‖, the relative root mean square error."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def timed(call: Callable[[], jax.Array]) -> tuple[float, np.ndarray]:
    """Returns the seconds of a call until its result is ready, and the result."""
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return time.perf_counter() - start, np.asarray(result, np.float32)


def compare(shape: str, dtype: str, length: int, times: int) -> dict[str, Figures]:
    """Measures all sides; their programs run in turn.

    Args:
      shape: a name in `SHAPES`.
      dtype: name of the model's dtype.
      length: tokens per row.
      times: number of timed steps and forward passes; one more of each runs first, not timed.
    """
    inputs = batch(SHAPES[shape]["num_embed"], length)
    models = {name: adapted(gemma3(shape, dtype)) for name, adapted in SIDES.items()}
    kept = {name: stored(model) for name, model in models.items()}
    programs = {name: Programs(model, inputs) for name, model in models.items()}
    graph, state = nnx.split(gemma3(shape, dtype))
    exact = timed(lambda: jax.jit(lambda s: nnx.merge(graph, s)(*inputs)[0])(state))[1]
    logits = {name: error(timed(own.forward)[1], exact) for name, own in programs.items()}
    values = {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}
    steps: dict[str, list[tuple[float, np.ndarray]]] = {name: [] for name in SIDES}
    forwards: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(times + 1):
        for name, own in programs.items():
            steps[name].append(timed(own.step))
            forwards[name].append(timed(own.forward)[0])
    return {
        name: Figures(
            code=code_of(SIDES[name]),
            **counted(kept[name], values),
            **programs[name].counted(),
            step=statistics.median(seconds for seconds, _ in steps[name][1:]),
            forward=statistics.median(forwards[name][1:]),
            logits=logits[name],
            before=float(steps[name][0][1]),
            after=float(steps[name][-1][1]),
        )
        for name in SIDES
    }


def counted(kept: dict[str, Stored], values: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns the bytes of quantized weights, and their error against the exact values."""
    arrays = [x for q in kept.values() for x in q.arrays]
    weights = np.concatenate([q.weight.ravel() for q in kept.values()])
    exact = np.concatenate([np.asarray(values[path], np.float32).ravel() for path in kept])
    return {
        "quantized": weights.size,
        "nbytes": sum(x.nbytes for x in arrays),
        "packed": sum(map(bits, arrays)) // 8,
        "device": sum(x.on_device_size_in_bytes() for x in arrays),
        "weights": error(weights, exact),
    }
