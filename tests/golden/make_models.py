"""Makes tests/golden/models: tiny random decoders and adapters with their logits.

Run in an environment with torch, transformers, peft and bitsandbytes:

    python tests/golden/make_models.py tests/golden/models [name ...]

Every model is a Hugging Face folder with `reference.npz`: `tokens` [2, 33] and the float32
`logits` that transformers computes for them with eager attention. `llama/peft_lora` and
`llama/peft_rslora` are adapters made by PEFT, with a nonzero B, and the logits of the adapted
model. `llama/peft_patterns` has ranks and alphas that differ between modules. The models of
`VARIANTS` are smaller; each covers one family or one feature: scaled rotary embeddings, sliding
windows, biases. The adapters of `MORE` are smaller; `MORE` names the base of each, and their logits
are for the first row of tokens. They cover DoRA (with magnitudes moved as by training), modules
trained whole, biases, and DoRA on the base's linears in bitsandbytes' NF4 (`logits_nf4`).
`llama/bnb_nf4` is the llama in bitsandbytes' NF4 with double quantization, computed in float32.
`llama_bnb_fp4` is a random model in FP4 whose blocks of 64 cross rows (hidden size 96, inner size
80), with one linear left in float32. Its logits come from weights that this script dequantizes one
by one, because bitsandbytes' CPU kernel is wrong for such rows. Names after the folder limit the
work to those models. The files in the repository came from transformers 5.23.0, PEFT 0.21.2 and
torch 2.13.0.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

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
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "pad_token_id": None}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": (
        "phi3",
        {
            "tie_word_embeddings": False,
            "sliding_window": 20,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "layer_norm_eps": 1e-5},
    ),
    "opt": (
        "opt",
        {"ffn_dim": 64, "word_embed_proj_dim": 32, "num_key_value_heads": 4},
    ),
}
ADAPTED = ("phi3", "gpt_neox")
"""Variants that also get a `peft_lora`; one adapter covers each fused linear."""
ADAPTERS = {
    "peft_lora": {},
    "peft_rslora": {"use_rslora": True},
    "peft_patterns": {
        "target_modules": r".*\.(self_attn\.[qv]_proj|mlp\.down_proj)",
        # The first matching pattern wins. PEFT writes the patterns in alphabetical order.
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
    # Norms differ from one and biases from zero, so that ignoring one changes the logits.
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


def load_4bit(folder: Path, **settings: object) -> torch.nn.Module:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=quantization,
        device_map={"": "cpu"},
        dtype=torch.float32,
        attn_implementation="eager",
    )
    # train(): in evaluation mode bitsandbytes may repack the weights and compute in bfloat16.
    return model.train()


def make_nf4(base: Path, tokens: torch.Tensor) -> None:
    model = load_4bit(base, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model.save_pretrained(base / "bnb_nf4")
    np.savez_compressed(base / "bnb_nf4" / "reference.npz", logits=logits(model, tokens))


@torch.no_grad()
def make_fp4(out: Path, random: torch.Generator) -> None:
    settings = SMALL | {"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 3}
    with tempfile.TemporaryDirectory() as work:
        tokens = make_base("llama", settings | {"tie_word_embeddings": False}, Path(work), random)
        skipped = ["lm_head", "model.layers.1.mlp.up_proj"]
        model = load_4bit(Path(work), bnb_4bit_quant_type="fp4", llm_int8_skip_modules=skipped)
        plain = AutoModelForCausalLM.from_pretrained(work, attn_implementation="eager").float()
    model.save_pretrained(out)
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            packed = module.weight.data.flatten()
            codes = torch.stack([packed >> 4, packed & 15], -1).flatten().long()
            scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
            values = (state.code[codes] * scales).reshape(state.shape)
            plain.get_submodule(name).weight.copy_(values)
    np.savez_compressed(
        out / "reference.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits(plain, tokens),
    )


@torch.no_grad()
def make_more(folder: Path, name: str, settings: dict) -> None:
    base = folder / name
    tokens = torch.from_numpy(np.load(folder / "reference.npz")["tokens"][:1]).long()
    random = torch.Generator().manual_seed(SEED + 2)
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, **plain)
    config = LoraConfig(**{"lora_alpha": 16, "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(SEED)
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
    (base / "README.md").unlink()
    found = {"logits": logits(model, tokens)}
    if name == "peft_dora":
        model = AutoModelForCausalLM.from_pretrained(folder, **plain)
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                # Linear4bit cannot be used: its first product on a CPU repacks the weight, and
                # PEFT's DoRA then reads wrong values.
                packed = quantize_4bit(module.weight, quant_type="nf4", compress_statistics=False)
                module.weight.copy_(dequantize_4bit(*packed))
        model = PeftModel.from_pretrained(model, base).eval()
        found["logits_nf4"] = logits(model, tokens)
    np.savez_compressed(base / "reference.npz", **found)


def main(out: Path, only: list[str]) -> None:
    for family in FAMILIES:
        if only and family not in only:
            continue
        random = torch.Generator().manual_seed(SEED + 1)
        tokens = make_base(family, SHAPE | FAMILIES[family], out / family, random)
        if family == "llama":
            for name in ADAPTERS:
                make_adapter(out / family, name, tokens, random)
            make_nf4(out / family, tokens)
    for name, (family, settings) in VARIANTS.items():
        if only and name not in only:
            continue
        random = torch.Generator().manual_seed(SEED + 1)
        tokens = make_base(family, SMALL | settings, out / name, random)
        if name in ADAPTED:
            make_adapter(out / name, "peft_lora", tokens, random)
    if not only or "llama_bnb_fp4" in only:
        make_fp4(out / "llama_bnb_fp4", torch.Generator().manual_seed(SEED + 1))
    for name, (family, settings) in MORE.items():
        if not only or name in only:
            make_more(out / family, name, settings)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
