"""The GPU that programs are compiled for, and what follows from its compute capability alone."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import jax

Capability = tuple[int, int]
"""(8, 0) for sm_80."""


class Hardware(Protocol):
    """A jax device, or the description of one; an NVIDIA GPU's has `compute_capability` too."""

    @property
    def device_kind(self) -> str: ...


def capability_of(device: object) -> Capability | None:
    """Returns an NVIDIA GPU's compute capability; None of any other device."""
    text = getattr(device, "compute_capability", None)
    try:
        major, minor = map(int, str(text).split("."))
    except ValueError:
        return None
    return major, minor


def half_dtype(capability: Capability | None) -> str:
    """Returns the 16-bit dtype that a device multiplies fast: before sm_80, GPUs lack bfloat16."""
    return "float16" if capability is not None and capability < (8, 0) else "bfloat16"


_target: ContextVar[Capability | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(capability: Capability) -> Iterator[None]:
    """Within it products are for a GPU of this capability, which need not be here."""
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def compiled_for() -> Capability | None:
    """Returns the capability of the GPU that programs are compiled for; None if it is no GPU."""
    return _target.get() or capability_of(jax.devices()[0])


def for_a_cpu() -> bool:
    """Returns whether programs are compiled for a CPU."""
    return _target.get() is None and jax.default_backend() == "cpu"
