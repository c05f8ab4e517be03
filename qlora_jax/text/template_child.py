"""Renders a chat template in a separate process with limits; exit code or signal is the result.

`template_trial` runs this file as a script, with the template on stdin. The script imports nothing
from this package.
"""

import resource
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TURNS = tuple(
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", "What is 1 + 1?"),
        ("assistant", "<think>\nOne and one.\n</think>\n\n2"),
        ("user", "And 1 + 2?"),
        ("assistant", "3"),
    )
)
"""Turns of the test; each prefix of them is rendered, with and without the system turn."""
OVER_MEMORY = 3
"""Exit code if the memory limit was exceeded."""


class Generation(jinja2.ext.Extension):
    """A Jinja extension that renders `{% generation %}` blocks, as transformers does."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        """Parses a block, and returns the nodes of its content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str) -> None:
    """Renders the test conversations; ignores conversations that the template refuses.

    Raises:
      MemoryError: the template needs more memory than the limit.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["strftime_now"] = lambda format: format
    compiled = environment.from_string(template)
    for start in (0, 1):
        for end in range(start + 1, len(TURNS) + 1):
            for prompt in (False, True):
                try:
                    compiled.render(
                        messages=list(TURNS[start:end]),
                        add_generation_prompt=prompt,
                        bos_token="<s>",
                        eos_token="</s>",
                    )
                except MemoryError:
                    raise
                except Exception:  # reported when a real conversation is rendered
                    continue


def main() -> int:
    """Renders within the limits in argv: CPU seconds (then a signal ends it) and memory bytes."""
    seconds, most = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        render(sys.stdin.buffer.read().decode())
    except MemoryError:
        return OVER_MEMORY
    except Exception:  # not a valid template; reported when it is used
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
