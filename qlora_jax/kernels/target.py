"""The GPU that programs are compiled for, and functions of its compute capability."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import jax

Capability = tuple[int, int]
"""Compute capability of an NVIDIA GPU; (8, 0) is sm_80."""


class Hardware(Protocol):
    """A jax device or its description; for an NVIDIA GPU it also has `compute_capability`."""

    @property
    def device_kind(self) -> str: ...


def capability_of(device: object) -> Capability | None:
    """Returns the compute capability of an NVIDIA GPU; None for any other device."""
    text = getattr(device, "compute_capability", None)
    try:
        major, minor = map(int, str(text).split("."))
    except ValueError:
        return None
    return major, minor


def half_dtype(capability: Capability | None) -> str:
    """Returns the fast 16-bit dtype of a device: float16 below sm_80, where bfloat16 is missing."""
    return "float16" if capability is not None and capability < (8, 0) else "bfloat16"


_target: ContextVar[Capability | None] = ContextVar("target", default=None)


@contextlib.contextmanager
def compiling_for(capability: Capability) -> Iterator[None]:
    """Compiles products for a GPU of this capability, present or not, within the context."""
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def compiled_for() -> Capability | None:
    """Returns the capability of the GPU that programs are compiled for; None without such a GPU."""
    return _target.get() or capability_of(jax.devices()[0])


def for_a_cpu() -> bool:
    """Returns whether programs are compiled for a CPU."""
    return _target.get() is None and jax.default_backend() == "cpu"
