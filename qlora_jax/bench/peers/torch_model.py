"""Loads causal language models with transformers and bitsandbytes, or makes random ones.

This module imports both packages when it is imported.
"""

import os
from collections.abc import Mapping
from typing import Any

# Set this before transformers is imported, which reads it: a peer's run needs no network.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from qlora_jax.bench.measure import Figure, figure
from qlora_jax.runtime.errors import UserError

# Import bitsandbytes whole before any load, so that a load's time does not include imports.
import bitsandbytes  # noqa: F401  isort: skip

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(len(os.sched_getaffinity(0)))

SPREAD = 0.02
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load_base(folder: str, dtype: torch.dtype, *, quantized: bool) -> PreTrainedModel:
    """Loads the model of a Hugging Face folder.

    Args:
      folder: folder of the model.
      dtype: compute dtype, and dtype of everything that is not quantized.
      quantized: whether the layers' linears are in NF4 with double quantization.

    Raises:
      UserError: transformers cannot read the folder.
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
            folder, dtype=dtype, device_map={"": DEVICE}, trust_remote_code=False, **more
        )
    except (OSError, ValueError) as e:
        raise UserError(f"{folder}: transformers cannot load it: {e}") from None


def random_base(
    shape: Mapping[str, Any], dtype: torch.dtype, *, quantized: bool
) -> PreTrainedModel:
    """Makes a model of random weights on the device, with only one linear in `dtype` at a time.

    Args:
      shape: contents of config.json.
      dtype: compute dtype, and dtype of everything that is not quantized.
      quantized: whether the layers' linears are in NF4 with double quantization.
    """
    config = AutoConfig.for_model(**shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantized:
        for block in list(model.model.layers.modules()):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, _quantized(linear, dtype))
        # from_pretrained sets these attributes, and PEFT reads them.
        model.is_loaded_in_4bit = model.is_quantized = True
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            if old.is_meta:
                if old not in made:
                    made[old] = torch.nn.Parameter(_value(name, old))
                # A tied head is the same parameter as the embedding.
                setattr(module, name, made[old])
    with torch.device(DEVICE):
        # Make the rotary embedding anew: its constructor computes the frequencies.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def _quantized(linear: torch.nn.Linear, dtype: torch.dtype) -> Linear4bit:
    new = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    new.weight = Params4bit(
        _value("weight", linear.weight),
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=new,
    ).to(DEVICE)
    return new


def _value(name: str, like: torch.Tensor) -> torch.Tensor:
    """Returns ones for a norm, zeros for a bias, and weights of standard deviation `SPREAD`."""
    new = torch.empty_like(like, device=DEVICE)
    if like.ndim == 1:
        return new.fill_(0.0 if name == "bias" else 1.0)
    return new.normal_(0.0, SPREAD)


def synchronize() -> None:
    """Waits until all queued work of the device is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_memory() -> dict[str, Figure]:
    """Returns a GPU's peak memory since the process began; empty on a CPU."""
    if DEVICE == "cpu":
        return {}
    return {"peak memory, device": figure("MiB", torch.cuda.max_memory_allocated() / 2**20)}


def nbytes(model: PreTrainedModel) -> int:
    """Returns the bytes of all parameters, and of the scales and codebooks of 4-bit parameters."""
    tensors = list(model.parameters())
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors += [state.absmax, state.code]
            if state.nested:
                tensors += [state.state2.absmax, state.state2.code]
    # The whole model shares one tensor of each codebook, so count each address once.
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
