"""The command `qlora-jax serve`."""

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

TEXT = "Serve a model and its adapters over HTTP, with the API of OpenAI's completions."

EPILOG = """Endpoints: /v1/models, /v1/completions, /v1/chat/completions, /v1/load_lora_adapter,
/v1/unload_lora_adapter, /health. The field "model" of a request is the name of an adapter
or of the base. The adapter of a run directory has the directory's name. See docs/serving.md
in the repository."""

DEFAULT_LENGTH = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `serve` to its parser."""
    parser.epilog = EPILOG
    parser.add_argument(
        "path", metavar="MODEL_OR_RUN", help="a run directory, or a model as in model.path"
    )
    parser.add_argument("--name", help="name of the base; default: its path")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address; default 127.0.0.1: this machine only"
    )
    parser.add_argument(
        "--port", type=port, default=8000, help="port; default 8000; 0: any free port"
    )
    parser.add_argument(
        "--slots", type=count, default=8, metavar="N", help="answers generated at a time; default 8"
    )
    parser.add_argument(
        "--max-length",
        type=count,
        metavar="N",
        help="largest number of tokens of prompt and answer; default 2048, or the model's "
        "positions if fewer",
    )
    parser.add_argument(
        "--max-adapters",
        type=whole,
        metavar="N",
        help="largest number of adapters; default 4, or the number given if larger",
    )
    parser.add_argument(
        "--max-rank",
        type=count,
        metavar="R",
        help="largest rank; default 16, or the largest rank given",
    )
    parser.add_argument(
        "--queue",
        type=whole,
        default=64,
        metavar="N",
        help="largest number of waiting requests; default 64",
    )
    parser.add_argument(
        "--timeout",
        type=positive,
        default=600.0,
        metavar="S",
        help="time limit of a request in seconds; default 600",
    )
    parser.add_argument(
        "--grace",
        type=positive,
        default=10.0,
        metavar="S",
        help="seconds to complete answers after a stop signal; default 10",
    )
    parser.add_argument(
        "--allow-loading",
        action="store_true",
        help="let clients load adapters also if --host is not a loopback address",
    )
    parser.add_argument(
        "--load-timeout",
        type=positive,
        default=60.0,
        metavar="S",
        help="time limit for loading an adapter by request, in seconds; default 60",
    )
    parser.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="file of API keys, one per line; requests must send one as Authorization: Bearer KEY",
    )
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        type=host_name,
        metavar="NAME",
        help="host name that requests may use; may be repeated. If --host is a loopback address, "
        "localhost, 127.0.0.1, [::1] and --host are allowed, too; else, without this option, "
        "every name is",
    )
    parser.add_argument(
        "--max-connections",
        type=count,
        metavar="N",
        help="largest number of connections; default 1024, or half of the process's file limit",
    )
    add_adapter_options(parser)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Loads the model and serves it until a signal arrives."""
    from qlora_jax.serve.signals import until_signal

    service, listener, connections = until_signal(lambda: _ready(options))
    _serve(options, service, listener, connections)


def _ready(options: argparse.Namespace) -> "tuple[Service, socket.socket, int]":
    """Loads the model, opens the port; returns service, listener and the limit of connections."""
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
                f"warning: everyone who can reach {address(listener)} can use it; --api-key-file "
                "requires a key"
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
    """Returns the checks of each request: of the Host header, and of the API key."""
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
    """Loads the model and its adapters, and compiles all programs except those for long prompts."""
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
    """Returns whether only this machine can reach a listening socket."""
    found = ipaddress.ip_address(listener.getsockname()[0].partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def host_name(text: str) -> str:
    """Parses a value of --allowed-host: the name or address of a host."""
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    if re.fullmatch(r"[\w.-]+", text, re.ASCII):
        return text
    raise argparse.ArgumentTypeError(f"must be a host name without a port, not {text!r}")
