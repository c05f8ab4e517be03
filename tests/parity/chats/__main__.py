"""Prints and draws the outcome of every conversation: `make chats`."""

import argparse
import sys
from pathlib import Path

from chats import picture, report
from chats.judge import WRONG


def main(arguments: list[str]) -> int:
    """Runs all cases, prints the counts and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="a .png to draw the outcomes into")
    options = parser.parse_args(arguments)
    outcomes = report.every()
    print(report.table(outcomes))
    if options.picture:
        picture.draw(outcomes, options.picture)
    return any(o.verdict == WRONG for o in outcomes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
