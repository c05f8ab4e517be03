"""Are the weights that are quantized normal, as NF4 assumes?

qlora-jax sweep normality
"""

NOT_NORMAL = 0.075
"""Share of a 7B LLaMA's neurons that a Shapiro-Wilk test at 5% rejects (QLoRA, appendix F)."""

CLAIM = 0.15
"""A share below this is what "almost all" is taken to mean here."""
