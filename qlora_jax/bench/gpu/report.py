"""Builds the report from recorded lines, finds its failed parts, and sums it up in a line."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from qlora_jax.bench.gpu.record import Line

SCHEMA = 1
Report = dict[str, Any]


def build(lines: Iterable[Line], command: str) -> Report:
    """Returns the report of all lines; a later result or part end replaces an earlier one.

    Returns:
      `schema`, `command`, the facts (`device`, `versions`, …), `figures`, `checks`, `absent`, and
      `parts` with `name`, `seconds` and `outcome`.
    """
    latest: dict[tuple[str, str], Line] = {}
    ends: dict[str, Line] = {}
    for line in lines:
        if line["kind"] == "end":
            ends[line["part"]] = line
        elif line["kind"] != "begin":
            key = (line["part"], line["name"])
            # An absent result of a later run does not replace the result of an earlier run.
            if line["kind"] != "absent" or latest.get(key, line)["kind"] == "absent":
                latest[key] = line
    by_kind: dict[str, list[Line]] = {"figure": [], "check": [], "absent": [], "fact": []}
    for line in latest.values():
        by_kind[line["kind"]].append({k: v for k, v in line.items() if k != "kind"})
    facts = {line["name"]: line["value"] for line in by_kind["fact"]}
    return {
        "schema": SCHEMA,
        "command": command,
        **facts,
        "parts": [
            {"name": name, "seconds": end["seconds"], "outcome": end["outcome"]}
            for name, end in ends.items()
        ],
        "figures": by_kind["figure"],
        "checks": by_kind["check"],
        "absent": by_kind["absent"],
    }


def failed(report: Mapping[str, Any]) -> list[str]:
    """Returns the parts with a crash, a wrong check, or a result lost to an error."""
    wrong = {check["part"] for check in report["checks"] if not check["right"]}
    wrong |= {row["part"] for row in report["absent"] if row.get("error")}
    wrong |= {part["name"] for part in report["parts"] if part["outcome"].startswith("failed")}
    return [part["name"] for part in report["parts"] if part["name"] in wrong]


def last_line(report: Mapping[str, Any], rehearsed: bool) -> str:
    """Returns the last line: the numbers of parts that ran and that failed."""
    parts = f"{len(report['parts'])} parts {'rehearsed' if rehearsed else 'run'}"
    return f"{parts}, {len(failed(report))} failed"


def slug(device: str) -> str:
    """Returns a file name for a device: NVIDIA H100 80GB HBM3 gives nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
