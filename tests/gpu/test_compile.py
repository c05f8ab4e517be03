"""Tests compiling a product that XLA cannot compile for a GPU without autotuning."""

from typing import Any

import jax
import pytest

from qlora_jax.gpu.compile import UNTUNED, WITHOUT_TRITON_GEMM, compile_lowered

OPTIONS = {"xla_gpu_graph_min_graph_size": 1}


class Lowered:
    """A fake program that compiles only with the options that avoid Triton's GEMM."""

    def __init__(self, message: str) -> None:
        self.message = message
        self.tried: list[Any] = []

    def compile(self, options: Any) -> str:
        self.tried.append(options)
        if options is None or not options.items() >= WITHOUT_TRITON_GEMM.items():
            raise jax.errors.JaxRuntimeError(self.message)
        return "compiled"


def test_a_product_that_would_have_to_be_tuned_goes_to_cublas() -> None:
    lowered: Any = Lowered(f"UNIMPLEMENTED: FissionBackend {UNTUNED}.")
    assert compile_lowered(lowered, OPTIONS) == "compiled"
    assert lowered.tried == [OPTIONS, OPTIONS | WITHOUT_TRITON_GEMM]


def test_other_errors_are_the_callers() -> None:
    lowered: Any = Lowered("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        compile_lowered(lowered)
    assert lowered.tried == [None]
