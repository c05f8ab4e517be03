"""`qlora-jax chat`."""

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
    from qlora_jax.serve.conversation import Answered, Conversation
    from qlora_jax.serve.lineup import Lineup

TEXT = "Talk with a run's model or a plain one in the terminal; switch adapters as you talk."

EPILOG = """Each line is a turn, and the whole conversation goes through the model's chat template.
/help lists what else may be written. Ctrl-C stops an answer, whose text so far stays in the
conversation; Ctrl-D ends. The first --adapter answers first, else the run's own. Lines may come
from a pipe: then only answers go to stdout, and the exit code is 2 if a line got none."""

MOST = 512
BURST = 2
"""Tokens between two pieces of text, and before Ctrl-C acts."""
SMALLEST = 512
"""Positions of the cache at least: a program for each size takes longer to compile than these."""
PATIENCE = 2.0
"""Seconds without a first text after which a line says what is done."""

HELP = """/adapter        lists who may answer
/adapter NAME   has another adapter answer; base is the model without one
/system TEXT    changes the system turn; /system shows it, /system "" takes it away
/reset          begins a new conversation
/exit           ends, as Ctrl-D does; Ctrl-C stops an answer
//TEXT          says /TEXT to the model"""

ENDS: Mapping[str, str] = {
    "length": "the answer was cut at --max-new-tokens {most}; ask to go on, or give more",
    "full": "the answer was cut: the conversation fills the model's {length} positions; /reset "
    "begins a new one",
    "interrupted": "stopped; what was said so far stays in the conversation",
}
"""Maps what ended an answer, other than the model, to the line that tells it."""
UNSAID = "stopped before the answer began; the question is forgotten"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `chat`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "path", metavar="MODEL_OR_RUN", help="a run directory, or what model.path takes"
    )
    parser.add_argument("--base", action="store_true", help="begin without an adapter")
    add_sampling_options(parser, most=MOST)
    add_adapter_options(parser)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Talks until the input ends."""
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


def _check_template(path: str, lineup: "Lineup") -> None:
    """Raises UserError if the model knows text alone, and no turns."""
    remedy = f'continue a text with: qlora-jax generate {path} --prompt "..."'
    if not lineup.base.tokenizer.has_chat_template:
        raise UserError(
            f"{path}: the tokenizer has no chat template, so there are no turns to talk in; give "
            f"an instruct model, or {remedy}"
        )
    if lineup.base.asking.template == "none":
        raise UserError(
            f"{path}: trained with data.template none, on text without turns; train with "
            f"data.template auto, or {remedy}"
        )


class _Chat:
    """A conversation at a terminal or a pipe: lines in, answers out.

    Args:
      conversation: the turns so far, which answers are added to.
      models: the names of those who may answer.
      first: who answers first.
      limits: figures that lines about cut answers name.
      as_json: print one object per answer.

    Attributes:
      model: the name of who answers.
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
        """Does what a line says; false ends the chat.

        Raises:
          UserError: there is no such command or adapter, or the question cannot be answered.
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
                f"{name}: no such command; /help lists them, and //TEXT says /TEXT to the model"
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
                f"/adapter {name}: no such adapter; there are {names}; others are given by "
                "--adapter NAME=DIR, and the base by --base, when the chat starts"
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

    def _tell(self, question: str, answered: "Answered") -> None:
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
    """Says what takes long, unless the yielded timer is cancelled before."""
    timer = threading.Timer(
        PATIENCE, say, ["reading the conversation; a first answer of its length compiles, too ..."]
    )
    timer.daemon = True
    timer.start()
    try:
        yield timer
    finally:
        timer.cancel()


def _typed() -> Iterator[str]:
    """Lines of a person, who may edit them and go back to earlier ones."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print(flush=True)
            return


def _piped() -> Iterator[str]:
    """Lines of a file or a program."""
    try:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError:
        raise UserError(
            "stdin: a line is not UTF-8; convert it, as by iconv -f LATIN1 -t UTF-8"
        ) from None
