"""Tests agreement between the processes of a run, with a dict as coordination service."""

import threading

import pytest

from qlora_jax import cli
from qlora_jax.runtime import processes
from qlora_jax.runtime.errors import UserError

VARIABLES = {*processes.OWN, *processes.TORCHRUN, *processes.SIZES}


class Service:
    """Replaces the client of jax's coordination service."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self.changed:
            if key in self.values:
                raise KeyError(key)
            self.values[key] = value
            self.changed.notify_all()

    def key_value_try_get(self, key: str) -> str:
        return self.values[key]

    def blocking_key_value_get(self, key: str, wait_ms: int) -> str:
        with self.changed:
            assert self.changed.wait_for(lambda: key in self.values, timeout=10)
            return self.values[key]


@pytest.fixture
def pretend(monkeypatch):
    """Returns a function that makes this process one of two and returns their shared service."""
    service = Service()
    monkeypatch.setattr(processes, "_client", lambda: service)
    monkeypatch.setattr(processes, "_error", lambda: KeyError)

    def become(index: int) -> Service:
        monkeypatch.setattr(processes, "_here", (2, index))
        monkeypatch.setattr(processes, "_numbers", iter(range(100)))
        return service

    return become


@pytest.fixture
def place(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def found(**environment: str):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return processes._place()

    return found


def test_a_process_alone_does_everything_itself() -> None:
    assert processes.count() == 1
    assert processes.is_first()
    assert processes.name() == ""
    assert processes.by_first(lambda: 5) == 5
    processes.agree({"configs": "a"})
    assert processes.stop_at(15, 3) == 15
    assert processes.stop_at(None, 3) is None


def test_the_first_process_acts_and_the_others_wait(pretend) -> None:
    pretend(0)
    assert processes.by_first(lambda: 5) == 5
    pretend(1)
    assert processes.by_first(lambda: pytest.fail("the second process acts, too")) is None


def test_an_error_of_the_first_process_is_everyones(pretend) -> None:
    def full() -> None:
        raise UserError("no space left")

    for index in (0, 1):
        pretend(index)
        with pytest.raises(UserError, match="no space left"):
            processes.by_first(full)


def test_what_differs_is_named_in_every_process(pretend) -> None:
    service = pretend(0)
    service.key_value_set("qlora_jax/0/1", '{"configs": "a", "code": "c"}')
    with pytest.raises(UserError, match="processes 0 and 1 have different code"):
        processes.agree({"configs": "a"})
    pretend(1)
    del service.values["qlora_jax/0/1"]
    with pytest.raises(UserError, match="processes 0 and 1 have different configs"):
        processes.agree({"configs": "b"})


def test_all_stop_after_the_same_step(pretend) -> None:
    """Process 1 gets the signal at step 5, two steps behind process 0; both stop after step 15."""
    pretend(1)
    assert processes.stop_at(15, 5) is None
    assert processes.stop_at(15, 6) is None
    pretend(0)
    assert processes.stop_at(None, 7) is None
    assert processes.stop_at(None, 8) == 15
    pretend(1)
    assert processes.stop_at(15, 7) is None
    assert processes.stop_at(15, 8) == 15


def test_the_environment_says_which_process_this_is(place) -> None:
    assert place() == {}
    assert not processes.has_several_processes()
    own = dict(zip(processes.OWN, ("host:1234", "4", "3")))
    assert place(**own) == {
        "coordinator_address": "host:1234",
        "num_processes": 4,
        "process_id": 3,
    }
    assert processes.has_several_processes()


def test_torchruns_variables_are_understood(place) -> None:
    torchrun = dict(zip(processes.TORCHRUN, ("host", "1234", "16", "9")))
    found = place(**torchrun, LOCAL_RANK="1", LOCAL_WORLD_SIZE="8")
    assert found == {
        "coordinator_address": "host:1234",
        "num_processes": 16,
        "process_id": 9,
        "local_device_ids": [1],
    }
    # A process alone on its host takes all devices of the host.
    assert "local_device_ids" not in place(**torchrun, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")


def test_a_variable_that_is_no_number_is_refused(place) -> None:
    with pytest.raises(UserError, match="correct JAX_COORDINATOR_ADDRESS"):
        place(**dict(zip(processes.OWN, ("host:1234", "four", "3"))))


def test_other_code_has_another_digest(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(processes.paths, "PACKAGE", tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    one = processes.code_digest()
    assert processes.code_digest() == one
    (tmp_path / "a.py").write_text("x = 2\n")
    assert processes.code_digest() != one


def test_the_others_hear_of_a_fault_of_the_program(pretend, monkeypatch, capsys) -> None:
    pretend(1)
    told, left = [], []
    monkeypatch.setattr(processes, "tell_others", told.append)
    monkeypatch.setattr(processes, "leave", left.append)
    monkeypatch.setattr(cli.limits, "check", lambda: 1 / 0)
    cli.main(["train", "config.yaml"])
    assert told == ["ZeroDivisionError('division by zero')"]
    assert left == [cli.FAILED]
    assert "test_processes.py" in capsys.readouterr().err
