"""Makes dynamic8.npz with bitsandbytes and torch (the `parity` extra).

usage: python tests/golden/make_dynamic8.py OUT.npz

Keys, under `signed/` and `unsigned/`: map, input, codes, absmax, decoded, and tabulated. `codes`
come from bitsandbytes' kernel for any device. `tabulated` holds the codes of its CPU kernel, which
looks up the nearest value in a table of 65536 evenly spaced steps of [-1, 1].
"""

import sys

import numpy as np
import torch
from bitsandbytes import functional as F

BLOCK = 256
SIZE = 9 * BLOCK + 100
ANY_DEVICE = torch._C.DispatchKeySet(torch._C.DispatchKey.CompositeExplicitAutograd)


def numbers(signed: bool, code: np.ndarray) -> np.ndarray:
    """Returns numbers of many magnitudes with three special blocks.

    The special blocks hold zeros, the values of the map, and the midpoints between these values.
    """
    random = np.random.default_rng(int(signed))
    x = random.normal(size=SIZE).astype(np.float32)
    x *= np.float32(10) ** random.uniform(-8, 0, SIZE).astype(np.float32)
    x[:BLOCK] = random.normal(size=BLOCK)
    x = x if signed else np.abs(x)
    x[BLOCK : 2 * BLOCK] = 0
    x[2 * BLOCK : 3 * BLOCK] = code
    x[3 * BLOCK : 4 * BLOCK] = np.append((code[1:] + code[:-1]) / 2, np.float32(1))
    return x


def main(out: str) -> None:
    new = {}
    for name, signed in (("signed", True), ("unsigned", False)):
        code = F.create_dynamic_map(signed=signed)
        x = torch.from_numpy(numbers(signed, code.numpy()))
        quantize = torch.ops.bitsandbytes.quantize_blockwise.default
        codes, absmax = quantize.redispatch(ANY_DEVICE, x, code, BLOCK)
        decoded = F.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK)
        tabulated, _ = F.quantize_blockwise(x, code=code, blocksize=BLOCK)
        arrays = {
            "map": code,
            "input": x,
            "codes": codes,
            "absmax": absmax,
            "decoded": decoded,
            "tabulated": tabulated,
        }
        new |= {f"{name}/{key}": value.numpy() for key, value in arrays.items()}
    np.savez_compressed(out, **new)


main(sys.argv[1])
