"""The first half of a run: opens and checks all inputs. Writes no files."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from qlora_jax import config as configs
from qlora_jax.config import Config, QuantConfig
from qlora_jax.data.loader import Batch, Loader
from qlora_jax.formats import peft
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.kernels.select import choose_kernel
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.models import fingerprint, trees
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.quant.codebooks import codebook
from qlora_jax.runtime import manifest, paths, processes
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import choice, examples, resume, rundir, step_count
from qlora_jax.train.assemble import Training, assemble
from qlora_jax.train.examples import Data
from qlora_jax.train.identity import check_identity, starts_as_base
from qlora_jax.train.mesh import describe_mesh, mesh_of, split_over
from qlora_jax.train.offload import Memory
from qlora_jax.train.quantization import held_quantization
from qlora_jax.train.setup import load_run_model, open_model


@dataclasses.dataclass(frozen=True)
class PrepareRequest:
    """The request of the user to run a training.

    Attributes:
      config: config of the run, with the settings that `lora.from_adapter` decides filled in.
      say: function called with lines for the user.
      command: command that reproduces the run, for the report and the manifest.
      resume: whether to continue the run in the run directory.
      overwrite: whether to delete the run in the run directory.
      started: time of the request, from `time.perf_counter`.
    """

    config: Config
    say: Callable[[str], None]
    command: str
    resume: bool
    overwrite: bool
    started: float


@dataclasses.dataclass(frozen=True)
class Opened:
    """The opened inputs of a run, before any weight is read.

    Attributes:
      config: config of the run with `train.steps` set, even if the user gave `train.epochs`.
      checkpoint: opened model files.
      tokenizer: tokenizer of the model.
      data: examples of the run.
      loader: loader of the training batches.
      memory: memory choices.
      mesh: devices over which the model is split; None for one device.
      device: description of the devices.
    """

    config: Config
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    data: Data
    loader: Loader
    memory: Memory
    mesh: Mesh | None
    device: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts on the model for a run's manifest and report.

    Attributes:
      adapted: True if adapters are trained on a frozen base, False if every weight is trained.
      trained: number of trained parameters.
      total: number of all parameters.
      base_hash: hash of the pretrained weights before the first step (`models.fingerprint`).
      quantization: quantization of the linears; None if they are in 16 or 32 bits.
    """

    adapted: bool
    trained: int
    total: int
    base_hash: str
    quantization: QuantConfig | None


@dataclasses.dataclass(frozen=True)
class Built:
    """A training that is ready to begin but has no run directory yet.

    Attributes:
      training: model, step functions and training state.
      loader: loader of the training batches.
      held_out: map from the name of a held-out set to its batches.
      facts: facts on the model.
      changed: warning that the run to resume began with other weights; None if it did not.
    """

    training: Training
    loader: Loader
    held_out: Mapping[str, Sequence[Batch]]
    facts: Facts
    changed: str | None


def open_inputs(asked: PrepareRequest, place: Callable[[DecoderConfig], Memory]) -> Opened:
    """Opens the model and reads the data, after checking that the run may use its directory.

    Args:
      asked: request of the run.
      place: function from the model's shapes to the memory choices; may raise to refuse the run.

    Raises:
      UserError: an input is invalid.
    """
    config, say = asked.config, asked.say
    rundir.check(config, resume=asked.resume, overwrite=asked.overwrite)
    choice.check(config.train)
    if asked.resume and config.train.epochs is None:
        resume.check_steps(Path(config.output), config.train.step_count)
    mesh = mesh_of(config)
    choose_kernel(config, jax.local_devices()[0])  # raises before anything is loaded
    checkpoint, text = open_model(config, say)
    memory = place(checkpoint.config)
    data = examples.read_data(config, text, checkpoint.config.longest_cached)
    choice.check_held_out(config.train, bool(data.held_out))
    loader = examples.loader(config, data, text.pad_id, config.train.seed)
    counted = step_count.with_steps(config, loader.steps_of)
    if asked.resume:
        resume.check_steps(Path(config.output), counted.train.step_count)
    device = describe_mesh(config)
    processes.agree({"configs": configs.digest(config)})
    say(f"{config.method} of {config.model.path} ({checkpoint.description}) on {device}")
    say(examples.describe_data(data))
    if (epochs := config.train.epochs) is not None:
        say(f"{epochs:g} epochs: {counted.train.step_count:,} steps")
    if warning := step_count.describe_warmup(counted):
        say(warning)
    return Opened(counted, checkpoint, text, data, loader, memory, mesh, device)


