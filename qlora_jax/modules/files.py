"""Writes and reads the adapters of any Flax model: adapter.safetensors and adapter.json."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from qlora_jax.formats import tensors
from qlora_jax.formats.shards import read_header
from qlora_jax.lora.adapter import Adapter
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.where import LISTED
from qlora_jax.modules.adapters import lora_settings, make_adapter, strength
from qlora_jax.runtime import atomic, json_files, paths
from qlora_jax.runtime.errors import UserError

WEIGHTS, DESCRIPTION = "adapter.safetensors", "adapter.json"

FORMAT = 1
"""Version of the format of the folder."""

PARTS = ("a", "b", "magnitude")
"""Names of the arrays of an adapter in a file; only DoRA has `magnitude`."""


class Described(TypedDict):
    """Entry of one weight's adapter in adapter.json."""

    rank: Annotated[int, Field(ge=1, le=2**20, strict=True)]
    alpha: Annotated[float, Field(allow_inf_nan=False)]
    scale: Annotated[float, Field(allow_inf_nan=False)]


class Description(TypedDict):
    """Content of adapter.json; `weights` maps the path of a weight to its entry."""

    format: Literal[1]
    variant: Literal["lora", "dora"]
    weights: dict[str, Described]


_DESCRIPTION = TypeAdapter(Description)


class Saved(NamedTuple):
    """One weight's adapter, as read from a folder.

    Attributes:
      spec: rank, alpha and scale.
      arrays: a [*stack, *batch, K, r], b [*stack, *batch, r, N] and, for DoRA, magnitude
        [*stack, *batch, N].
    """

    spec: AdapterSpec
    arrays: Mapping[str, np.ndarray]


