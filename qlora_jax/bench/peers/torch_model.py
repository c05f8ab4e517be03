"""A causal language model as transformers and bitsandbytes load it. Imports both."""

import os

# before transformers reads it: a peer's run needs no network
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_jax.bench.measure import Figure, figure
from qlora_jax.errors import UserError

# Python defers torch's and bitsandbytes' imports; a load must not be charged for them.
import bitsandbytes  # noqa: F401  isort: skip

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(len(os.sched_getaffinity(0)))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_base(folder: str, dtype: torch.dtype, *, quantized: bool) -> PreTrainedModel:
    """Loads a Hugging Face folder, its linears in NF4 with double quantization if asked.

    Args:
      folder: the model.
      dtype: of everything that is not quantized, and of computation.
      quantized: whether the layers' linears are.

    Raises:
      UserError: transformers cannot read it.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    more = {"quantization_config": config} if quantized else {}
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": DEVICE}, **more
        )
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: transformers cannot load it: {e}") from None


def synchronize() -> None:
    """Waits for what was queued on the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_memory() -> dict[str, Figure]:
    """The peak since the process began, of a GPU."""
    if DEVICE == "cpu":
        return {}
    return {"peak memory, device": figure("MiB", torch.cuda.max_memory_allocated() / 2**20)}


def nbytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and of the scales of those in 4 bits."""
    tensors = list(model.parameters())
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code]
    # the codebooks are one tensor for the whole model
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
