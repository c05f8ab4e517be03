"""Tests `qlora-jax bench`: runs in separate processes, fake peers, and user errors."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_jax import cli
from qlora_jax.bench import tools
from qlora_jax.bench.options import BENCHMARKS, StepOptions, from_tree, to_tree
from qlora_jax.commands import bench as command

pytestmark = pytest.mark.slow

RunCli = Callable[..., Any]
TORCH = ["torch", "bitsandbytes", "transformers", "accelerate"]
TINY = ("--shapes", "128x64", "--rows", "1,2", "--dtypes", "float32", "--samples", "1")
NAME = "forward 128x64, M=2, float32"


def ms(value: float) -> dict[str, Any]:
    return {"unit": "ms", "value": value}


@pytest.fixture
def as_ours(make_peer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Returns a function that replaces our interpreter with a fake one, which answers at once."""

    def make(figures: dict[str, Any], **more: Any) -> Path:
        made = make_peer("ours", [], figures, device="a device", variants={}, **more)
        monkeypatch.setattr(tools, "ours", lambda: tools.Tool("qlora-jax", str(made)))
        return made

    return make


def test_kernels_beside_two_peers(
    run_cli: RunCli,
    make_peer: Callable[..., Path],
    runs_of: Callable[[Path], list[Any]],
    tmp_path: Path,
) -> None:
    bnb = make_peer("bnb", TORCH[:2], {NAME: ms(8), "of no other": ms(1)})
    qwix = make_peer("qwix", ["jax", "qwix"], {NAME: ms(4)})
    picture = tmp_path / "k.png"
    ended = run_cli(
        *("bench", "kernels", *TINY, "--peer", bnb, "--peer", qwix),
        *("--rounds", 2, "--json", "--plot", picture),
    )
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    rounds = result["rounds"]
    assert [[r["tool"] for r in reports] for reports in rounds] == [
        ["qlora-jax", "bitsandbytes", "qwix"]
    ] * 2
    settled = rounds[0][0]["options"]
    assert settled["shapes"] == [[128, 64]]
    assert settled["device"]  # peers get the device, too
    assert runs_of(bnb) == [["bitsandbytes", "kernels", settled]] * 2
    assert runs_of(qwix) == [["qwix", "kernels", settled]] * 2
    (row,) = [row for row in result["summary"]["rows"] if row["figure"] == NAME]
    ours = [reports[0]["figures"][NAME]["value"] for reports in rounds]
    for tool, time in (("bitsandbytes", 8), ("qwix", 4)):
        assert row["cells"][tool]["median"] == time
        assert row["ratios"][tool]["each"] == pytest.approx([t / time for t in ours], rel=1e-3)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_alone_it_runs_once_and_prints_a_table(run_cli: RunCli) -> None:
    ended = run_cli("bench", "kernels", *TINY)
    assert ended.code == 0, ended.err
    assert re.fullmatch(r"bench kernels: about \d+ s on .* \(an estimate\)\n", ended.err)
    lines = ended.out.splitlines()
    assert lines[0].startswith("| median")
    assert any(line.startswith(f"| {NAME}, ms ") for line in lines)
    assert any(line.startswith("1 round on ") for line in lines)


def test_with_a_peer_there_are_three_rounds_on_the_same_options(
    run_cli: RunCli,
    as_ours: Callable[..., Path],
    make_peer: Callable[..., Path],
    runs_of: Callable[[Path], list[Any]],
    tiny_model: Path,
) -> None:
    ours = as_ours({"load": {"unit": "s", "value": 1}})
    peer = make_peer("peer", TORCH, {"load": {"unit": "s", "value": 2}})
    ended = run_cli("bench", "load", tiny_model, "--peer", peer, "--json")
    assert ended.code == 0, ended.err
    (row,) = json.loads(ended.out)["summary"]["rows"]
    assert row["ratios"]["bitsandbytes"]["each"] == [0.5, 0.5, 0.5]
    assert runs_of(ours) == [["qlora-jax", "load", {"model": str(tiny_model)}]] * 3
    assert runs_of(peer) == [["bitsandbytes", "load", {"model": str(tiny_model)}]] * 3


def test_options_reach_the_run(
    run_cli: RunCli,
    as_ours: Callable[..., Path],
    runs_of: Callable[[Path], list[Any]],
    tiny_model: Path,
) -> None:
    ours = as_ours({"speed": {"unit": "tokens/s", "value": 1}})
    ended = run_cli(
        *("bench", "step", tiny_model, "--method=lora", "--dtype=float32", "--remat=full"),
        *("--batch=3", "--seq=5", "--rank=7", "--steps=2", "--no-prepare", "--rounds=2"),
        *("--offload=host", "--kernel=triton", "--alpha=1.5", "--target-modules=q_proj,o_proj"),
    )
    assert ended.code == 0, ended.err
    wanted = StepOptions(
        *(str(tiny_model), "lora", "float32", "full", 3, 5, 7, 2),
        prepare=False,
        offload="host",
        kernel="triton",
        alpha=1.5,
        target_modules=("q_proj", "o_proj"),
    )
    wanted_tree = json.loads(json.dumps(to_tree(wanted)))
    assert runs_of(ours) == [["qlora-jax", "step", wanted_tree]] * 2
    assert from_tree("step", wanted_tree) == wanted


