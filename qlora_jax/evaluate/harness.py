"""Adds the model of a run to EleutherAI's lm-evaluation-harness (install the extra `harness`).

The harness accepts only models that were registered by an import. This module registers the model
`qlora_jax`, and then runs the command line of the harness:

    python -m qlora_jax.evaluate.harness --model qlora_jax --model_args run=runs/mine --tasks mmlu

Requests are encoded, cut on the left and scored like those of the harness's model `hf`.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from qlora_jax import config as configs
from qlora_jax.evaluate.score import Pair, rolling, score
from qlora_jax.models.generate import generate
from qlora_jax.runtime import paths
from qlora_jax.runtime.display import progress
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.restore import Restored, from_config, restore

NAME = "qlora_jax"
BATCH = 8
NEW_TOKENS = 256
"""Default number of new tokens if a task sets none; the harness has the same default."""


@register_model(NAME)
class QloraJaxLM(TemplateLM):
    """The model of a run directory, or the model of a config before training.

    Args of `--model_args`:
      run: run directory.
      config: YAML file, instead of `run`.
      base: whether to evaluate the run's model before training.
      batch_size: rows in a batch; `auto` is 8.
      max_length: number of positions; default: that of the model.
    """

    def __init__(
        self,
        run: str | None = None,
        config: str | None = None,
        base: bool = False,
        batch_size: int | str = BATCH,
        max_length: int | None = None,
        max_gen_toks: int = NEW_TOKENS,
        **rest: Any,
    ) -> None:
        """Raises UserError if the arguments or the run cannot be used."""
        super().__init__()
        if unknown := sorted(rest.keys() - {"device", "max_batch_size"}):
            raise UserError(f"model_args: {unknown[0]} is not known; remove it")
        if (run is None) == (config is None):
            raise UserError("model_args: give run=DIR or config=FILE; one of them")
        self.restored = _restore(run, config, base)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else BATCH
        longest = self.restored.model.config.longest
        self.max_length = max_length or longest
        if self.max_length > longest:
            raise UserError(
                f"model_args: max_length {max_length} is beyond the model's {longest} positions; "
                f"give {longest} or less"
            )
        self.max_gen_toks = max_gen_toks

    @property
    def eot_token_id(self) -> int:
        return self.restored.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.restored.tokenizer.fast.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.restored.tokenizer.source.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.restored.tokenizer.template if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.restored.tokenizer.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **rest: Any
    ) -> list[int]:
        text = self.restored.tokenizer
        ids = text.encode(string)
        adds = add_special_tokens is not False and text.bos_id is not None
        return [text.bos_id, *ids] if adds and ids[:1] != [text.bos_id] else ids  # type: ignore[list-item]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [request.args[0] for request in requests]
        windows = [
            rolling(self.tok_encode(text), self.prefix_token_id, self.max_length) for text in texts
        ]
        found = iter(self._score([pair for pairs in windows for pair in pairs]))
        sums = [sum(next(found)[0] for _ in pairs) for pairs in windows]
        for text, total in zip(texts, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: repr(requests[i].args[1]))
        groups = itertools.groupby(order, key=lambda i: repr(requests[i].args[1]))
        with progress("generating", len(requests)) as advance:
            for _, group in groups:
                places = list(group)
                settings = normalize_gen_kwargs(requests[places[0]].args[1], self.max_gen_toks)
                prompts = [self.tok_encode(requests[i].args[0]) for i in places]
                for i, answer in zip(places, self._generate(prompts, settings, advance)):
                    answers[i] = answer
                    self.cache_hook.add_partial("generate_until", requests[i].args, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **rest: Any
    ) -> list[tuple[float, bool]]:
        scores = self._score([Pair(context, given) for _, context, given in requests])
        for (text, _, _), found in zip(requests, scores):
            self.cache_hook.add_partial("loglikelihood", text, found)
        return scores

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        with progress("scoring", len(pairs)) as advance:
            scores = score(
                self.restored.model,
                pairs,
                dtype=self._dtype,
                pad_id=self.restored.tokenizer.pad_id,
                batch_size=self.batch_size,
                max_length=self.max_length,
                advance=advance,
            )
        return [(s.log_likelihood, s.greedy) for s in scores]

    def _generate(
        self, prompts: Sequence[list[int]], settings: Any, advance: Callable[[int], None]
    ) -> list[str]:
        text, new = self.restored.tokenizer, int(settings["max_gen_toks"])
        length = min(self.max_length, self.restored.model.config.longest_cached)
        if (room := length - new) < 1:
            raise UserError(
                f"max_gen_toks {new} leaves no room for a prompt in {length} positions; "
                "lower it by --gen_kwargs"
            )
        answers: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = [ids[-room:] for ids in prompts[start : start + self.batch_size]]
            rows = generate(
                self.restored.model,
                batch,
                max_new_tokens=new,
                stop_ids=text.stop_ids,
                pad_id=text.pad_id,
                dtype=self._dtype,
                temperature=float(settings.get("temperature", 0.0)),
                top_p=float(settings.get("top_p", 1.0)),
            )
            answers += [_until(text.decode(row), settings["until"]) for row in rows]
            advance(len(batch))
        return answers

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.restored.config.model.compute_dtype)


def main() -> None:
    """Runs the command line of the harness, with `--model qlora_jax` registered."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as e:
        sys.exit(f"{NAME}: {e}")


def _restore(run: str | None, config: str | None, base: bool) -> Restored:
    def say(line: str) -> None:
        print(line, file=sys.stderr)

    if run is None:
        return from_config(configs.load_config(str(config)), say)
    if not paths.is_dir(run):
        raise UserError(f"model_args: run={run} is not a run directory; give one, or config=FILE")
    return restore(run, base=base, warn=say)


def _until(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            answer = answer.partition(stop)[0]
    return answer


if __name__ == "__main__":
    main()
