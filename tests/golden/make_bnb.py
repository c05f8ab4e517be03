"""Recomputes bnb.npz or bnb_rows.npz from the inputs in the file, with bitsandbytes and torch.

Both packages are in the `parity` extra. bnb_rows.npz holds weights whose blocks cross the ends of
rows.

usage: python tests/golden/make_bnb.py tests/golden/bnb.npz OUT.npz

Keys: `CASE.DTYPE/input` is the weight [out, in] (bfloat16 as uint16 bits). Under
`CASE.DTYPE/{nf4|fp4}.b{BLOCK}/` are packed, absmax and deq, and with double quantization absmax_u8,
nested_absmax, offset, absmax_deq and deq_dq. `deq` is code[nibble] * absmax in float32, rounded
once to the input's dtype. This script computes `deq`, because bitsandbytes' CPU kernel is wrong if
the last axis is a multiple of 16 but not of the block.
"""

import sys

import numpy as np
import torch
from bitsandbytes import functional as F

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    t = torch.from_numpy(array.view(np.int16) if dtype == "bf16" else array)
    return t.view(torch.bfloat16) if dtype == "bf16" else t


def array(t: torch.Tensor) -> np.ndarray:
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(np.uint16)
    return t.numpy()


def decode(packed, absmax, code, shape, block, dtype):
    n = int(np.prod(shape))
    index = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], -1).flatten()[:n].long()
    scale = absmax.repeat_interleave(block)[:n]
    return array((code[index] * scale).to(DTYPES[dtype]).reshape(shape))


def main(source: str, out: str) -> None:
    old = np.load(source)
    new = {k: old[k] for k in old.files if k.endswith("/input")}
    for folder in sorted({k.rpartition("/")[0] for k in old.files if k.count("/") == 2}):
        case, spec = folder.split("/")
        kind, block = spec.split(".b")
        dtype = case.rpartition(".")[2]
        x = tensor(old[f"{case}/input"], dtype)
        packed, state = F.quantize_4bit(x, blocksize=int(block), quant_type=kind)
        new[f"{folder}/packed"] = array(packed).reshape(-1)
        new[f"{folder}/absmax"] = array(state.absmax)
        new[f"{folder}/deq"] = decode(packed, state.absmax, state.code, x.shape, int(block), dtype)
        if f"{folder}/offset" in old.files:
            _, state = F.quantize_4bit(
                x, blocksize=int(block), quant_type=kind, compress_statistics=True
            )
            absmax = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
            new[f"{folder}/absmax_u8"] = array(state.absmax)
            new[f"{folder}/nested_absmax"] = array(state.state2.absmax)
            new[f"{folder}/offset"] = array(state.offset)
            new[f"{folder}/absmax_deq"] = array(absmax)
            new[f"{folder}/deq_dq"] = decode(packed, absmax, state.code, x.shape, int(block), dtype)
    new["code_fp4"] = array(F.get_4bit_type("fp4", device="cpu"))
    new["code_nf4"] = array(F.get_4bit_type("nf4", device="cpu"))
    new["code_dynamic8"] = array(F.create_dynamic_map())
    np.savez_compressed(out, **new)


main(*sys.argv[1:])
