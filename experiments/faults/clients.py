"""Attacks a server with hostile clients; it must answer honest clients as if they were alone.

The server is one process and the hostile clients are another. The honest client runs in this
process and sends one request after the other, each by a new connection. The hostile process has a
lower priority, at most OPEN connections at a time and RATE new ones per second, so that 2 cores
measure the server and not the attack. Prompts of each padded length compile their programs before
anything is timed.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.faults import hostile
from experiments.faults.common import MIB, ROOT, Campaign, Row, command, resident
from experiments.faults.hostile import (
    ASKED,
    CHAT,
    GROUPS,
    KINDS,
    OPEN,
    PATIENCE,
    STREAM,
    WHOLE,
    Found,
    request,
)

RATE, LOAD_RATE = 16.0, 4.0
"""New hostile connections per second during the attack and during the load."""
GRACE = 5
"""Value of the server's --grace, in seconds."""

LINE = functools.partial(Row, part="clients")


class Server:
    """A server process with the campaign's model and an adapter named `one`."""

    def __init__(self, campaign: Campaign, folder: Path) -> None:
        self.log = folder / "log"
        options = ["--name=tiny", f"--adapter=one={folder / 'run'}", "--port=0", f"--grace={GRACE}"]
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "qlora_jax", "serve", str(campaign.model), *options],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        end = time.monotonic() + 300
        while not (found := re.search(r"serving on \S+:(\d+)", self.log.read_text())):
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"the server did not start: {self.log.read_text()[-300:]}")
            time.sleep(0.1)
        self.port = int(found[1])

    def ask(self, path: str, body: object = None) -> tuple[int, bytes]:
        """Sends a request by a new connection; returns the status and body of the response."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        data = None if body is None else json.dumps(body)
        with contextlib.closing(connection):
            method = "GET" if body is None else "POST"
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()


SAID = re.compile(rb'"(?:text|content|finish_reason)":\s?"((?:[^"\\]|\\.)*)"')
"""Matches the parts of an answer that depend on the request alone."""


class Honest:
    """A client that expects the same answers as it got when no other client was there.

    Args:
      server: server that gets the requests.
      folder: folder that holds an adapter in `run`, which the client loads and unloads.
    """

    def __init__(self, server: Server, folder: Path) -> None:
        adapter = {"lora_name": "two", "lora_path": str(folder / "run")}
        self._ask = server.ask
        self.short = [
            ("/v1/completions", ASKED),
            ("/v1/completions", ASKED | {"model": "one"}),
            ("/v1/chat/completions", CHAT),
        ]
        self.mixed = [
            *self.short,
            *(("/v1/completions", ASKED | {"prompt": "zip " * n}) for n in (8, 25, 50)),
            ("/v1/completions", STREAM),
            ("/v1/load_lora_adapter", adapter),
            ("/v1/completions", ASKED | {"model": "two"}),
            ("/v1/unload_lora_adapter", {"lora_name": "two"}),
            ("/v1/models", None),
        ]
        self._known = [self._answer(*request) for request in self.mixed]
        self.faults: dict[int, str] = {}

    def _answer(self, path: str, body: object) -> bytes:
        status, said = self._ask(path, body)
        return str(status).encode() + (b" ".join(SAID.findall(said)) or said)

    def ask(self, number: int) -> float:
        """Sends request `number` of `mixed` and compares the answer; returns the seconds."""
        began = time.monotonic()
        try:
            said = self._answer(*self.mixed[number])
        except (OSError, http.client.HTTPException) as e:
            said = repr(e).encode()
        if said != self._known[number]:
            path, body = self.mixed[number]
            told = f"{path} {body}: {said[:150]!r}, when quiet {self._known[number][:150]!r}"
            self.faults.setdefault(number, told)
        return time.monotonic() - began

    def shorts(self, goes_on: Callable[[int], bool]) -> tuple[float, float, int]:
        """Sends the requests of `short` in turn while `goes_on(count)`; returns p50, p99, count."""
        took: list[float] = []
        while goes_on(len(took)):
            took.append(self.ask(len(took) % len(self.short)))
        cuts = statistics.quantiles(took, n=100, method="inclusive")
        return cuts[49], cuts[98], len(took)


def _rows(found: Found) -> Iterator[Row]:
    """Yields the rows of the hostile clients; equal faults of a kind are listed once."""
    for group in GROUPS:
        of_group = [(name, fault) for name, fault in found if KINDS[name].group == group]
        faults = Counter(f"{name}: {fault}" for name, fault in of_group if fault)
        lines = tuple(f"{line} ({n} times)" for line, n in faults.items())
        kinds = sum(kind.group == group for kind in KINDS.values())
        yield LINE(what=group, tried=len(of_group), faults=lines, note=f"{kinds} kinds")


def _under_attack(honest: Honest, quiet: tuple[float, float, int], attack: Any) -> Row:
    """Sends honest requests until the attack is over; returns the row of their times."""
    p50, p99, count = honest.shorts(lambda done: done < 100 or not attack.done())
    ratio = p99 / quiet[1]
    slow = (f"p99 is {ratio:.1f} times the quiet one",) if ratio > 2 else ()
    return LINE(
        what="honest answers under attack",
        tried=count,
        faults=(*honest.faults.values(), *slow),
        note=f"ms, quiet: p50 {quiet[0] * 1e3:.1f}, p99 {quiet[1] * 1e3:.1f}; under attack: "
        f"p50 {p50 * 1e3:.1f}, p99 {p99 * 1e3:.1f}, {ratio:.2f} times the quiet one",
    )


def _memory(honest: Honest, pid: int, seconds: float) -> Row:
    """Sends all kinds of requests in turn, and samples the server's memory every second."""
    honest.faults.clear()
    samples: list[float] = []
    asked, began = 0, time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        if now >= len(samples):
            samples.append(resident(pid) / MIB)
        honest.ask(asked % len(honest.mixed))
        asked += 1
    tenth = max(1, len(samples) // 10)
    warm, last = (statistics.median(part) for part in (samples[tenth:][:tenth], samples[-tenth:]))
    growth = last - warm
    grown = (f"grew by {growth:.0f} MiB",) if growth > 0.05 * warm + 16 else ()
    return LINE(
        what="memory under load",
        tried=asked,
        faults=(*honest.faults.values(), *grown),
        note=f"MiB in {seconds:.0f} s: {warm:.0f} after the first tenth, {last:.0f} at the end, "
        f"{growth:+.1f}; at most {resident(pid, 'VmHWM') / MIB:.0f}",
    )


def _log(server: Server, clients: int) -> Row:
    lines = server.log.read_text(errors="replace").splitlines()
    faults = {
        f"{len(lines)} lines, the last: {lines[-1][:200]}": len(lines) > 20 + clients // 30,
        "a traceback": any("Traceback" in line for line in lines),
    }
    found = tuple(fault for fault, is_there in faults.items() if is_there)
    return LINE(what="lines of the log", tried=clients, faults=found, note=f"{len(lines)} lines")


def _end(server: Server) -> Row:
    """Sends SIGTERM while clients have sent half a request or do not read the answer."""
    said = (WHOLE[:20], WHOLE[:-1], request(STREAM), b"")
    with contextlib.ExitStack() as stack:
        for i in range(OPEN):
            client = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
            stack.enter_context(client).sendall(said[i % len(said)])
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(timeout=PATIENCE)
        seconds = time.monotonic() - began
    note = f"exit code {server.process.returncode} after {seconds:.1f} s of a grace of {GRACE} s"
    right = server.process.returncode == 143 and seconds <= GRACE + 1
    return LINE(what="the end", tried=OPEN, faults=() if right else (note,), note=note)


def _make_files(campaign: Campaign, folder: Path) -> None:
    """Makes an adapter, and files and folders that are no adapters."""
    steps = {f"train__{name}": 2 for name in ("steps", "eval_every", "save_every")}
    ended = command("train", campaign.config(folder / "train.yaml", **steps))
    if ended.code != 0:
        raise RuntimeError(f"no adapter was made: {ended.err.splitlines()[-1:]}")
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    for name in ("fifo", "zero"):
        (folder / f"a_{name}").mkdir()
        (folder / f"a_{name}" / "adapter_config.json").symlink_to(folder / name)


def run(campaign: Campaign) -> Iterator[Row]:
    """Yields a row for each group of hostile clients, and rows for how the server behaved."""
    folder = campaign.folder / "clients"
    _make_files(campaign, folder)
    server = Server(campaign, folder)
    spawn = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, spawn, os.nice, (10,)) as pool:

            def send(names: Sequence[str], rate: float) -> concurrent.futures.Future[Found]:
                seed = f"{campaign.seed} {len(names)}"
                return pool.submit(hostile.attack, server.port, names, rate, seed, folder)

            honest = Honest(server, folder)
            count = max(100, campaign.times(300))
            quiet = honest.shorts(lambda done: done < count)
            before = f"{resident(server.process.pid) / MIB:.0f} MiB before the attack"
            attack = send(hostile.names(campaign.rng("attack"), campaign.times(1000)), RATE)
            under_attack = _under_attack(honest, quiet, attack)
            yield from _rows(attacked := attack.result())
            yield under_attack
            seconds = max(20.0, 1200 * campaign.scale)
            campaign.say(f"clients: load of {seconds:.0f} s")
            names = hostile.names(campaign.rng("load"), round(LOAD_RATE * seconds))
            attack = send(names, LOAD_RATE)
            memory = _memory(honest, server.process.pid, seconds)
            found = attack.result()
            told = {f"{name}: {fault}" for name, fault in found if fault}
            faults, note = (*memory.faults, *sorted(told)), f"{memory.note}; {before}"
            yield dataclasses.replace(memory, faults=faults, note=note)
            yield _log(server, len(attacked) + len(found))
        yield _end(server)
    finally:
        server.process.kill()
        server.process.wait()
