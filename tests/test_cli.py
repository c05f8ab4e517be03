"""The command line: arguments, help, exit codes."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from selection import mostly_slow

from qlora_jax import cli, commands
from qlora_jax import config as configs
from qlora_jax.runtime.errors import RunFailed, Terminated, UserError
from qlora_jax.train import rundir
from qlora_jax.train.interrupt import Stopped

RunCli = Callable[..., Any]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "arguments are required: COMMAND; see qlora-jax --help"),
        (["trian"], "'trian' (choose from"),
        (["--nothing"], "COMMAND"),
        (["train"], "arguments are required: CONFIG; see qlora-jax train --help"),
        (["train", "--train.steps=3"], "arguments are required: CONFIG"),
        (["train", "c.yaml", "d.yaml"], "unrecognized arguments: d.yaml"),
        (["train", "c.yaml", "-x"], "unrecognized arguments: -x"),
        (["train", "c.yaml", "--resum"], "--resum: neither an option nor a setting; the nearest"),
        (["train", "--trian.steps=3", "c.yaml"], "--trian.steps: neither an option nor a setting"),
        (["train", "c.yaml", "--train.stesp", "3"], "the nearest is --train.steps"),
        (["train", "c.yaml", "--lora.rank"], "--lora.rank has no value; write --lora.rank=VALUE"),
        (["train", "c.yaml", "--preview", "0"], "--preview: must be a whole number of 1 or more"),
        (["train", "c.yaml", "--preview", "two"], "--preview: must be a whole number"),
        (["train", "c.yaml", "--preview"], "--preview: expected one argument"),
        (["generate", "d"], '--prompt is missing; give --prompt "..."'),
        (["generate", "d", "--prompt", "a", "--top-p=0"], "--top-p: must be a number above 0"),
        (["generate", "d", "--prompt", "a", "--temperature", "-1"], "--temperature: "),
        (["generate", "d", "--prompt", "a", "--temperature", "nan"], "--temperature: must be"),
        (["generate", "d", "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: must"),
        (["generate", "d", "--prompt", "a", "--train.steps=3"], "unrecognized arguments: --train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_cannot_be_used(
    run_cli: RunCli, arguments: list[str], expected: str
) -> None:
    ended = run_cli(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.startswith("qlora-jax: ")
    assert ended.err.count("\n") == 1
    assert expected in ended.err


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """Collects the config paths and overrides that `train` would load."""
    seen: list[tuple[str, dict[str, str]]] = []

    def load(path: str | Path, overrides: dict[str, str]) -> configs.Config:
        seen.append((str(path), overrides))
        raise UserError("enough")

    monkeypatch.setattr(configs, "load_config", load)
    return seen


@pytest.mark.parametrize(
    "arguments",
    [
        ["c.yaml", "--train.steps=50", "--lora.rank=8"],
        ["c.yaml", "--train.steps", "50", "--lora.rank", "8"],
        ["--train.steps", "50", "--lora.rank", "8", "c.yaml"],
        ["--train.steps=50", "c.yaml", "--lora.rank", "8"],
        ["--train.steps", "50", "--debug", "c.yaml", "--json", "--lora.rank=8", "--resume"],
    ],
    ids=" ".join,
)
def test_settings_stand_anywhere_in_both_forms(
    run_cli: RunCli, configured: list[tuple[str, dict[str, str]]], arguments: list[str]
) -> None:
    run_cli("train", *arguments)
    assert configured == [("c.yaml", {"train.steps": "50", "lora.rank": "8"})]


@pytest.mark.parametrize("value", ["-1", "-x", "--x", "a b", "a=b", "", "train"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_setting_takes_any_text(
    run_cli: RunCli,
    configured: list[tuple[str, dict[str, str]]],
    value: str,
    joined: bool,
) -> None:
    key = "data.system_prompt"
    run_cli("train", *([f"--{key}={value}"] if joined else [f"--{key}", value]), "c.yaml")
    assert configured == [("c.yaml", {key: value})]


def test_a_run_directory_is_its_own_output(
    tmp_path: Path,
    run_cli: RunCli,
    write_config: Callable[..., Path],
    configured: list[tuple[str, dict[str, str]]],
) -> None:
    write_config(tmp_path)
    run_cli("train", tmp_path, "--resume")
    run_cli("train", tmp_path, "--output=elsewhere")
    file = str(tmp_path / rundir.CONFIG)
    assert configured == [(file, {"output": str(tmp_path)}), (file, {"output": "elsewhere"})]


def test_an_entry_of_a_mapping_can_be_set(
    tmp_path: Path, run_cli: RunCli, write_config: Callable[..., Path]
) -> None:
    ended = run_cli("train", write_config(tmp_path), "--lora.rank_pattern.q_proj=0")
    assert "lora.rank_pattern: " in ended.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("file: bad\n  remedy"), 2, "file: bad remedy"),
        (RunFailed("step 3"), 1, "step 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Terminated(signal.SIGTERM), 143, "stopped by SIGTERM"),
        (Stopped(signal.SIGINT, 3), 130, "stopped by SIGINT after step 3; the state is saved, "),
        (Stopped(signal.SIGTERM, 3), 143, "stopped by SIGTERM after step 3; the state is saved, "),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("debug", [False, True])
def test_each_end_has_its_code_and_line(
    run_cli: RunCli,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
    debug: bool,
) -> None:
    def train(*_: Any) -> None:
        raise error

    monkeypatch.setattr(commands.train, "run", train)
    ended = run_cli("train", "c.yaml", *(["--debug"] if debug else []))
    assert ended.code == code
    assert ended.message.startswith(f"qlora-jax: {line}")
    assert ("Traceback" in ended.err) == debug
    assert debug or ended.err.count("\n") == 1


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_a_signal_became_is_the_signals_end(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    """Imitates numpy: it raises ImportError if SIGINT comes while it is imported."""

    def train(*_: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            signal.sigtimedwait([], 10)  # the signal handler runs here
        except KeyboardInterrupt:
            raise ImportError("numpy failed") from None

    monkeypatch.setattr(commands.train, "run", train)
    ended = run_cli("train", "c.yaml", *(["--debug"] if debug else []))
    assert (ended.code, ended.message) == (130, "qlora-jax: interrupted")
    assert ("numpy failed" in ended.err) == debug
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_bug_shows_its_traceback(run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(commands.train, "run", train)
    with pytest.raises(ZeroDivisionError):
        run_cli("train", "c.yaml")


def test_help_documents_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    settings = list(configs.all_settings())
    assert len(settings) > 50
    for setting in settings:
        assert len(setting.doc) >= 10
        assert f"  {setting.key}: {setting.type} = {setting.default}\n      {setting.doc}" in text
    for option in ("--resume", "--overwrite", "--preview", "--json", "--debug"):
        assert option in text


@pytest.mark.parametrize("command", ["train", "evaluate", "generate"])
def test_help_lists_the_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
        assert command in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("qlora-jax ")


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "no.yaml"], ["generate"]])
def test_help_and_early_errors_do_not_wait_for_jax(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom qlora_jax import cli\n"
        "try:\n    cli.main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'jax', 'flax', 'numpy', 'transformers', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def shell(command: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a shell command in which `qlora-jax` is the program; stdout is buffered as usual."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    define = f'qlora-jax() {{ {shlex.quote(sys.executable)} -m qlora_jax "$@"; }}; '
    return subprocess.run(
        ["bash", "-c", define + command],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
    )


@pytest.mark.parametrize("arguments", ["--help", "train --help", "--version"])
def test_a_reader_that_goes_away_is_no_error(arguments: str) -> None:
    done = shell(f"qlora-jax {arguments} | true; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full", "2> >(true)", "<&- >&- 2>&-"])
def test_an_error_nobody_reads_keeps_its_code(stderr: str) -> None:
    done = shell(f"qlora-jax train no.yaml {stderr}")
    assert done.stdout == b""
    assert done.returncode == 2


def test_help_to_a_closed_stdout() -> None:
    done = shell("qlora-jax --help >&-")
    assert done.stderr == b""
    assert done.returncode == 0


@pytest.mark.parametrize(
    "command",
    mostly_slow(["--help", "train --help", "sweep normality --dry-run"], "--help", "train --help"),
)
def test_results_that_do_not_fit_are_one_line(command: str) -> None:
    done = shell(f"qlora-jax {command} >/dev/full")
    assert done.returncode == 2
    said = "the results cannot be written to stdout: No space left on device; write them elsewhere"
    assert done.stderr.decode() == f"qlora-jax: {said}\n"


def in_program(code: str) -> tuple[int, str, str]:
    """Runs code after importing `__main__`; returns the exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-c", f"import os, signal; from qlora_jax import __main__, cli\n{code}"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


