"""Reads the rotary position embeddings (ropes) from a config.json, as transformers does.

If a value is given twice, the precedence is that of transformers 5.24
(`convert_rope_params_to_dict` and `standardize_rope_params`), which reads the files of
transformers 4 too. "Inside" means in the object `rope_scaling` or `rope_parameters`, "outside"
means at the top level of config.json:

- `rope_scaling` replaces `rope_parameters` unless it is empty. In a family with one rope for each
  kind of layer (Gemma 3), it updates `rope_parameters.full_attention` instead.
- `rope_type` comes before `type`.
- `rope_theta` and `partial_rotary_factor`: the value inside comes before the value outside.
- `original_max_position_embeddings`: the value outside comes before the value inside; the default
  is `max_position_embeddings`. Gemma 3 reads only the value inside.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.models.families import Family
from qlora_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Settings of a rotary position embedding of the first `fraction` of a head's channels.

    Attributes:
      theta: base of the frequencies.
      fraction: rotated part of a head, from 0 to 1.
      kind: a key of `READERS`. The reader of the kind sets the fields below that the kind uses.
      factor: ratio of the sequence length after the scaling to the length before it.
      low_freq_factor, high_freq_factor: limits of llama3, in turns over `original_positions`. A
        frequency with at most low_freq_factor turns is divided by `factor`; one with at least
        high_freq_factor turns is kept.
      original_positions: number of positions before the scaling. With dynamic and longrope, a
        longer sequence has other frequencies.
      beta_fast, beta_slow: limits of yarn, in turns over `original_positions`. A frequency with at
        least beta_fast turns is kept; one with at most beta_slow turns is divided by `factor`.
      truncate: whether yarn rounds the channel indices of these two limits to whole numbers.
      short, long: longrope's divisors of the frequencies in short and in long sequences, one for
        each pair of channels.
      attention_factor: factor on cosine and sine.
    """

    theta: float = 10000.0
    fraction: float = 1.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    attention_factor: float = 1.0

    @property
    def varies(self) -> bool:
        """Whether sequences longer than `original_positions` have other frequencies."""
        return self.kind in ("dynamic", "longrope")

    @property
    def reach(self) -> int:
        """Number of positions that dynamic and yarn are scaled for; 0 for the other kinds."""
        stated = self.kind in ("dynamic", "yarn")
        return int(self.factor * self.original_positions) if stated else 0


KINDS_OF_LAYERS = ("full_attention", "sliding_attention")


def read_ropes(
    raw: Mapping[str, Any], family: Family, head_dim: int, positions: int, where: str
) -> tuple[Rope, Rope | None]:
    """Reads the ropes of a config.json.

    Args:
      raw: content of the file under the usual keys, with the family's defaults.
      family: family of the file's `model_type`.
      head_dim: number of channels of a head.
      positions: value of `max_position_embeddings`.
      where: name of the file, for messages.

    Returns:
      The rope; the rope of the layers with a window, None if they use the same rope.

    Raises:
      UserError: a scaling is not supported, or a value cannot be used.
      KeyError: a key that the scaling needs is missing.
      TypeError, ValueError, ZeroDivisionError: a value makes no sense.
    """
    stated: dict[str, Mapping[str, Any] | None] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{key} is {value!r}, not an object")
        stated[key] = value
    scaling, parameters = stated["rope_scaling"], stated["rope_parameters"]
    given: dict[str, Any] = {"max_position_embeddings": positions}
    if raw.get("partial_rotary_factor") is not None:
        given["partial_rotary_factor"] = raw["partial_rotary_factor"]
    theta = raw.get("rope_theta", 10000.0)

    def read(place: str, values: Mapping[str, Any]) -> Rope:
        return _Settings({**given, **values}, family, head_dim, f"{where}: {place}").rope()

    if "rope_local_base_freq" in family.defaults:
        full, local = _by_layers(scaling, parameters, where)
        beside = {"rope_theta": raw["rope_local_base_freq"]}
        return (
            read("rope of full_attention", {"rope_theta": theta, **full}),
            read("rope of sliding_attention", {**beside, **local}),
        )
    place = "rope_scaling" if scaling else "rope_parameters"
    settings = scaling or parameters or {}
    for key in KINDS_OF_LAYERS:
        if key in settings:
            raise UserError(
                f"{where}: {place}.{key} is not supported: this model_type has one rope for all "
                f"layers; write the settings directly into {place}"
            )
    original = "original_max_position_embeddings"
    outside = {original: raw[original]} if original in raw else {}
    return read(place, {"rope_theta": theta, **settings, **outside}), None


