"""Compares the papers' figures of memory with the same figures computed by formula.

The formulas count only weights, gradients and moments. The papers' figures of training are
measured, so they include activations and all other allocated memory.
"""

from typing import NamedTuple

from qlora_jax.models.shapes import find
from qlora_jax.plan.ledger import parameters, text

WEIGHT_16, GRADIENT_16, MOMENTS_32 = 2, 2, 8
FULL = WEIGHT_16 + GRADIENT_16 + MOMENTS_32
"""Bytes per parameter of full fine-tuning with Adam: weight and gradient in 16 bits, two moments
in 32 bits each."""

GPT3_LAYERS, GPT3_WIDTH, GPT3_VOCAB, GPT3_POSITIONS = 96, 12288, 50257, 2048
"""Shapes of GPT-3 175B: arXiv 2005.14165, table 2.1; the vocabulary is GPT-2's."""


class PaperClaim(NamedTuple):
    """One figure of a paper, and the same figure computed by formula.

    Attributes:
      what: description of the figure.
      value: figure by formula.
      unit: unit of `value`, "bytes" or "parameters".
      paper: figure in the paper, as text.
    """

    what: str
    value: int
    unit: str
    paper: str

    def __str__(self) -> str:
        value = text(self.value) if self.unit == "bytes" else f"{self.value:,} {self.unit}"
        return f"{self.what}: {value}; the paper: {self.paper}"


def full_fine_tuning(parameters: int) -> int:
    """Returns the bytes of full fine-tuning: 16-bit weights and gradients, two 32-bit moments."""
    return FULL * parameters


def gpt3_parameters() -> int:
    """Returns the number of parameters of GPT-3 175B.

    GPT-3 is no Llama-like decoder: a layer has four attention matrices, two MLP matrices with four
    times the width, biases of these and two layer norms. The head is the embedding.
    """
    d = GPT3_WIDTH
    layer = 12 * d**2 + 9 * d + 4 * d
    return GPT3_LAYERS * layer + (GPT3_VOCAB + GPT3_POSITIONS) * d + 2 * d


def gpt3_adapters(rank: int) -> int:
    """Returns the number of parameters of LoRA on GPT-3's query and value projections."""
    return GPT3_LAYERS * 2 * rank * 2 * GPT3_WIDTH


def paper_claims() -> list[PaperClaim]:
    """Returns the figures of the papers: QLoRA (section 1), LoRA (section 4.2, table 4)."""
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