def test_a_published_name_needs_no_folder(
    run_cli: RunCli,
    as_ours: Callable[..., Path],
    make_peer: Callable[..., Path],
    runs_of: Callable[[Path], list[Any]],
) -> None:
    ours = as_ours({"make": {"unit": "s", "value": 1}})
    peer = make_peer("peer", [*TORCH, "peft"], {"make": {"unit": "s", "value": 2}})
    ended = run_cli("bench", "step", "llama-7b", "--peer", peer, "--rounds", "1")
    assert ended.code == 0, ended.err
    for side, tool in ((ours, "qlora-jax"), (peer, "bitsandbytes")):
        assert runs_of(side) == [
            [tool, "step", to_tree(StepOptions("llama-7b")) | {"target_modules": []}]
        ]


def test_a_peers_process_sees_neither_our_packages_nor_our_huge_pages(
    run_cli: RunCli,
    as_ours: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: Path,
) -> None:
    as_ours({})
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.check=0")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=512")
    peer = tmp_path / "peer"
    peer.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        "assert 'PYTHONPATH' not in os.environ\n"
        "assert os.environ['GLIBC_TUNABLES'] == 'glibc.malloc.check=0'\n"
        "assert 'XLA_FLAGS' not in os.environ\n"
        "print(json.dumps(sys.argv[3:]))\n"
        "sys.exit('saw nothing' if sys.argv[1] != '-c' else 0)\n"
    )
    peer.chmod(0o755)
    ended = run_cli("bench", "load", tiny_model, "--peer", peer)
    assert ended.code == 1
    assert ended.message == "qlora-jax: bench load: bitsandbytes ended with code 1: saw nothing"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "the following arguments are required: WHAT; see qlora-jax bench --help"),
        (["speed"], "argument WHAT: invalid choice: 'speed' (choose from"),
        (["kernels", "--rows", "0"], "--rows: must be a whole number of 1 or more, not '0'"),
        (["kernels", "--rows", "1,x"], "--rows: must be a whole number of 1 or more, not 'x'"),
        (["kernels", "--shapes", "4096"], "a shape is IN x OUT such as 4096x4096, not '4096'"),
        (["kernels", "--dtypes", "int8"], "'int8' is not one of bfloat16, float32, float16"),
        (["kernels", "--operations", "quantize,multiply"], "'multiply' is not one of quantize, "),
        (["kernels", "--batch", "2"], "unrecognized arguments: --batch 2"),
        (["step", "--method", "dora"], "--method: invalid choice: 'dora'"),
        (["step", "--alpha", "nan"], "--alpha: must be a number above 0, not 'nan'"),
        (["step", "--offload", "disk"], "--offload: invalid choice: 'disk'"),
        (["step", "llama-7b", "--seq", "2049"], "--seq 2049 is beyond the 2048 positions of llama"),
        (["step", "./none"], "./none: no such file or folder"),
        (["load", "a.gguf"], "a.gguf: no such file or folder"),
        (["generate", "./none"], "./none: no such file or folder"),
        (["load", "--peer", "./no-python"], "--peer ./no-python: not a Python interpreter"),
        (["kernels", "--peer", "/bin/ls"], "--peer /bin/ls: not a Python interpreter; give"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(run_cli: RunCli, arguments: list[str], expected: str) -> None:
    ended = run_cli("bench", *arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert expected in ended.err


@pytest.mark.parametrize(
    ("what", "packages", "missing"),
    [
        ("step", ["torch", "bitsandbytes"], "transformers, accelerate, peft (for bitsandbytes)"),
        ("kernels", ["torch", "jax"], "bitsandbytes (for bitsandbytes) or qwix (for qwix)"),
    ],
)
def test_a_peer_without_its_packages(
    run_cli: RunCli, make_peer: Callable[..., Path], what: str, packages: list[str], missing: str
) -> None:
    peer = make_peer("peer", packages)
    ended = run_cli("bench", what, "--peer", peer)
    assert ended.code == 2
    assert ended.message == (
        f"qlora-jax: --peer {peer}: bench {what} needs {missing}; install that for this Python"
    )


def test_a_peer_needs_a_folder(run_cli: RunCli, make_peer: Callable[..., Path]) -> None:
    peer = make_peer("peer", TORCH)
    ended = run_cli("bench", "load", "smollm2-135m-instruct", "--peer", peer)
    assert ended.code == 2
    assert "peers can only read a Hugging Face folder; give one, or random weights: " in ended.err


@pytest.mark.parametrize(("code", "ends"), [(2, 2), (1, 1), (137, 1)])
def test_a_peer_that_fails(
    run_cli: RunCli,
    as_ours: Callable[..., Path],
    make_peer: Callable[..., Path],
    code: int,
    ends: int,
) -> None:
    as_ours({})
    peer = make_peer("peer", TORCH[:2], code=code, message="a warning\nwhat was wrong\n")
    ended = run_cli("bench", "kernels", *TINY, "--peer", peer, "--rounds", "1")
    assert ended.code == ends
    assert ended.out == ""
    assert ended.message.endswith("what was wrong")


def test_nothing_to_draw(
    run_cli: RunCli, as_ours: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    as_ours({"load": {"unit": "s", "value": 1}})
    ended = run_cli("bench", "load", tiny_model, "--plot", tmp_path / "p.png")
    assert ended.code == 2
    assert "--plot: no product was timed and no peer given" in ended.message


def test_every_benchmark_has_a_line_and_its_options_their_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command.WHAT.keys() == BENCHMARKS.keys()
    for what in BENCHMARKS:
        with pytest.raises(SystemExit) as end:
            cli.main(["bench", what, "--help"])
        assert end.value.code == 0
        assert "--peer PYTHON" in capsys.readouterr().out
