"""Describes the bytes between devices in a plan, as plain values and as lines of text."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.plan.compiled import Plan

GIB = 2**30
SHOWN = 6
"""Number of collectives that are listed."""

MODELLED = "modelled from data sheets, not measured"


def described(plan: Plan) -> dict[str, Any]:
    """Returns `traffic` and `times` of a plan as plain values; an empty dict without a mesh."""
    found: dict[str, Any] = {}
    if (sent := plan.traffic) is not None:
        found["traffic"] = {
            **sent._asdict(),
            "total": sent.total,
            "ratio": sent.ratio,
            "collectives": [
                {**one._asdict(), "received": one.received} for one in sent.collectives
            ],
        }
    if (took := plan.times) is not None:
        found["times"] = {**took._asdict(), "bound": took.bound, "kind": MODELLED}
    return found


def lines(row: Mapping[str, Any]) -> list[str]:
    """Returns lines of text about the traffic and the modelled times of a plan.

    Args:
      row: plan as plain values, with the entries of `described`.
    """
    sent = row["traffic"]
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in sent["received"].items())
    made = [
        f"a device receives in a gradient: {sent['total'] / GIB:.2f} GiB ({parts})",
        f"  the weights are {sent['ratio']:.3f} of what they would be in bfloat16, forward and "
        f"backward, {sent['in_bfloat16'] / GIB:.2f} GiB",
    ]
    for one in sent["collectives"][:SHOWN]:
        shape = f"{one['dtype']}[{','.join(map(str, one['shape']))}]"
        size = one["received"] * one["times"] / GIB
        made.append(f"  {one['kind']:15} {shape:20} x {one['times']:5}  {size:7.2f} GiB")
    made.append(
        f"  {sent['overlapped']} of {sent['gathers']} gathers have a product or a kernel between "
        f"start and end, as the compiler orders them: {sent['hidden']:.0%} of the bytes"
    )
    if (took := row.get("times")) is not None:
        made.append(
            f"{MODELLED}: products {took['compute']:.2f} s, {took['link']} at "
            f"{took['bandwidth'] / 1e9:g} GB/s each way {took['sending']:.2f} s; "
            f"{took['bound']} would be the bound"
        )
    return made