def write(adapters: Mapping[str, Adapter], folder: str | Path) -> None:
    """Writes adapters into a folder, which appears only when all its files are complete.

    Args:
      adapters: path of a weight to its adapter.
      folder: folder to write; an adapter in this folder is replaced.

    Raises:
      UserError: the folder holds other files or cannot be written, or the adapters are of two
        variants.
    """
    folder = Path(folder).expanduser()
    if paths.exists(folder):
        _check_replaceable(folder)
    arrays = {
        f"{path}.{part}": np.asarray(getattr(adapter, part).get_value())
        for path, adapter in adapters.items()
        for part in PARTS
        if hasattr(adapter, part)
    }
    variants = {
        "dora" if hasattr(adapter, "magnitude") else "lora" for adapter in adapters.values()
    }
    if len(variants) > 1:
        raise UserError("one adapter has both variants, lora and dora; name them differently")
    weights = {
        path: {"rank": spec.rank, "alpha": spec.alpha, "scale": spec.scale}
        for path, adapter in adapters.items()
        if (spec := adapter.spec())
    }
    described = {"format": FORMAT, "variant": variants.pop(), "weights": weights}
    with atomic.atomic_folder(folder) as new:
        tensors.save(arrays, new / WEIGHTS)
        (new / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def named(adapters: Iterable[tuple[str, str, Adapter]], name: str | None) -> dict[str, Adapter]:
    """Returns the adapters with one name, by the path of their weight.

    Args:
      adapters: path of the weight, name and adapter, for each adapter of a model.
      name: name of the adapter; None if the model has adapters of only one name.

    Raises:
      UserError: no adapter has this name, or `name` is None and there are several names.
    """
    found = list(adapters)
    names = sorted({own for _, own, _ in found})
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        have = ", ".join(names) or "no adapter"
        raise UserError(f"save_adapter: the model has {have}; give the name of one")
    return {path: adapter for path, own, adapter in found if own == name}


def read(folder: str | Path) -> tuple[str, dict[str, Saved]]:
    """Reads the adapters that `write` has written into a folder.

    Returns:
      The variant, lora or dora, and path of a weight to its adapter.

    Raises:
      UserError: a file is missing or damaged, or its content does not fit adapter.json.
    """
    folder = Path(folder).expanduser()
    file = folder / DESCRIPTION
    content = json_files.read_object(
        file, "save the adapter again", "no such file; give a folder that save_adapter has written"
    )
    try:
        described = _DESCRIPTION.validate_python(content)
    except ValidationError as e:
        where = ".".join(map(str, e.errors()[0]["loc"]))
        raise UserError(
            f"{file}: {where}: {e.errors()[0]['msg']}; save the adapter again"
        ) from None
    stored = read_header(folder / WEIGHTS)
    needed = PARTS if described["variant"] == "dora" else PARTS[:2]
    found = {}
    for path, own in described["weights"].items():
        names = {part: f"{path}.{part}" for part in needed}
        for name in names.values():
            if name not in stored:
                raise UserError(f"{folder / WEIGHTS}: {name} is missing; save the adapter again")
        arrays = {part: stored[name].read() for part, name in names.items()}
        _check_shapes(folder / WEIGHTS, path, own["rank"], arrays)
        found[path] = Saved(AdapterSpec(own["rank"], own["alpha"], own["scale"]), arrays)
    return described["variant"], found


def _check_shapes(file: Path, path: str, rank: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises UserError if the shapes of an adapter's arrays do not fit each other or the rank."""
    a, b = arrays["a"].shape, arrays["b"].shape
    if len(a) < 2 or a[:-2] != b[:-2] or a[-1] != b[-2] or a[-1] != rank:
        raise UserError(
            f"{file}: {path}: a {a} with b {b} does not have the rank in {DESCRIPTION}, {rank}; "
            "save the adapter again"
        )
    if (m := arrays.get("magnitude")) is not None and m.shape != (*b[:-2], b[-1]):
        raise UserError(f"{file}: {path}: magnitude {m.shape} does not fit b {b}; save it again")


def check_fits(
    folder: str | Path, saved: Mapping[str, Saved], weights: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises UserError if a weight of a saved adapter is not in the model, or has another shape.

    Args:
      folder: folder of the adapters, for the error.
      saved: path of a weight to its saved adapter.
      weights: path of each of the model's weights to the shape (*stack, *batch, K, N).
    """
    wrong = []
    for path, (_, arrays) in saved.items():
        *_, k, _ = arrays["a"].shape
        shape = (*arrays["b"].shape[:-2], k, arrays["b"].shape[-1])
        if weights.get(path) != shape:
            have = f"{weights[path]} in the model" if path in weights else "not in the model"
            wrong.append(f"{path} is {shape} in the adapter and {have}")
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise UserError(f"{folder}: is for another model: {'; '.join(wrong[:LISTED])}{more}")


def built(path: str, weight: Any, variant: str, saved: Saved) -> Adapter:
    """Makes an adapter with saved values for a weight of matrices [*stack, *batch, K, N]."""
    lora = lora_settings(variant=variant, rank=saved.spec.rank, alpha=saved.spec.alpha)
    _, adapter = make_adapter(path, weight, lora, saved.spec, jax.random.key(0))
    replace_values(adapter, saved)
    return adapter


def replace_values(adapter: Adapter, saved: Saved) -> None:
    """Replaces an adapter's values by saved values of the same shapes, and switches it on."""
    for part, array in saved.arrays.items():
        getattr(adapter, part).set_value(jnp.asarray(array))
    adapter.specs = (saved.spec,) * len(adapter.specs)
    strength(adapter, True)


def fits(adapter: Adapter, saved: Saved) -> bool:
    """Checks if saved values have the same parts and shapes as an adapter."""
    parts = {part for part in PARTS if hasattr(adapter, part)}
    return parts == saved.arrays.keys() and all(
        getattr(adapter, part).get_value().shape == array.shape
        for part, array in saved.arrays.items()
    )


def _check_replaceable(folder: Path) -> None:
    if not paths.is_dir(folder):
        raise UserError(f"{folder}: is a file, not a folder; give another folder")
    if other := sorted({p.name for p in folder.iterdir()} - {WEIGHTS, DESCRIPTION}):
        raise UserError(
            f"{folder}: holds {other[0]}, which is not an adapter's; give an empty or a new folder"
        )