def _by_layers(
    scaling: Mapping[str, Any] | None, parameters: Mapping[str, Any] | None, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the rope settings of the layers with full attention and of those with a window."""
    if parameters is None:
        parameters = {key: {"rope_type": "default"} for key in KINDS_OF_LAYERS}
    for key in KINDS_OF_LAYERS:
        value = parameters.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"rope_parameters.{key} is {value!r}, not an object")
    full, local = (parameters.get(key) for key in KINDS_OF_LAYERS)
    if scaling is not None and full is None:
        raise UserError(
            f"{where}: rope_scaling beside rope_parameters without full_attention is not "
            "supported; write the scaling into rope_parameters.full_attention"
        )
    # transformers reads this key, and no other, beside full_attention and sliding_attention
    truncate = {"truncate": parameters.get("truncate", True)}
    return {**(full or {}), **(scaling or {}), **truncate}, {**(local or {}), **truncate}


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of one rope in a config.json, under transformers' keys."""

    values: Mapping[str, Any]
    family: Family
    head_dim: int
    where: str

    def rope(self) -> Rope:
        stated = self.values.get("rope_type", self.values.get("type", "default"))
        kind = self.family.ropes.get(stated)
        if kind is None:
            raise UserError(
                f"{self.where}: rope scaling {stated!r} is not supported; "
                f"give a model with one of: {', '.join(self.family.ropes)}"
            )
        theta, fraction = self.positive("rope_theta"), self._fraction(kind)
        return Rope(theta=theta, fraction=fraction, kind=kind, **READERS[kind](self))

    @property
    def rotated(self) -> int:
        """Number of channels of a head that a kind other than default rotates."""
        return int(self.head_dim * self.values.get("partial_rotary_factor", 1.0))

    def number(self, key: str) -> float:
        """Returns the value of a key, which must be a finite number.

        Raises:
          KeyError: the key is missing.
          UserError: the value is not a finite number.
        """
        return self._checked(key, self.values[key])

    def positive(self, key: str, default: float | None = None) -> float:
        """Returns the value of a key, which must be a finite number above 0.

        A missing key gives `default`, or KeyError if `default` is None.
        """
        value = self.values[key] if default is None else self.values.get(key, default)
        if not self._checked(key, value) > 0:
            raise UserError(f"{self.where}: {key} {value!r} is not supported; give more than 0")
        return float(value)

    def original_positions(self) -> int:
        beside = self.values["max_position_embeddings"]
        value = self.positive("original_max_position_embeddings", beside)
        if value != int(value):
            raise UserError(
                f"{self.where}: original_max_position_embeddings {value} is not a whole "
                "number; correct it"
            )
        return int(value)

    def divisors(self, key: str) -> tuple[float, ...]:
        values = self.values[key]
        if not isinstance(values, list | tuple) or 2 * len(values) != self.rotated:
            raise UserError(
                f"{self.where}: {key} is not a list of {self.rotated / 2:g} numbers, one for each "
                "pair of rotated channels; correct it"
            )
        divisors = tuple(self._checked(key, value) for value in values)
        if not all(divisor > 0 for divisor in divisors):
            raise UserError(f"{self.where}: {key} holds {min(divisors)}; give more than 0")
        return divisors

    def _checked(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {key} {value!r} is not a number; correct it")
        if not math.isfinite(value):
            raise UserError(f"{self.where}: {key} {value!r} is not a finite number; correct it")
        return float(value)

    def _fraction(self, kind: str) -> float:
        key = "partial_rotary_factor"
        if key in {*self.family.keys, *self.family.defaults}:
            fraction = self.number(key)
            if not 0 <= fraction <= 1:
                raise UserError(f"{self.where}: {key} {fraction} is not from 0 to 1; correct it")
            return fraction
        # The other families rotate whole heads: transformers' default rope ignores the key; its
        # scaled ropes compute too few frequencies and fail.
        if kind != "default" and key in self.values:
            self.number(key)
            if self.rotated != self.head_dim:
                raise UserError(
                    f"{self.where}: {key} {self.values[key]} beside a rope scaling is not "
                    "supported: this model_type rotates whole heads; remove it"
                )
        return 1.0


def _default(settings: _Settings) -> dict[str, Any]:
    return {}


def _linear(settings: _Settings) -> dict[str, Any]:
    return {"factor": settings.positive("factor")}


def _dynamic(settings: _Settings) -> dict[str, Any]:
    if settings.rotated <= 2:
        raise UserError(
            f"{settings.where}: dynamic with {settings.rotated} rotated channels is not supported; "
            "it needs more than 2: correct partial_rotary_factor or rope_type"
        )
    positions = int(settings.positive("max_position_embeddings"))
    return {"factor": settings.positive("factor"), "original_positions": positions}


def _llama3(settings: _Settings) -> dict[str, Any]:
    low, high = settings.positive("low_freq_factor"), settings.positive("high_freq_factor")
    if not low < high:
        raise UserError(
            f"{settings.where}: high_freq_factor {high:g} is not above low_freq_factor {low:g}; "
            "correct one of them"
        )
    return {
        "factor": settings.positive("factor"),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_positions": settings.original_positions(),
    }


def _yarn(settings: _Settings) -> dict[str, Any]:
    if settings.rotated % 2 or settings.values["rope_theta"] == 1:
        raise UserError(
            f"{settings.where}: yarn with rope_theta 1 or an odd number of rotated channels "
            f"({settings.rotated}) is not supported; correct rope_theta or partial_rotary_factor"
        )
    original, values = settings.original_positions(), settings.values
    factor = _ratio(settings, original) if values["factor"] is None else settings.positive("factor")
    if values.get("attention_factor") is not None:
        attention = settings.number("attention_factor")
    elif values.get("mscale") and values.get("mscale_all_dim"):
        attention = _mscale(factor, settings.number("mscale"))
        attention /= _mscale(factor, settings.number("mscale_all_dim"))
    else:
        attention = _mscale(factor, 1.0)
    return {
        "factor": factor,
        "original_positions": original,
        "beta_fast": settings.positive("beta_fast") if values.get("beta_fast") else 32.0,
        "beta_slow": settings.positive("beta_slow") if values.get("beta_slow") else 1.0,
        "truncate": bool(values.get("truncate", True)),
        "attention_factor": attention,
    }


def _mscale(factor: float, mscale: float) -> float:
    """Returns YaRN's attention factor (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(settings: _Settings) -> dict[str, Any]:
    original, values = settings.original_positions(), settings.values
    stated = values.get("factor") is not None
    factor = settings.positive("factor") if stated else _ratio(settings, original)
    if values.get("attention_factor") is not None:
        attention = settings.number("attention_factor")
    else:
        grown = factor > 1
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if grown else 1.0
    return {
        "original_positions": original,
        "short": settings.divisors("short_factor"),
        "long": settings.divisors("long_factor"),
        "attention_factor": attention,
    }


def _ratio(settings: _Settings, original: int) -> float:
    return settings.positive("max_position_embeddings") / original


READERS: Mapping[str, Callable[[_Settings], dict[str, Any]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
"""Kind of a rope to the function that reads the fields of `Rope` of this kind."""
