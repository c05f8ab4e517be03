"""Sets what the papers say that adapters save beside the same figures by formula.

The formulas hold weights, gradients and moments only; the papers' figures for training are readings
that hold activations and whatever else was allocated.
"""

from typing import NamedTuple

from qlora_jax.models.shapes import find
from qlora_jax.plan.ledger import parameters, text

WEIGHT_16, GRADIENT_16, MOMENTS_32 = 2, 2, 8
FULL = WEIGHT_16 + GRADIENT_16 + MOMENTS_32
"""Bytes per parameter of full fine-tuning with Adam: 16 bits, and 32 for each moment."""

GPT3_LAYERS, GPT3_WIDTH, GPT3_VOCAB, GPT3_POSITIONS = 96, 12288, 50257, 2048
"""arXiv 2005.14165, table 2.1; the vocabulary is GPT-2's."""


class PaperClaim(NamedTuple):
    """One figure.

    Attributes:
      what: in words.
      value: by formula; bytes, or a number of parameters.
      unit: of `value`.
      paper: what the paper says.
    """

    what: str
    value: int
    unit: str
    paper: str

    def __str__(self) -> str:
        value = text(self.value) if self.unit == "bytes" else f"{self.value:,} {self.unit}"
        return f"{self.what}: {value}; the paper: {self.paper}"


def full_fine_tuning(parameters: int) -> int:
    """Returns the bytes of 16-bit weights and gradients and 32-bit moments."""
    return FULL * parameters


def gpt3_parameters() -> int:
    """Returns the parameters of GPT-3 175B, which is no Llama-like decoder.

    A layer has four attention matrices, two of the MLP at four times the width, their biases and
    two layer norms; the head is the embedding.
    """
    d = GPT3_WIDTH
    layer = 12 * d**2 + 9 * d + 4 * d
    return GPT3_LAYERS * layer + (GPT3_VOCAB + GPT3_POSITIONS) * d + 2 * d


def gpt3_adapters(rank: int) -> int:
    """Returns the parameters of adapters on GPT-3's query and value projections."""
    return GPT3_LAYERS * 2 * rank * 2 * GPT3_WIDTH


def paper_claims() -> list[PaperClaim]:
    """Returns the papers' figures: QLoRA (section 1), LoRA (section 4.2, table 4)."""
    llama, gpt3 = full_fine_tuning(parameters(find("llama-65b"))), gpt3_parameters()
    adam, gradients = 3 * WEIGHT_16 * gpt3, GRADIENT_16 * gpt3
    return [
        PaperClaim("LLaMA 65B, full fine-tuning", llama, "bytes", "more than 780 GB"),
        PaperClaim(
            "GPT-3, weights and two moments in 16 bits", adam, "bytes", "1.2 TB in training"
        ),
        PaperClaim("GPT-3, gradients too", adam + gradients, "bytes", "1.2 TB in training"),
        PaperClaim(
            "GPT-3, weights alone", WEIGHT_16 * gpt3, "bytes", "350 GB in training with LoRA"
        ),
        PaperClaim("GPT-3, LoRA of rank 1 on q and v", gpt3_adapters(1), "parameters", "4.7M"),
        PaperClaim("GPT-3, LoRA of rank 4 on file", WEIGHT_16 * gpt3_adapters(4), "bytes", "35 MB"),
    ]
