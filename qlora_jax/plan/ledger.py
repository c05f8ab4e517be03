"""Lists the memory of a training step by part, without compiling.

The step's inputs and outputs (weights, adapters, gradients, moments, counters, batch) are exact to
the byte, because they are counted on the real trees of shapes (`exact`). The memory that XLA
allocates during the step (activations, working set, decoded weights, loss) is estimated by formulas
(`activations`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import WHOLE_LAYERS
from qlora_jax.models.weight_shapes import expected_shapes
from qlora_jax.plan.abstract import abstract_batch
from qlora_jax.plan.activations import estimates
from qlora_jax.plan.device_bytes import nbytes
from qlora_jax.plan.exact import count
from qlora_jax.train.assemble import updates_at_once
from qlora_jax.train.offload import memory_of


class LedgerLine(NamedTuple):
    """One part of a step's memory.

    Attributes:
      nbytes: bytes of the part.
      place: "device" or "host".
      exact: False for an estimate.
    """

    nbytes: int
    place: str = "device"
    exact: bool = True


def ledger(model: DecoderConfig, run: Config) -> dict[str, LedgerLine]:
    """Returns the parts of a step's memory by name, exact parts first, without parts of zero bytes.

    `optimizer.offload: auto` counts as device, because the ledger does not know the device. Moments
    that are copied from the host for a layer's update are not counted, because the activations are
    freed before.

    Args:
      model: shapes of the pretrained decoder.
      run: config of the run; method, dtypes, adapters, optimizer, rows and sequence length are
        read.

    Raises:
      UserError: settings do not fit the shapes, such as target modules that match no linear.
    """
    counted = count(model, run)
    host = run.optimizer.offload == "host"
    remat = memory_of(run).remat
    by_layer = remat in WHOLE_LAYERS and run.mesh.devices == 1
    at_once = by_layer and updates_at_once(run)
    exact = {
        **counted.model,
        "gradients": counted.layer_gradients if at_once else counted.gradients,
        "moments": 0 if host else counted.moments,
        "counters": counted.counters,
        "batch": nbytes(abstract_batch(run)),
    }
    parts = {name: LedgerLine(size) for name, size in exact.items()}
    parts["moments on the host"] = LedgerLine(counted.moments if host else 0, "host")
    guessed = estimates(model, run, counted.ranks)
    if run.train.gradient_accumulation > 1 and not by_layer:
        guessed["gradients of a micro-batch"] = counted.trained
    away = remat == "host"
    parts |= {
        name: LedgerLine(size, "host" if away and name == "activations" else "device", exact=False)
        for name, size in guessed.items()
    }
    return {name: part for name, part in parts.items() if part.nbytes}


def total(parts: Mapping[str, LedgerLine], place: str = "device", exact: bool | None = None) -> int:
    """Returns the sum of bytes in one place.

    The estimated arrays do not all exist at the same time. For steps of 1.7B to 65B models with
    float32 adapters, the sum on the device was 0.98 to 1.11 times the memory that XLA allocates
    when it compiles them for an A100 or a T4.

    Args:
      parts: parts of a step's memory, from `ledger`.
      place: "device" or "host".
      exact: True counts only exact parts, False only estimates, None all parts.
    """
    return sum(
        part.nbytes
        for part in parts.values()
        if part.place == place and exact in (None, part.exact)
    )


def text(nbytes: float) -> str:
    """Returns a number of bytes as text, in GB (10^9) and in GiB (2^30)."""
    return f"{nbytes / 1e9:,.3f} GB ({nbytes / 2**30:,.3f} GiB)"


def parameters(model: DecoderConfig) -> int:
    """Returns the number of pretrained parameters; a tied embedding and head count once."""
    return sum(math.prod(shape) for shape in expected_shapes(model).values())
