"""The kinds of variable of a linear: which are trained, which are frozen, which are vectors.

A filter such as `nnx.split(model, LoraParam, ...)` takes a model apart by them. The optimizer's
groups go by them as well.
"""

from flax import nnx


class Weight(nnx.Param):
    """A pretrained weight: an array or a QTensor. Trained by method full only."""


class Vector(Weight):
    """A bias, or the weight of a norm; it has no weight decay."""


class LoraParam(nnx.LoRAParam):
    """A trained part of an adapter: A, or one of the two kinds below."""


class LoraB(LoraParam):
    """B, which has a learning rate of its own under LoRA+."""


class LoraVector(LoraParam):
    """A trained vector of an adapter, such as DoRA's magnitude; it has no weight decay."""


class LoraConstant(nnx.Variable):
    """A part of an adapter that is never trained: it has no gradient and no moments."""


class LoraScale(nnx.Variable):
    """The fixed factor of each layer's adapter; 0 where a layer has none."""
