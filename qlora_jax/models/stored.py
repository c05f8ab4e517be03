"""Maps the parameters of a checkpoint to the arrays of a model that hold them."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

from qlora_jax.models.decoder import Decoder, run_length
from qlora_jax.quant import QTensor


class StoredParameter(NamedTuple):
    """One parameter outside the layers, or the same parameter of all layers of a stack.

    Attributes:
      names: names in the checkpoint, one for each layer of the stack; one name if not stacked.
      value: array or QTensor that the model holds.
      stacked: whether `value` has a leading axis of layers.
      transposed: whether the checkpoint has the matrix as [out, in] and the model as [in, out].
    """

    names: tuple[str, ...]
    value: jax.Array | QTensor
    stacked: bool
    transposed: bool


def stored(model: Decoder) -> Iterator[StoredParameter]:
    """Yields every pretrained parameter, first those outside the layers. Adapters are left out."""
    names = model.config.names
    outer = {
        f"{names.embed}.weight": model.embed,
        f"{names.positions}.weight": model.positions,
        f"{names.norm}.weight": model.norm.weight,
        f"{names.norm}.bias": model.norm.bias,
        f"{names.head}.weight": model.head,
    }
    for name, variable in outer.items():
        if variable is not None:
            yield StoredParameter((name,), variable.get_value(), False, variable is model.head)
    start = 0
    for run in model.runs:
        layers = range(start, start + run_length(run))
        start = layers.stop
        linears = run.linears()
        for path, part in (linears | run.norms()).items():
            for leaf in ("weight", "bias"):
                if (variable := getattr(part, leaf)) is not None:
                    found = tuple(f"{names.layers}.{i}.{path}.{leaf}" for i in layers)
                    matrix = path in linears and leaf == "weight"
                    yield StoredParameter(found, variable.get_value(), True, matrix)
