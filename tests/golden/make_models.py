"""Makes tests/golden/models: tiny random decoders and adapters with their logits.

Run in an environment with torch, transformers, peft and bitsandbytes:

    python tests/golden/make_models.py tests/golden/models

Every model is a Hugging Face folder with `reference.npz`: `tokens` [2, 33] and the float32
`logits` that transformers computes for them with eager attention. `llama/peft_lora` and
`llama/peft_rslora` are adapters made by PEFT, with B not zero, and the logits with them on;
`llama/peft_patterns` has ranks and alphas that differ between modules. The adapters of `MORE` are
smaller, each of a base that is named there, and their logits are of the first row of tokens:
DoRA (with magnitudes that training moved), modules trained whole, biases, and DoRA on the base's
linears in bitsandbytes' NF4 with double quantization (`logits_nf4`). Names after the folder make
those alone. The models of `VARIANTS`
are smaller and cover one feature each: scaled rotary embeddings, sliding windows, biases.
The files in the repository came from transformers 5.23.0, PEFT 0.21.2 and torch 2.13.0.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
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
SMALL = SHAPE | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "tie_word_embeddings": True,
}
VARIANTS = {
    "llama_rope_llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_rope_linear_biases": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "mistral_window": ("mistral", {"sliding_window": 8}),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}
ADAPTERS = {
    "peft_lora": {},
    "peft_rslora": {"use_rslora": True},
    "peft_patterns": {
        "target_modules": r".*\.(self_attn\.[qv]_proj|mlp\.down_proj)",
        # in alphabetical order, in which PEFT writes them: the first that matches wins
        "rank_pattern": {r".*\.2\..*v_proj": 3, "down_proj": 2, "layers.1.self_attn.q_proj": 4},
        "alpha_pattern": {"layers.0.*": 40, "v_proj": 6},
    },
}

FEW = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
MORE = {
    "peft_dora": ("llama", FEW | {"use_dora": True}),
    "peft_dora_patterns": (
        "llama",
        {
            "r": 3,
            "use_dora": True,
            "use_rslora": True,
            "target_modules": r".*\.(1|2)\.(self_attn\.q_proj|mlp\.down_proj)",
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
    ),
    "peft_saved": ("llama", FEW | {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "peft_biases": (
        "llama_rope_linear_biases",
        FEW | {"target_modules": ["q_proj", "down_proj"], "bias": "all", "use_dora": True},
    ),
}


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor) -> np.ndarray:
    return model(input_ids=tokens).logits.float().numpy()


@torch.no_grad()
def make_base(family: str, settings: dict, folder: Path, random: torch.Generator) -> torch.Tensor:
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    # Norms that are all one and biases that are all zero would hide being left out.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
        else:
            parameter.mul_(3.0)
    tokens = torch.randint(0, settings["vocab_size"], (2, 33), generator=random)
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
        **{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        | ADAPTERS[name]
    )
    model = get_peft_model(model, config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(base / name)
    np.savez_compressed(base / name / "reference.npz", logits=logits(model, tokens))


@torch.no_grad()
def make_more(folder: Path, name: str, settings: dict) -> None:
    base = folder / name
    tokens = torch.from_numpy(np.load(folder / "reference.npz")["tokens"][:1]).long()
    random = torch.Generator().manual_seed(SEED + 2)
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **plain)
    config = LoraConfig(**{"lora_alpha": 16, "task_type": "CAUSAL_LM"} | settings)
    model = get_peft_model(model, config).eval()
    for key, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if "lora_B" in key:
            parameter.copy_(0.05 * noise)
        elif "magnitude" in key:
            parameter.mul_(1 + 0.1 * noise)
        elif parameter.requires_grad and "lora_A" not in key:
            parameter.add_(0.05 * noise)
    model.peft_config["default"].base_model_name_or_path = folder.name
    model.save_pretrained(base)
    found = {"logits": logits(model, tokens)}
    if name == "peft_dora":
        model = AutoModelForCausalLM.from_pretrained(folder, **plain)
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                # Not Linear4bit: its first product on a CPU packs the weight anew, and PEFT's DoRA
                # then reads other weights.
                packed = quantize_4bit(module.weight, quant_type="nf4", compress_statistics=True)
                module.weight.copy_(dequantize_4bit(*packed))
        model = PeftModel.from_pretrained(model, base).eval()
        found["logits_nf4"] = logits(model, tokens)
    np.savez_compressed(base / "reference.npz", **found)


def main(out: Path, names: list[str]) -> None:
    for name, (family, settings) in MORE.items():
        if name in names:
            make_more(out / family, name, settings)
    if names:
        return
    for family in FAMILIES:
        random = torch.Generator().manual_seed(SEED + 1)
        tokens = make_base(family, SHAPE | FAMILIES[family], out / family, random)
        if family == "llama":
            for name in ADAPTERS:
                make_adapter(out / family, name, tokens, random)
    for name, (family, settings) in VARIANTS.items():
        random = torch.Generator().manual_seed(SEED + 1)
        make_base(family, SMALL | settings, out / name, random)
    main(out, list(MORE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
