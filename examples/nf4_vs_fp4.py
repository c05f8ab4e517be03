"""Compares 4-bit data types on a real weight and on normal random numbers.

python examples/nf4_vs_fp4.py [--output nf4_vs_fp4.png]

Prints the error and the size of each data type, and draws its sixteen values over the histogram of
the weights. The real weight is of SmolLM2-135M-Instruct: `down_proj` of the middle layer.
"""

import argparse

import matplotlib
import numpy as np
from flax import nnx

import qlora_jax as qj

matplotlib.use("Agg")  # draws into a file, without a display
import matplotlib.pyplot as plt

MODEL, LAYER = "smollm2-135m-instruct", 15
CODEBOOKS = ["nf4", "fp4_bnb", "fp4_e2m1", "int4"]
BLOCK_SIZE = 64

parser = argparse.ArgumentParser(description="Compares 4-bit data types.")
parser.add_argument("--output", default="nf4_vs_fp4.png", help="the picture")
output = parser.parse_args().output


# Step 1. Take two weights [in, out] of one shape: a layer's of a trained model, and normal numbers.
# (The built-in file holds this layer in 4 bits of another kind, Q4_1 of GGUF; it is decoded here.)
model, _ = qj.load(MODEL, codebook=None, dtype="float32")
state = nnx.to_pure_dict(nnx.state(model))
real = np.asarray(state["runs"][0]["down_proj"]["weight"][LAYER])
normal = np.random.default_rng(0).normal(size=real.shape).astype(np.float32)
weights = {f"SmolLM2, layer {LAYER}, down_proj": real, "N(0, 1)": normal}


# Step 2. Quantize each weight with each data type. A block of 64 weights is divided by its largest
# magnitude (absmax), and each weight becomes the nearest of the data type's sixteen values.
def measure(weight: np.ndarray, codebook: str) -> tuple[float, float]:
    """Returns the relative RMS error, and the bits that are stored per parameter."""
    q = qj.quantize(weight, codebook=codebook, block_size=BLOCK_SIZE, double_quant=True)
    difference = np.asarray(qj.dequantize(q)) - weight
    error = np.sqrt(np.mean(difference**2) / np.mean(weight**2))
    return float(error), 8 * q.nbytes / weight.size


measured = {
    title: {name: measure(weight, name) for name in CODEBOOKS} for title, weight in weights.items()
}
for title, rows in measured.items():
    print(title)
    print("  data type  relative RMS error  bits per parameter")
    for name, (error, bits) in rows.items():
        print(f"  {name:9} {error:19.4f} {bits:19.3f}")


# Step 3. Draw the sixteen values of each data type over the histogram of w / absmax, which is what
# they have to represent. An error is small where the values are dense.
def scaled(weight: np.ndarray) -> np.ndarray:
    """Returns all weights, each divided by the largest magnitude in its block."""
    blocks = weight.reshape(-1, BLOCK_SIZE, weight.shape[1])
    return (blocks / np.abs(blocks).max(axis=1, keepdims=True)).ravel()


figure, axes = plt.subplots(2, 2, figsize=(10, 6), width_ratios=[3, 1], layout="constrained")
for (left, right), (title, weight) in zip(axes, weights.items(), strict=True):
    left.hist(scaled(weight), bins=200, range=(-1, 1), density=True, color="0.8")
    left.set_ylim(-1.0, 1.6)
    left.set_yticks([-0.2 - 0.2 * row for row in range(len(CODEBOOKS))], CODEBOOKS)
    left.set_xlabel("w / absmax of its block")
    left.set_title(f"{title}: histogram, and the values of each data type", fontsize=10)
    for row, name in enumerate(CODEBOOKS):
        values = np.array(qj.CODEBOOKS[name](BLOCK_SIZE))
        height = np.full(len(values), -0.2 - 0.2 * row)
        left.plot(values, height, "|", markersize=10, markeredgewidth=1.5, color=f"C{row}")
    errors = [error for error, _ in measured[title].values()]
    bars = right.barh(CODEBOOKS, errors, color=[f"C{row}" for row in range(len(CODEBOOKS))])
    right.bar_label(bars, fmt="%.3f", padding=2)
    right.set_xlim(0, 1.35 * max(errors))
    right.invert_yaxis()
    right.set_title("relative RMS error", fontsize=10)
figure.savefig(output, dpi=100)
print(f"picture: {output}")
