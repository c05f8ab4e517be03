import signal
import threading

import pytest

from qlora_jax.train.interrupt import Requests, Stopped


class Default(Exception):
    pass


@pytest.fixture
def handlers():
    """Sets handlers that raise, as the handlers before a run; yields the handler of each signal."""

    def act(number, frame):
        raise Default(number)

    previous = {n: signal.signal(n, act) for n in (signal.SIGINT, signal.SIGTERM)}
    yield dict.fromkeys(previous, act)
    for number, handler in previous.items():
        signal.signal(number, handler)


def current():
    return {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted(handlers, number):
    with Requests() as requests:
        assert requests.signal is None
        signal.raise_signal(number)
        assert requests.signal == number


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_acts_at_once(handlers, second):
    with Requests() as requests:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Default):
            signal.raise_signal(second)
        assert requests.signal == signal.SIGTERM


def test_handlers_come_back(handlers):
    with Requests():
        assert current() != handlers
    assert current() == handlers
    with pytest.raises(ZeroDivisionError), Requests():
        raise ZeroDivisionError
    assert current() == handlers


def test_another_thread_leaves_the_handlers_alone(handlers):
    seen = []

    def enter():
        with Requests() as requests:
            seen.append((requests.signal, current()))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, handlers)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_is_128_and_the_signal(number, code):
    stopped = Stopped(number, 7)
    assert stopped.code == code
    assert str(stopped) == f"stopped by {signal.Signals(number).name} after step 7"
