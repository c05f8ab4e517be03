"""Finds the modules of a model that an adapter_config.json covers, by the rules of PEFT."""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from qlora_jax.lora.patterns import BadPattern, match, named
from qlora_jax.runtime.errors import UserError

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True)
class Targets:
    """The settings of an adapter that choose its modules, by PEFT's names.

    Attributes:
      target_modules: names that a module's path ends in, a regular expression that matches the
        whole path, or `ALL_LINEAR`.
      exclude_modules: names, or a regular expression, of modules that get no adapter.
      layers_to_transform: indices of the layers that get adapters; empty: all layers. Applies only
        if `target_modules` is a list of names.
      layers_pattern: names before the layer index in a path; empty: any name.
      modules_to_save: names of modules that are trained whole; they and the modules inside them
        get no adapter.
    """

    target_modules: Sequence[str] | str
    exclude_modules: Sequence[str] | str = ()
    layers_to_transform: Collection[int] = ()
    layers_pattern: Sequence[str] = ()
    modules_to_save: Sequence[str] = ()

    def covered(
        self, linears: Collection[str], others: Collection[str], where: object
    ) -> list[str]:
        """Returns the paths of the modules that get an adapter.

        Args:
          linears: paths of the model's linears without the head.
          others: paths of the head and the embedding, which `ALL_LINEAR` leaves out.
          where: file of the settings, for messages.

        Raises:
          UserError: a setting is not a regular expression, or takes too long.
        """
        everything = self.target_modules
        if isinstance(everything, str) and everything.lower() == ALL_LINEAR:
            return [path for path in linears if not self._left_out(path, where)]
        return [
            path
            for path in (*linears, *others)
            if self._targeted(path, where) and not self._left_out(path, where)
        ]

    def _targeted(self, path: str, where: object) -> bool:
        if isinstance(self.target_modules, str):
            return _match(path, self.target_modules, f"{where}: target_modules") is not None
        if path in self.target_modules:  # layers_to_transform does not apply to a whole path
            return True
        found = any(named(path, target) for target in self.target_modules)
        return found and (not self.layers_to_transform or self._in_layers(path, where))

    def _in_layers(self, path: str, where: object) -> bool:
        for name in self.layers_pattern or (r".*?\.[^.]*",):
            around = r"(.*?\.)?({})\.(?P<index>\d+)\..*"
            if found := _match(path, name, f"{where}: layers_pattern", around):
                return int(found["index"]) in self.layers_to_transform
        return False

    def _left_out(self, path: str, where: object) -> bool:
        if isinstance(self.exclude_modules, str):
            out = _match(path, self.exclude_modules, f"{where}: exclude_modules") is not None
        else:
            out = any(named(path, name) for name in self.exclude_modules)
        # A module that is trained whole gets no adapter; the modules inside it get none either.
        around = r"(.*\.)?{}(\..*)?"
        return out or any(
            _match(path, name, f"{where}: modules_to_save", around) for name in self.modules_to_save
        )


def _match(path: str, pattern: str, where: str, around: str = "{}") -> Any:
    try:
        return match(path, pattern, around)
    except BadPattern as e:
        raise UserError(f"{where}: {e}") from None


def short_names(paths: Collection[str], modules: Collection[str]) -> list[str]:
    """Returns short `target_modules` that cover exactly these modules of the model.

    Args:
      paths: paths of the modules to cover.
      modules: paths of all modules of the model that PEFT can adapt.

    Returns:
      The last parts of the paths, such as q_proj; the whole paths if those cover other modules.
    """
    short = sorted({path.rpartition(".")[2] for path in paths})
    claimed = {path for path in modules if any(named(path, name) for name in short)}
    return short if claimed == set(paths) else sorted(paths)
