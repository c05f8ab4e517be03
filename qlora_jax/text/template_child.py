"""Renders a chat template in a process of its own, whose end tells what the template needs.

`template_trial` runs it as a file, with the template on stdin; it imports nothing of the package.
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
"""Every beginning of these is rendered, with the system's turn and without."""
OVER_MEMORY = 3
"""Exit code."""


class Generation(jinja2.ext.Extension):
    """Renders what is in a `{% generation %}` block, as transformers' extension does."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(template: str) -> None:
    """Renders conversations; what the template refuses is ignored.

    Raises:
      MemoryError: the limit does not suffice.
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
                except Exception:  # told when a real conversation is rendered
                    continue


def main() -> int:
    """Renders within limits: seconds of computing, after which a signal ends it, and bytes."""
    seconds, most = float(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        render(sys.stdin.buffer.read().decode())
    except MemoryError:
        return OVER_MEMORY
    except Exception:  # no template at all; told when it is used
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
