"""Times bitsandbytes' quantizer, decoder and products on the same cases as ours."""

import functools
import os
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional

from qlora_jax.bench import measure
from qlora_jax.bench.cases import BLOCK_SIZE, CODEBOOK, OperationCase, case_figure, cases
from qlora_jax.bench.options import KernelOptions, to_tree
from qlora_jax.runtime.errors import UserError

QUEUED = 50
"""Calls in one timed sample on a GPU."""

NOTES = {
    "cpu": [],
    "gpu": [
        "each bitsandbytes call is dispatched on its own: with few rows, its time is that of the "
        "dispatch, not of the kernel"
    ],
}


def run(options: KernelOptions) -> dict[str, Any]:
    """Times every case.

    Raises:
      UserError: the peer's torch sees no GPU, but our side runs on one.
    """
    gpu = options.device == "gpu"
    if gpu and not torch.cuda.is_available():
        raise UserError("--peer: the peer's torch sees no GPU; install torch for the GPU there")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    figures = {}
    with measure.OtherProcesses() as neighbours:
        for case in cases(options):
            calls = prepared(case, "cuda" if gpu else "cpu")
            times = (queued if gpu else one_by_one)(calls, options.samples)
            figures[case.name] = case_figure(case, times)
    return measure.report(
        "bitsandbytes",
        ["bitsandbytes", "torch"],
        to_tree(options),
        figures,
        notes=NOTES[options.device],
        others_cores=neighbours.cores,
    )


def prepared(case: OperationCase, device: str) -> list[Callable[[], Any]]:
    """Returns one call for each set of inputs."""
    dtype = getattr(torch, case.dtype)
    # bitsandbytes stores a weight as [out, in].
    if device == "cpu":
        w, x = torch.from_numpy(case.weight()).T.contiguous(), torch.from_numpy(case.operand())
    else:
        w = torch.randn(case.n, case.k, device=device)
        x = torch.randn(case.operand_shape, device=device)

    quantize = functools.partial(
        functional.quantize_4bit,
        blocksize=BLOCK_SIZE,
        compress_statistics=case.double,
        quant_type=CODEBOOK,
    )
    if case.operation == "quantize":
        return [functools.partial(quantize, w.clone()) for _ in range(case.copies)]
    calls = []
    for _ in range(case.copies):
        codes, state = quantize(w)
        state.dtype = dtype
        calls.append(_call(case, codes, state, x.to(dtype, copy=True)))
    return calls


def _call(
    case: OperationCase, codes: torch.Tensor, state: Any, operand: torch.Tensor
) -> Callable[[], Any]:
    if case.operation == "dequantize":
        return lambda: functional.dequantize_4bit(codes, state)
    if case.operation == "forward":
        return lambda: bitsandbytes.matmul_4bit(operand, codes, state)
    x = torch.zeros(case.rows, case.k, dtype=operand.dtype, device=operand.device)
    x.requires_grad_()
    y = bitsandbytes.matmul_4bit(x, codes, state)
    return lambda: torch.autograd.grad(y, x, operand, retain_graph=True)


def one_by_one(calls: list[Callable[[], Any]], samples: int) -> list[float]:
    """Returns the seconds of single calls, which take turns."""
    turn = 0

    def call() -> float:
        nonlocal turn
        turn += 1
        return measure.timed(calls[turn % len(calls)])

    return measure.take(call, samples)


def queued(calls: list[Callable[[], Any]], samples: int) -> list[float]:
    """Returns the seconds per call on a GPU, each value from `QUEUED` calls in a row."""

    def stretch() -> None:
        for i in range(QUEUED):
            calls[i % len(calls)]()
        torch.cuda.synchronize()

    return measure.take(lambda: measure.timed(stretch) / QUEUED, samples)