SEND = "os.kill(os.getpid(), signal.SIGINT); signal.sigtimedwait([], 10)"


def test_a_signal_before_a_command_begins_is_one_line() -> None:
    code = (
        "from qlora_jax.runtime import startup\n"
        f"def prepare(): {SEND}\n"
        "startup.prepare = prepare; __main__.main()"
    )
    assert in_program(code) == (130, "", "qlora-jax: interrupted\n")


def test_a_signal_that_python_would_drop_is_one_line() -> None:
    code = (
        "class Dropping:\n"
        f"    def __del__(self): {SEND}\n"
        "def main(): Dropping(); print('went on')\n"
        "cli.main = main; __main__.main()"
    )
    assert in_program(code) == (130, "", "qlora-jax: interrupted\n")


def test_a_signal_that_an_import_would_report_is_one_line(tmp_path: Path) -> None:
    """Imitates plugins of jax: they print a traceback if SIGINT comes while they are imported."""
    module = (
        f"import os, signal, traceback\ntry: {SEND}\nexcept BaseException: traceback.print_exc()\n"
    )
    (tmp_path / "reports.py").write_text(module)
    code = (
        "import sys; from qlora_jax import commands\n"
        "def run(*_): import reports\n"
        f"commands.train.run = run; sys.path.insert(0, {str(tmp_path)!r})\n"
        "sys.argv = ['qlora-jax', 'train', 'c.yaml']; __main__.main()"
    )
    assert in_program(code) == (130, "", "qlora-jax: interrupted\n")


@pytest.mark.parametrize(("code", "waited"), [(0, "1\n"), (2, "1\n"), (130, ""), (143, "")])
def test_only_a_command_that_a_signal_ended_does_not_wait_for_threads(
    code: int, waited: str
) -> None:
    program = (
        "import sys, threading, time\n"
        "def last(): time.sleep(0.2); print(1, flush=True)\n"
        f"def main(): threading.Thread(target=last).start(); return {code}\n"
        "cli.main = main; sys.exit(__main__.main())"
    )
    assert in_program(program) == (code, waited, "")


@pytest.fixture
def unread() -> Iterator[TextIO]:
    """A writable pipe whose reading end is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        yield stream


@pytest.mark.slow
@pytest.mark.quick
def test_training_goes_on_when_nobody_reads_its_messages(
    tmp_path: Path, write_config: Callable[..., Path], unread: TextIO
) -> None:
    config = write_config(tmp_path, train__steps=1, train__samples=1)
    with contextlib.redirect_stderr(unread), contextlib.redirect_stdout(unread):
        assert cli.main(["train", str(config)]) == 0
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_broken_pipe_elsewhere_is_no_success(
    run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(commands.train, "run", train)
    with pytest.raises(BrokenPipeError):
        run_cli("train", "c.yaml")
