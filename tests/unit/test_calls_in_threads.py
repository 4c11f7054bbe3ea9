"""A call to libvirt can be waited for with a deadline, though not be broken off."""

import threading
from collections.abc import Iterator

import pytest

from pytest_kvmsnap.machine.calls import Call


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What the calls wait for; open at the end, so that no thread stays."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_a_call_that_ends_is_done() -> None:
    done: list[int] = []
    call = Call(lambda: done.append(1))
    assert call.ended_within(60)
    call.raise_error()
    assert done == [1]


def test_a_call_that_does_not_end_is_told_at_the_deadline(gate: threading.Event) -> None:
    call = Call(lambda: assert_opened(gate))
    assert not call.ended_within(0.05)
    gate.set()
    assert call.ended_within(60)
    call.raise_error()


def assert_opened(gate: threading.Event) -> None:
    assert gate.wait(60)


@pytest.mark.parametrize("error", [ValueError("its own"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_is_handed_to_the_callers_thread(error: BaseException) -> None:
    def fail() -> None:
        raise error

    call = Call(fail)
    assert call.ended_within(60)
    with pytest.raises(type(error)) as caught:
        call.raise_error()
    assert caught.value is error


@pytest.mark.parametrize("raised", [KeyboardInterrupt, pytest.fail.Exception])
def test_what_a_signal_raises_is_kept_until_the_call_has_ended(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch, raised: type[BaseException]
) -> None:
    """Ctrl-C, or pytest-timeout. A mock of `join`: a signal would have to hit the right moment."""
    call = Call(lambda: assert_opened(gate))
    join = threading.Thread.join
    joins: list[float | None] = []

    def interrupted(self: threading.Thread, timeout: float | None = None) -> None:
        joins.append(timeout)
        if len(joins) == 1:
            raise raised
        gate.set()
        join(self, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(raised):
        call.ended_within(60)
    assert len(joins) == 2
    assert call.ended_within(0.0) or call.ended_within(60)
