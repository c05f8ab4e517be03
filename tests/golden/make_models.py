"""Makes tests/golden/models: tiny random decoders and adapters with their logits.

Run in an environment with torch, transformers and peft:

    python tests/golden/make_models.py tests/golden/models

Every model is a Hugging Face folder with `reference.npz`: `tokens` [2, 33] and the float32
`logits` that transformers computes for them with eager attention. `llama/peft_lora` and
`llama/peft_rslora` are adapters made by PEFT, with B not zero, and the logits with them on.
The files in the repository came from transformers 5.23.0, PEFT 0.21.2 and torch 2.13.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SEED = 11
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 32},
    "qwen2": {"tie_word_embeddings": True},
}
ADAPTERS = {"peft_lora": {}, "peft_rslora": {"use_rslora": True}}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    return model(input_ids=tokens).logits.float().numpy()


@torch.no_grad()
def make_base(family: str, folder: Path, random: torch.Generator) -> torch.Tensor:
    config = AutoConfig.for_model(family, **SHAPE, **FAMILIES[family])
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    # Norms that are all one and biases that are all zero would hide being left out.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        else:
            parameter.mul_(3.0)
    tokens = torch.randint(0, SHAPE["vocab_size"], (2, 33), generator=random)
    model.save_pretrained(folder)
    np.savez_compressed(
        folder / "reference.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits(model, tokens),
    )
    return tokens


def make_adapter(base: Path, name: str, tokens: torch.Tensor, random: torch.Generator) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").float()
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **ADAPTERS[name]
    )
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    model.save_pretrained(base / name)
    np.savez_compressed(base / name / "reference.npz", logits=logits(model, tokens))


def main(out: Path) -> None:
    for family in FAMILIES:
        random = torch.Generator().manual_seed(SEED + 1)
        tokens = make_base(family, out / family, random)
        if family == "llama":
            for name in ADAPTERS:
                make_adapter(out / family, name, tokens, random)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
