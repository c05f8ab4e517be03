"""What the experiments run on. Change a line here, or give `--set`, for other models or a GPU.

The small models are made by `qlora-jax pretrain configs/pretrain_4m.yaml` and its like; weights
that were never 4-bit. SmolLM2's reach us as Q4_1: its "16 bits" are dequantized Q4_1.
"""

CONFIG = "configs/small.yaml"
"""Where fine-tuning cells start from; `configs/rank.yaml` is the size of a GPU."""

LOW_RANK_RATE, FULL_RATE = 4e-3, 1e-3
"""Learning rates of adapters and of whole models; a tenth or less for models of a billion."""

MODELS = [
    *(f"runs/pretrain_{size}/model" for size in ("1m", "4m", "12m")),
    "smollm2-135m-instruct",
]
"""Whose weights are quantized; hub ids such as EleutherAI/pythia-410m belong here too."""

ONCE_4_BIT = {"smollm2-135m-instruct"}
"""Of these, whose weights were in 4 bits before they reached us: no witness of normal weights."""

TEXTS = ["python-docs", "python-source", "package-docs"]
"""Sources of `data.source` whose held-out part is read for perplexity."""

TOKENS = 4096
"""Tokens of each text that are read for perplexity."""

WINDOW = 256
"""Tokens of context for perplexity."""

CHAT = "configs/quickstart.yaml"
"""The run of `instruction_tuning`."""

JUDGE = "smollm2-135m-instruct"
"""The reference model: answers after which it finds the right one likelier win."""

ENDPOINT: tuple[str, str] | None = None
"""(URL, model) of an OpenAI-compatible endpoint that judges instead."""
