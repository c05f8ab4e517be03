"""The command `qlora-jax chat`."""

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_jax.commands.common import (
    add_adapter_options,
    add_sampling_options,
    by_name,
    say,
    start_jax,
)
from qlora_jax.runtime.errors import Terminated, UserError
from qlora_jax.runtime.streams import to_read
from qlora_jax.train.interrupt import Requests

if TYPE_CHECKING:
    from qlora_jax.serve.conversation import Conversation, TimedAnswer
    from qlora_jax.serve.lineup import ModelWithAdapters

TEXT = "Chat with a run's model or a plain model in the terminal; switch between adapters."

EPILOG = """Each line is a turn, and the whole conversation goes through the model's chat template.
/help lists the chat's commands. Ctrl-C stops an answer; its text so far stays in the conversation.
Ctrl-D ends the chat. The first --adapter answers first, else the run's adapter. Lines may come from
a pipe: then only answers go to stdout, and the exit code is 2 if a line got no answer."""

MOST = 512
BURST = 2
"""Number of tokens between two pieces of text; Ctrl-C acts after at most so many tokens."""
SMALLEST = 512
"""Smallest number of positions of the cache: to compile a program for each smaller size would take
longer than to decode with this many positions."""
PATIENCE = 2.0
"""Seconds without text after which a line says why the answer takes long."""

HELP = """/adapter        lists the adapters
/adapter NAME   switches to another adapter; base is the model without an adapter
/system TEXT    changes the system turn; /system shows it, /system "" removes it
/reset          begins a new conversation
/exit           ends the chat, as Ctrl-D does; Ctrl-C stops an answer
//TEXT          sends /TEXT to the model"""

