"""A causal language model as transformers and bitsandbytes load it. Imports both."""

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

# Python defers torch's and bitsandbytes' imports; a load must not be charged for them.
import bitsandbytes  # noqa: F401  isort: skip

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def load_base(folder: str, dtype: torch.dtype, *, quantized: bool) -> PreTrainedModel:
    """Loads a Hugging Face folder on the CPU, its linears in NF4 with double quantization if asked.

    Args:
      folder: the model.
      dtype: of everything that is not quantized, and of computation.
      quantized: whether the layers' linears are.
    """
    if not quantized:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map={"": "cpu"}
    )


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
