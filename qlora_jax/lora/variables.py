"""The variable classes of a linear; the class says whether a variable is trained or frozen.

A filter such as `nnx.split(model, LoraParam, ...)` splits a model by these classes. They also
decide the optimizer group of a variable (`groups.GROUPS`).
"""

from flax import nnx


class Weight(nnx.Param):
    """A pretrained weight, an array or a QTensor; only the method "full" trains it."""


class Vector(Weight):
    """A bias, or the weight of a norm layer; the optimizer applies no weight decay to it."""


class LoraParam(nnx.LoRAParam):
    """A trained part of an adapter: A, or one of the two subclasses below."""


class LoraB(LoraParam):
    """The matrix B of an adapter; LoRA+ gives it a separate learning rate."""


class LoraVector(LoraParam):
    """A trained vector of an adapter, such as DoRA's magnitude; without weight decay."""


class LoraConstant(nnx.Variable):
    """A part of an adapter that is never trained; it has no gradient and no moments."""


class LoraScale(nnx.Variable):
    """The fixed scale of each layer's adapter; 0 for a layer without an adapter."""
