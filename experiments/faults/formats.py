"""Formats that the campaign damages: how to make an undamaged example of each, and to read it."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments.faults.common import SWEEP, Campaign, command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """One kind of input.

    Attributes:
      name: name of the example's folder.
      files: names of the files in the folder to damage; a repeated name is damaged more often.
      read: function that reads the folder as the program does, without compiling anything.
      arguments: command that reads the folder, `{}` stands for the folder; empty for no command.
    """

    name: str
    files: Sequence[str]
    read: Callable[[Path], object]
    arguments: Sequence[str]


def read_model(folder: Path) -> None:
    """Opens a model and reads each of its tensors."""
    from qlora_jax.config import ModelConfig
    from qlora_jax.formats.source import open_checkpoint

    path = folder / "model.gguf"
    checkpoint = open_checkpoint(ModelConfig(path=str(path if path.exists() else folder)))
    for name in checkpoint.names():
        checkpoint.read(name)


def read_tokenizer(folder: Path) -> None:
    """Loads a tokenizer; encodes, decodes and renders text with the tokenizer."""
    from qlora_jax.text import tokenizer

    path = folder / "model.gguf"
    text = tokenizer.load_tokenizer(path if path.exists() else folder)
    text.decode(text.encode("What does zip do? \u00e9\u4f60 1234"))
    if text.has_chat_template:
        text.render([{"role": "user", "content": "a"}], add_generation_prompt=True)


def read_gguf(folder: Path) -> None:
    """Reads the model and the tokenizer of a .gguf file."""
    read_model(folder)
    read_tokenizer(folder)


def read_adapter(folder: Path) -> None:
    """Reads an adapter and checks that it fits its base model."""
    from qlora_jax.config import ModelConfig
    from qlora_jax.formats import peft
    from qlora_jax.formats.source import open_checkpoint

    found = peft.read_adapter(folder)
    base = open_checkpoint(ModelConfig(path=str(folder.parent / "base")))
    peft.check_fits(found, base.config, folder)


def read_data(folder: Path) -> None:
    """Reads a data set and encodes its training records."""
    from qlora_jax.config import DataConfig
    from qlora_jax.data import encode, sources
    from qlora_jax.text import tokenizer

    (path,) = folder.iterdir()
    config = DataConfig(source=str(path), sequence_length=128, eval_fraction=0.1)
    split = sources.read(config)
    encode.encode(split.train, tokenizer.load_tokenizer(folder.parent / "base"), config)


def read_questions(folder: Path) -> None:
    """Reads multiple-choice questions."""
    from qlora_jax.evaluate import questions

    (path,) = folder.iterdir()
    questions.read(str(path), "test")


def read_config(folder: Path) -> None:
    """Reads a config."""
    from qlora_jax import config

    config.load_config(folder / "config.yaml")


def read_run(folder: Path) -> None:
    """Reads the records of a run: its config, manifest and metrics."""
    from qlora_jax.runtime import manifest
    from qlora_jax.train import metrics, rundir

    rundir.open_run(str(folder))
    manifest.base_hash(manifest.read(folder))
    metrics.read_metrics(folder / "metrics.jsonl")


def read_results(folder: Path) -> None:
    """Reads the results of a sweep and computes its verdict."""
    from qlora_jax.runtime.errors import RunFailed
    from qlora_jax.sweep import find, results
    from qlora_jax.sweep.conclude import conclude

    experiment = find.load_experiment(folder / "experiment.py")
    with contextlib.suppress(RunFailed):  # the figures allow no verdict
        conclude(experiment, results.read(folder, experiment), folder)


FORMATS = (
    Format(
        name="model",
        files=("config.json", "config.json", "model.safetensors", "generation_config.json"),
        read=read_model,
        arguments=("quantize", "{}", "{}.out"),
    ),
    Format(
        name="sharded",
        files=("model.safetensors.index.json", "config.json"),
        read=read_model,
        arguments=("quantize", "{}", "{}.out"),
    ),
    Format(
        name="quantized",
        files=("config.json", "model.safetensors"),
        read=read_model,
        arguments=("train", "{}.yaml", "--preview=1", "--model.path={}"),
    ),
    Format(
        name="gguf",
        files=("model.gguf",),
        read=read_gguf,
        arguments=("quantize", "{}/model.gguf", "{}.out"),
    ),
    Format(
        name="tokenizer",
        files=("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        read=read_tokenizer,
        arguments=("train", "{}.yaml", "--preview=1", "--model.path={}"),
    ),
    Format(
        name="adapter",
        files=("adapter_config.json", "adapter_config.json", "adapter_model.safetensors"),
        read=read_adapter,
        arguments=("combine", "{}", "{}", "--out={}.out"),
    ),
    *(
        Format(
            name=f"data_{kind}",
            files=(f"x.{kind}",),
            read=read_data,
            arguments=("train", "{}.yaml", "--preview=1", f"--data.source={{}}/x.{kind}"),
        )
        for kind in ("jsonl", "json", "csv", "parquet", "txt")
    ),
    *(
        Format(
            name=f"questions_{kind}",
            files=(f"x.{kind}",),
            read=read_questions,
            arguments=(),
        )
        for kind in ("jsonl", "csv")
    ),
    Format(
        name="config",
        files=("config.yaml",),
        read=read_config,
        arguments=("train", "{}/config.yaml", "--preview=1"),
    ),
    Format(
        name="run",
        files=("config.yaml", "manifest.json", "metrics.jsonl"),
        read=read_run,
        arguments=("generate", "{}", "--prompt=zip", "--max-new-tokens=2"),
    ),
    Format(
        name="results",
        files=("results.jsonl",),
        read=read_results,
        arguments=("sweep", "{}/experiment.py", "--out={}", "--analyse-only"),
    ),
)


def make(campaign: Campaign) -> Path:
    """Makes a folder with an undamaged example of each format and the model `base`; returns it.

    Raises:
      RuntimeError: a command that makes an example failed.
    """
    seeds = campaign.folder / "formats"
    if seeds.exists():
        return seeds
    seeds.mkdir()
    for name in ("base", "model", "tokenizer", "sharded"):
        shutil.copytree(campaign.model, seeds / name)
    _shard(seeds / "sharded")
    config = campaign.config(seeds / "a.yaml", train__steps=4, train__save_every=2)
    run, results = seeds / "run", seeds / "results"
    results.mkdir()
    (results / "experiment.py").write_text(SWEEP, encoding="utf-8")
    for arguments in (
        ("train", config),
        ("export", run, seeds / "adapter"),
        ("quantize", campaign.model, seeds / "quantized"),
        ("sweep", results / "experiment.py", "--out", results),
    ):
        ended = command(*arguments)
        if ended.code != 0:
            raise RuntimeError(f"{arguments}: {ended.err[-500:]}")
    (seeds / "config").mkdir()
    shutil.copyfile(config, seeds / "config" / "config.yaml")
    (seeds / "gguf").mkdir()
    write_gguf(campaign.model, seeds / "gguf" / "model.gguf")
    _data(campaign, seeds)
    return seeds


def _shard(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _data(campaign: Campaign, seeds: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [json.loads(line) for line in campaign.chats.read_text().splitlines()]
    pairs = [
        {"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]}
        for row in rows
    ]
    asked = [
        {"question": f"q {i}", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(9)
    ]
    for kind in ("jsonl", "json", "csv", "parquet", "txt"):
        (seeds / f"data_{kind}").mkdir()
    shutil.copyfile(campaign.chats, seeds / "data_jsonl" / "x.jsonl")
    (seeds / "data_json" / "x.json").write_text(json.dumps(pairs))
    text = "prompt,completion\n" + "".join(
        f'"{pair["prompt"]}","{pair["completion"]}"\n' for pair in pairs
    )
    (seeds / "data_csv" / "x.csv").write_text(text)
    parquet.write_table(pyarrow.Table.from_pylist(rows), seeds / "data_parquet" / "x.parquet")
    (seeds / "data_txt" / "x.txt").write_text("\n\n".join(pair["prompt"] for pair in pairs * 9))
    for kind in ("jsonl", "csv"):
        (seeds / f"questions_{kind}").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in asked)
    (seeds / "questions_jsonl" / "x.jsonl").write_text(lines)
    lines = "".join(f"q {i},a,b,c,d,{'ABCD'[i % 4]}\n" for i in range(9))
    (seeds / "questions_csv" / "x.csv").write_text(lines)


def write_gguf(model: Path, path: Path) -> None:
    """Writes the Llama of a Hugging Face folder as GGUF, as llama.cpp's converter does."""
    import gguf
    from safetensors.numpy import load_file

    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    backend = json.loads((model / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    ids = backend["model"]["vocab"] | {t["content"]: t["id"] for t in backend["added_tokens"]}
    special = {token["content"] for token in backend["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(kinds)
    merges = backend["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(next(ids[t] for t in tokens if t in special))
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module not in outer:
            layer, _, part = module.removeprefix("model.layers.").partition(".")
            outer[module] = f"blk.{layer}.{parts[part]}"
        writer.add_tensor(f"{outer[module]}.weight", tensor.astype("float32"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
