"""`qlora-jax serve`."""

import argparse
import contextlib
import ipaddress
import json
import re
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_jax.commands.common import (
    add_adapter_options,
    by_name,
    count,
    port,
    positive,
    say,
    start_jax,
    whole,
)
from qlora_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from qlora_jax.serve.app import Service
    from qlora_jax.serve.door import Check

TEXT = "Serve a model and its adapters over HTTP, as OpenAI's completions API."

EPILOG = """Endpoints: /v1/models, /v1/completions, /v1/chat/completions, /v1/load_lora_adapter,
/v1/unload_lora_adapter, /health. A request's "model" is an adapter's name, or the base's.
A run directory brings its own adapter, named as the directory is. See docs/serving.md."""

DEFAULT_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `serve`."""
    parser.epilog = EPILOG
    parser.add_argument("path", metavar="MODEL_OR_RUN", help="as model.path, or a run directory")
    parser.add_argument("--name", help="of the base; default: its path")
    parser.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=port, default=8000, help="default 8000; 0: any free one")
    parser.add_argument(
        "--slots", type=count, default=8, metavar="N", help="rows that decode at a time; default 8"
    )
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="tokens of prompt and answer; default 2048, or the model's positions",
    )
    parser.add_argument(
        "--max-adapters",
        type=whole,
        metavar="N",
        help="room for so many; default 4, or those given",
    )
    parser.add_argument(
        "--max-rank", type=count, metavar="R", help="largest rank; default 16, or the largest given"
    )
    parser.add_argument(
        "--queue", type=whole, default=64, metavar="N", help="requests that may wait; default 64"
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=600.0,
        metavar="S",
        help="seconds a request may take; default 600",
    )
    parser.add_argument(
        "--grace",
        type=positive,
        default=10.0,
        metavar="S",
        help="seconds to finish in when stopped; default 10",
    )
    parser.add_argument(
        "--allow-loading",
        action="store_true",
        help="load adapters by request on other hosts than loopback, too",
    )
    parser.add_argument(
        "--load-timeout",
        type=positive,
        default=60.0,
        metavar="S",
        help="seconds that reading an adapter by request may take; default 60",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="keys, one in a line; requests must bring one as Authorization: Bearer KEY",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        type=host_name,
        metavar="NAME",
        help="answer requests to this host name, too; may be repeated. On loopback, localhost, "
        "127.0.0.1, [::1] and --host are always answered; elsewhere, without this option, all are",
    )
    parser.add_argument(
        "--max-connections",
        type=count,
        metavar="N",
        help="at a time; default 1024, or half of the files that the process may open",
    )
    add_adapter_options(parser)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Loads the model and serves until a signal."""
    from qlora_jax.serve.signals import until_signal

    service, listener, connections = until_signal(lambda: _ready(options))
    _serve(options, service, listener, connections)


def _ready(options: argparse.Namespace) -> "tuple[Service, socket.socket, int]":
    """Loads the model and opens the port; returns both and the most connections at a time."""
    adapters = by_name(options.adapter)
    from qlora_jax.serve.connections import most_connections
    from qlora_jax.serve.door import read_keys
    from qlora_jax.serve.server import address, listen

    keys = None if options.api_key_file is None else read_keys(options.api_key_file)
    connections = most_connections(options.max_connections)
    listener = listen(options.host, options.port)
    try:
        start_jax()
        loopback = on_loopback(listener)
        if keys is None and not loopback:
            say(
                f"warning: whoever reaches {address(listener)} may use it; --api-key-file asks for "
                "a key"
            )
        checks = _checks(options, keys, loopback)
        loading = options.allow_loading or loopback
        return _service(options, adapters, checks, loading), listener, connections
    except BaseException:
        listener.close()
        raise


def _serve(
    options: argparse.Namespace, service: "Service", listener: socket.socket, connections: int
) -> None:
    from qlora_jax.serve.server import address, serve

    url = address(listener)

    def ready() -> None:
        say(f"serving on {url}")
        if options.json:
            print(json.dumps({"url": url}), flush=True)

    with listener:
        serve(service, listener, grace=options.grace, connections=connections, on_ready=ready)


def _checks(options: argparse.Namespace, keys: list[str] | None, loopback: bool) -> "list[Check]":
    """Returns what checks each request: its Host header, and its key."""
    from qlora_jax.serve.door import LOOPBACK, known_hosts, known_keys

    checks = []
    if loopback or options.allowed_host:
        own = [options.host] if loopback else []
        checks.append(known_hosts([*LOOPBACK, *own, *options.allowed_host]))
    if keys is not None:
        checks.append(known_keys(keys))
    return checks


def _service(
    options: argparse.Namespace,
    folders: dict[str, str],
    checks: "Sequence[Check]",
    loading: bool,
) -> "Service":
    """The model with its adapters, ready to answer: everything is compiled but longer prompts."""
    from qlora_jax.lora.weights import largest_rank
    from qlora_jax.models.generate import cached_positions
    from qlora_jax.serve.app import Service
    from qlora_jax.serve.base import open_base, own_adapter, read_named
    from qlora_jax.serve.rows import open_rows
    from qlora_jax.serve.worker import Worker

    given = read_named(own_adapter(options.path) | folders)
    base = open_base(options.path, bits=options.bits, dtype=options.dtype, warn=say)
    config = base.model.config
    length = options.max_length or min(DEFAULT_LENGTH, config.longest_cached)
    if length > config.longest_cached:
        raise UserError(
            f"--max-length {length}: the model has {cached_positions(config)}; give less"
        )
    adapters = {named.name: named.in_bank_of(base.model) for named in given}
    slots = max(4, len(given)) if options.max_adapters is None else options.max_adapters
    engine, scheduler = open_rows(
        base,
        adapters,
        name=options.name or base.name,
        rows=options.slots,
        length=length,
        slots=slots,
        rank=options.max_rank or max(16, *map(largest_rank, adapters.values()), 1),
        waiting=options.queue,
    )
    engine.warm_up()
    return Service(
        worker=Worker(scheduler),
        tokenizer=base.tokenizer,
        model=base.model,
        vocabulary=config.vocab_size,
        length=length,
        timeout=options.timeout,
        loading=loading,
        load_timeout=options.load_timeout,
        checks=checks,
    )


def on_loopback(listener: socket.socket) -> bool:
    """Whether only this machine reaches a listener."""
    found = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def host_name(text: str) -> str:
    """A host's name or address, as --allowed-host takes it."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    if re.fullmatch(r"[\w.-]+", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"must be a host's name without a port, not {text!r}")