def build(asked: PrepareRequest, opened: Opened) -> Built:
    """Loads the model and builds its training.

    Raises:
      UserError: an input is invalid.
      RunFailed: fresh adapters change the model's output, or a kernel computes wrong results on
        this device.
    """
    config, data, pad_id = opened.config, opened.data, opened.tokenizer.pad_id
    model, specs = load_run_model(config, opened.checkpoint, asked.say, opened.mesh)
    counts = trees.parameter_counts(model, config.method)
    for line in describe_model(config, model, specs, counts):
        asked.say(line)
    base_hash = fingerprint.base_hash(model, config.method)
    changed = _base_changed(model, config) if asked.resume else None
    parts, layout = trees.split(model, config.method), None
    if opened.mesh is not None:
        parts, layout = split_over(opened.mesh, parts, asked.say)
    if specs and starts_as_base(config):
        check_identity(*parts, config, layout)
    return Built(
        assemble(config, parts, opened.memory, layout=layout),
        opened.loader,
        examples.held_out(config, data, pad_id),
        Facts(bool(specs), *counts, base_hash, held_quantization(config, opened.checkpoint)),
        changed,
    )


def describe_model(
    config: Config, model: Decoder, specs: Mapping[str, AdapterSpec], counts: tuple[int, int]
) -> list[str]:
    """Returns lines on the trained parameters, the quantized linears and the adapter scale.

    Args:
      config: config of the run.
      model: loaded model with its adapters.
      specs: map from module path to adapter spec.
      counts: numbers of (trained, all) parameters.
    """
    trained, total = counts
    lines = [f"trainable: {trained:,} of {total:,} ({trained / total:.3%})"]
    if config.method == "qlora":
        bits, size = trees.quantized_size(model)
        lines.append(f"quantized linears: {bits:.3f} bits per parameter, {size / 2**20:.1f} MiB")
    if scales := sorted({round(spec.scale, 6) for spec in specs.values()}):
        lines.append(f"adapter scale ({config.lora.scaling}): {', '.join(map(str, scales))}")
    return lines


def entries(config: Config, facts: Facts) -> dict[str, Any]:
    """Returns the entries of the manifest about the model.

    Raises:
      UserError: the adapter `lora.from_adapter` cannot be read.
    """
    quant = facts.quantization
    found: dict[str, Any] = {
        "base_hash": facts.base_hash,
        "codebook_sha256": _codebook_hash(quant) if quant else None,
        "quantization": dataclasses.asdict(quant) if quant else None,
    }
    if config.lora.from_adapter is not None and facts.adapted:
        found["from_adapter_sha256"] = peft.sha256(Path(config.lora.from_adapter))
    return found


def _base_changed(model: Decoder, config: Config) -> str | None:
    """Returns a warning if the run to resume began with other weights; else None."""
    folder = Path(config.output)
    if not paths.exists(folder / manifest.NAME):
        return None
    before = manifest.base_hash(manifest.read(folder))
    found = fingerprint.like(before, model, config.method)
    if found == before:
        return None
    return (
        f"warning: the model's weights differ from those at the run's first step (hash {found} "
        f"now, {before} then): the files, the device or a version changed"
    )


def _codebook_hash(quant: QuantConfig) -> str:
    values = codebook(quant.codebook, quant.block_size)
    return hashlib.sha256(values.tobytes()).hexdigest()
