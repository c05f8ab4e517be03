"""Lists what a training step holds in a device's memory, part by part, without compiling anything.

What the step takes and gives (weights, adapters, gradients, moments, counters, batch) is exact to
the byte: it is counted on the real trees in shapes (`exact`). What XLA allocates in between
(activations, working set, decoded weights, loss) is estimated by formulas (`activations`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import WHOLE_LAYERS
from qlora_jax.models.parts import expected_shapes
from qlora_jax.plan.abstract import abstract_batch
from qlora_jax.plan.activations import estimates
from qlora_jax.plan.exact import count
from qlora_jax.plan.share import nbytes
from qlora_jax.train.assemble import updates_at_once
from qlora_jax.train.offload import memory_of


class LedgerLine(NamedTuple):
    """One line of the ledger.

    Attributes:
      nbytes: what it holds.
      place: "device" or "host".
      exact: False for an estimate.
    """

    nbytes: int
    place: str = "device"
    exact: bool = True


def ledger(model: DecoderConfig, run: Config) -> dict[str, LedgerLine]:
    """Returns the parts of a step's memory by name, exact ones first, none of zero bytes.

    `optimizer.offload: auto` is counted as device: who knows the device decides. A layer's moments
    on their way from the host are not counted; they come when the activations are gone.

    Args:
      model: shapes of the pretrained decoder.
      run: method, dtypes, adapters, optimizer, rows and their length are read.

    Raises:
      UserError: settings that do not fit the shapes, such as adapters that match no linear.
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
    """Returns the bytes in one place, of all parts or of those that are exact (or are not).

    The estimates are not all alive at the same moment. For steps of 1.7B to 65B models with
    float32 adapters the device's sum was 0.98 to 1.11 times what XLA allocates when it compiles
    them for an A100 or a T4.
    """
    return sum(
        part.nbytes
        for part in parts.values()
        if part.place == place and exact in (None, part.exact)
    )


def text(nbytes: float) -> str:
    """Writes bytes for people: in GB (10^9), and in GiB (2^30)."""
    return f"{nbytes / 1e9:,.3f} GB ({nbytes / 2**30:,.3f} GiB)"


def parameters(model: DecoderConfig) -> int:
    """Returns the number of pretrained parameters; a tied head is counted once."""
    return sum(math.prod(shape) for shape in expected_shapes(model).values())