ENDS: Mapping[str, str] = {
    "length": "the answer was cut at --max-new-tokens {most}; ask to go on, or give more",
    "full": "the answer was cut: the conversation fills the model's {length} positions; /reset "
    "begins a new one",
    "interrupted": "stopped; the text so far stays in the conversation",
}
"""Maps the reason for the end of an answer to a line for the user; `stop` has no line."""
UNSAID = "stopped before the answer began; the question is not in the conversation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chat` to its parser."""
    parser.epilog = EPILOG
    parser.add_argument(
        "path", metavar="MODEL_OR_RUN", help="a run directory, or a model as in model.path"
    )
    parser.add_argument("--base", action="store_true", help="begin without an adapter")
    add_sampling_options(parser, most=MOST)
    add_adapter_options(parser)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Answers lines until the input ends."""
    chat = _opened(options)
    decorated = sys.stdin.isatty() and sys.stdout.isatty()
    if decorated:
        say(f"{chat.model} answers; /help lists the commands, Ctrl-D ends")
    lines, refused = 0, 0
    for line in _typed() if decorated else _piped():
        if not line.strip():
            continue
        lines += 1
        try:
            if not chat.take(line):
                break
        except UserError as e:
            refused += 1
            say(str(e))
            if options.json:
                print(json.dumps({"prompt": line, "error": str(e)}), flush=True)
    if refused and not decorated:
        raise UserError(f"{refused} of {lines} lines got no answer; see the lines above for each")


def _opened(options: argparse.Namespace) -> "_Chat":
    adapters = by_name(options.adapter)
    start_jax()
    from qlora_jax.serve.base import read_named
    from qlora_jax.serve.conversation import Conversation
    from qlora_jax.serve.engine import SamplingSettings
    from qlora_jax.serve.lineup import open_lineup
    from qlora_jax.serve.rows import open_rows

    lineup = open_lineup(
        options.path,
        read_named(adapters),
        base=options.base,
        bits=options.bits,
        dtype=options.dtype,
        warn=say,
    )
    base = lineup.base
    _check_template(options.path, lineup)
    length = base.model.config.longest_cached
    _, scheduler = open_rows(
        base,
        lineup.adapters,
        name=lineup.name,
        rows=1,
        length=length,
        slots=len(lineup.adapters),
        burst=BURST,
        smallest=SMALLEST,
    )
    conversation = Conversation(
        scheduler,
        base.tokenizer,
        length=length,
        settings=SamplingSettings(options.temperature, options.top_p, options.seed),
        most=options.max_new_tokens,
        system=base.asking.system_prompt if options.system is None else options.system,
    )
    limits = {"most": options.max_new_tokens, "length": length}
    return _Chat(conversation, scheduler.models, lineup.first, limits, options.json)


def _check_template(path: str, lineup: "ModelWithAdapters") -> None:
    """Raises UserError if the model cannot chat, because it was made for text without turns."""
    remedy = f'continue a text with: qlora-jax generate {path} --prompt "..."'
    if not lineup.base.tokenizer.has_chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template, so it cannot chat; give "
            f"an instruct model, or {remedy}"
        )
    if lineup.base.asking.template == "none":
        raise UserError(
            f"{path}: trained with data.template none, on text without turns; train with "
            f"data.template auto, or {remedy}"
        )


class _Chat:
    """A chat at a terminal or a pipe; takes lines and prints answers.

    Args:
      conversation: turns so far; each answer is added to them.
      models: names of the model and of the adapters that can answer.
      first: name in `models` that answers first.
      limits: values for the placeholders in `ENDS`.
      as_json: whether to print one JSON object per answer.

    Attributes:
      model: name in `models` that answers now.
    """

    def __init__(
        self,
        conversation: "Conversation",
        models: Sequence[str],
        first: str,
        limits: Mapping[str, int],
        as_json: bool,
    ):
        self._conversation, self._models, self.model = conversation, models, first
        self._limits, self._json = limits, as_json
        self._commands: Mapping[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/system": self._system,
            "/reset": self._reset,
            "/help": lambda rest: say(HELP),
        }

    def take(self, line: str) -> bool:
        """Executes a line: a command or a question; returns False if the chat ends.

        Raises:
          UserError: the command or adapter does not exist, or the question cannot be answered.
        """
        name, _, rest = line.strip().partition(" ")
        if line.startswith("//") or not line.startswith("/"):
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
        elif name == "/exit":
            return False
        elif name in self._commands:
            self._commands[name](rest.strip())
        else:
            raise UserError(
                f"{name}: no such command; /help lists them, and //TEXT sends /TEXT to the model"
            )
        return True

    def _adapter(self, name: str) -> None:
        names = ", ".join(f"[{n}]" if n == self.model else n for n in self._models)
        if not name:
            say(f"adapters: {names}")
        elif name in self._models:
            self.model = name
            say(f"{name} answers from here on")
        else:
            raise UserError(
                f"/adapter {name}: no such adapter; there are {names}; start the chat with "
                "--adapter NAME=DIR for another adapter, or with --base for the base"
            )

    def _system(self, text: str) -> None:
        if text:
            self._conversation.system = None if text == '""' else text
        say(f"system turn: {self._conversation.system or 'none'}")

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        say("a new conversation begins")

    def _ask(self, question: str) -> None:
        with Requests() as requests, _waiting() as arrived:

            def show(text: str) -> None:
                arrived.cancel()
                if not self._json:
                    print(to_read(text), end="", flush=True)

            answered = self._conversation.ask(
                question, self.model, show, lambda: requests.signal is not None
            )
        self._tell(question, answered)
        if requests.signal == signal.SIGTERM:
            raise Terminated(signal.SIGTERM)

    def _tell(self, question: str, answered: "TimedAnswer") -> None:
        if self._json:
            row = {"prompt": question, "adapter": self.model, "answer": answered.text}
            figures = answered._asdict()
            del figures["text"]
            print(json.dumps(row | figures), flush=True)
        else:
            print(flush=True)
        if answered.finish == "interrupted" and not answered.text:
            say(UNSAID)
        elif end := ENDS.get(answered.finish):
            say(f"({end.format(**self._limits)})")


@contextlib.contextmanager
def _waiting() -> Iterator[threading.Timer]:
    """Prints after `PATIENCE` seconds why the answer takes long, unless the timer is cancelled."""
    timer = threading.Timer(
        PATIENCE, say, ["reading the conversation; the first answer of a length also compiles ..."]
    )
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


def _typed() -> Iterator[str]:
    """Yields the lines that a person types, with line editing and history."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(flush=True)
            return


def _piped() -> Iterator[str]:
    """Yields the lines of a file or a program."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(
            "stdin: a line is not UTF-8; convert the text, such as with: iconv -f LATIN1 -t UTF-8"
        ) from None
