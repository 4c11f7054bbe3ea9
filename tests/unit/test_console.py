"""The serial console: what is heard and typed, and talking in the manner of pexpect.

libvirt's test driver has no console, so its stream is a stand-in here; the real one is heard in
tests/real.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import libvirt
import pytest
from testdriver import disk

from pytest_kvmsnap import ConsoleError
from pytest_kvmsnap.guest import ready
from pytest_kvmsnap.guest.console import Console as Talk
from pytest_kvmsnap.machine.console import Console
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

if TYPE_CHECKING:
    from testdriver import Host


def wait(domain: Domain, means: str, timeout: float) -> None:
    ready.wait_ready(domain, ready.sign_of(domain, means), timeout)


class Stream:
    """A stream of libvirt's: says what it is told to, notes what is sent."""

    def __init__(self, *replies: object) -> None:
        self.sent = b""
        self.log: list[str] = []
        self.takes = 4
        self.replies = list(replies)
        self._chunks: list[object] = []
        self._call: Callable[..., None] = lambda *_: None

    def say(self, *chunks: object) -> None:
        for chunk in chunks:
            self._chunks.append(chunk)
            self._call(self, 1, None)

    def recv(self, _: int) -> object:
        chunk = self._chunks.pop(0) if self._chunks else -2
        if isinstance(chunk, Exception):
            raise chunk
        return chunk

    def send(self, data: bytes) -> int:
        if not self.takes:
            return -2
        self.sent += data[: self.takes]
        if data[: self.takes].endswith(b"\r") and self.replies:
            self.say(self.replies.pop(0))
        return min(len(data), self.takes)

    def eventAddCallback(self, _events: int, call: Callable[..., None], _: object) -> None:
        self._call = call
        self.log.append("listen")

    def eventUpdateCallback(self, events: int) -> None:
        self.log.append(f"events {events}")

    def eventRemoveCallback(self) -> None:
        self._call = lambda *_: None

    def abort(self) -> None:
        self.log.append("abort")


@pytest.fixture
def define(host: "Host") -> Iterator[Callable[..., Domain]]:
    hypervisor = connect("test:///default")

    def define(*devices: str) -> Domain:
        raw = host.define("box", disk("/x.qcow2"), *devices, state="running")
        return Domain(hypervisor, raw.UUIDString(), "box")

    yield define
    hypervisor.close()


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Stream]:
    """The streams that libvirt gives, one after another."""
    made = [Stream() for _ in range(3)]
    left = list(made)
    monkeypatch.setattr(libvirt.virConnect, "newStream", lambda *_: left.pop(0))
    monkeypatch.setattr(libvirt.virDomain, "openConsole", lambda *_: 0)
    return made


@pytest.fixture
def console(define: Callable[..., Domain], streams: list[Stream]) -> Console:
    console = define().console
    console.listen()
    return console


# what is heard


def test_what_is_heard_since_the_test_began(console: Console, streams: list[Stream]) -> None:
    streams[0].say(b"before\n")
    console.begin()
    assert console.said() == ""
    streams[0].say(b"one\r\ntw", -2, b"o\n")
    assert console.said() == "one\r\ntwo\n"
    assert console.lines() == "one\ntwo"


def test_it_is_listened_to_once(console: Console, streams: list[Stream]) -> None:
    console.listen()
    assert streams[0].log == ["listen"]
    assert streams[1].log == []


@pytest.mark.parametrize("end", [b"", libvirt.libvirtError("it went off")])
def test_a_machine_that_went_off_is_heard_again_when_it_runs(
    console: Console, streams: list[Stream], end: object
) -> None:
    """The stream that is over is closed by us, never in the thread of libvirt's events."""
    streams[0].say(b"one\n", end)
    assert not console.is_heard
    assert streams[0].log == ["listen", "events 0"]
    console.listen()
    streams[1].say(b"two\n")
    assert console.said() == "one\ntwo\n"
    assert streams[0].log == ["listen", "events 0", "abort"]


def test_a_jump_in_time_ends_it(console: Console, streams: list[Stream]) -> None:
    console.hang_up()
    assert streams[0].log == ["listen", "abort"]
    assert not console.is_heard


def test_control_characters_and_broken_text_do_no_harm(
    console: Console, streams: list[Stream]
) -> None:
    streams[0].say(b"\x1b[31mred\x1b[0m\r\n\n\xff\xc3\xbc\x00\n3\n4\n")
    assert console.lines() == "red\n\ufffdü\n3\n4"
    assert console.lines(2) == "3\n4"


def test_of_a_guest_that_never_stops_the_end_is_kept(
    console: Console, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_kvmsnap.machine.console._MOST", 10)
    position = console.end
    for number in range(10):
        streams[0].say(b"line %d\n" % number)
    assert console.end == 70
    assert (console.said() or "").endswith("line 8\nline 9\n")
    assert len(console.said() or "") <= 20
    assert console.heard(position).decode() == console.said()


# the log file


def test_the_log_file_tells_where_somebody_else_took_the_stream(
    define: Callable[..., Domain], streams: list[Stream], tmp_path: Path
) -> None:
    log = tmp_path / "console.log"
    console = define(f"<serial type='pty'><log file='{log}'/></serial>").console
    console.begin()
    console.boots()
    console.listen()
    streams[0].say(b"one\n", b"")
    log.write_text("one\ntwo\n")
    assert console.said() == "one\ntwo\n"
    console.boots()
    assert console.said_since_boot() == ""
    log.write_text("one\ntwo\nlogin: ")
    assert console.said_since_boot() == "login: "


def test_without_a_stream_the_log_file_tells(define: Callable[..., Domain], tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_text("before\n")
    console = define(f"<serial type='pty'><log file='{log}'/></serial>").console
    assert console.said() == "before\n"
    console.begin()
    log.write_text("before\none\n")
    assert console.said() == "one\n"
    log.write_text("new\n")  # by a new QEMU, where the definition does not say append
    assert console.said() == "new\n"


def test_nobody_knows_what_a_console_said_that_nobody_heard(
    define: Callable[..., Domain], tmp_path: Path
) -> None:
    console = define(f"<serial type='pty'><log file='{tmp_path / 'gone'}'/></serial>").console
    console.begin()
    console.listen()
    assert console.said() is None
    assert console.lines() == ""
    assert "not supported" in console.silence


# typing


def test_typing_goes_on_where_the_guest_took_a_part(
    console: Console, streams: list[Stream]
) -> None:
    console.type(b"some words")
    assert streams[0].sent == b"some words"


def test_a_guest_that_takes_nothing_is_told(
    console: Console, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_kvmsnap.machine.console._TYPING", 0.01)
    streams[0].takes = 0
    with pytest.raises(ConsoleError, match="cannot type on the console") as caught:
        console.type(b"x")
    assert caught.value.why == "the machine takes no more"


def test_no_console_to_type_on_is_told(define: Callable[..., Domain]) -> None:
    with pytest.raises(ConsoleError, match="cannot type on the console") as caught:
        define().console.type(b"x")
    assert caught.value.where == "box at test:///default"
    assert "not supported" in caught.value.why
    assert "<serial type='pty'>" in caught.value.cure


# in the manner of pexpect


@pytest.fixture
def talk(define: Callable[..., Domain], streams: list[Stream]) -> Talk:
    talk = Talk(define())
    talk._console.listen()
    return talk


def test_expect_waits_for_a_pattern(talk: Talk, streams: list[Stream]) -> None:
    streams[0].say(b"Debian\r\nbox login: \xc3")
    assert talk.expect(r"(\w+) login: ") == 0
    assert (talk.before, talk.after) == ("Debian\r\n", "box login: ")
    assert talk.match is not None
    assert talk.match[1] == "box"
    streams[0].say(b"\xbc!")  # the rest of a letter
    assert talk.expect_exact("\u00fc!") == 0
    assert talk.before == ""


def test_of_several_the_first_in_the_text_counts(talk: Talk, streams: list[Stream]) -> None:
    streams[0].say(b"one two")
    assert talk.expect(["two", "one"]) == 1
    assert talk.expect_exact(["x", "two"]) == 1


def test_expect_waits_until_it_is_said(talk: Talk, streams: list[Stream]) -> None:
    streams[0].replies = [b"x\r\nfirst\r\n", b"second\r\n"]
    talk.sendline("x")
    talk.expect("first")
    talk.sendline("y")
    talk.expect("second")
    assert streams[0].sent == b"x\ry\r"


def test_keys_with_control(talk: Talk, streams: list[Stream]) -> None:
    talk.sendcontrol("c")
    talk.sendcontrol("]")
    assert streams[0].sent == b"\x03\x1d"


def test_what_is_not_said_is_told_with_what_is(talk: Talk, streams: list[Stream]) -> None:
    streams[0].say(b"something else\r\n")
    with pytest.raises(ConsoleError, match="the console did not say 'this' or 'that'") as caught:
        talk.expect(["this", "that"], timeout=0.01)
    assert caught.value.why == "waited 0.01 s; it said last:\n| something else"
    talk.timeout = 0
    with pytest.raises(ConsoleError, match="did not say"):
        talk.expect_exact("never")
    talk.expect("else")  # it is still there


def test_a_machine_that_is_off_is_not_waited_for(
    talk: Talk, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams[0].say(b"last words", b"")
    monkeypatch.undo()  # libvirt opens none now
    talk.expect("words", timeout=600)
    with pytest.raises(ConsoleError, match="did not say 'more'") as caught:
        talk.expect("more", timeout=600)
    assert "not supported" in caught.value.why


@pytest.mark.parametrize("ends", ["a test", "a revert"])
def test_what_was_heard_before_is_not_matched(talk: Talk, streams: list[Stream], ends: str) -> None:
    streams[0].say(b"old word \xc3")
    talk.expect("old")  # the rest of it waits still
    if ends == "a test":
        talk._console.begin()
    else:
        talk._console.hang_up()
        talk._console.listen()
    (streams[0] if ends == "a test" else streams[1]).say(b"new word")
    talk.expect("word")
    assert talk.before == "new "


# ready=console:REGEX


def test_a_machine_that_was_up_before_is_ready(console: Console) -> None:
    wait(console._domain, "console:login: ", 0)


def test_a_machine_that_boots_is_waited_for_until_it_says_so(
    console: Console, streams: list[Stream], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams[0].say(b"login: ")  # of the time before
    console.boots()
    said = iter([b"Linux version\n", b"box login: "])

    def sleep(_: float) -> None:
        streams[0].say(next(said))

    monkeypatch.setattr(ready, "time", Sleepless(sleep))
    wait(console._domain, "console:login: $", 60)
    assert next(said, None) is None


def test_a_machine_that_does_not_say_so_is_told(console: Console, streams: list[Stream]) -> None:
    console.boots()
    streams[0].say(b"Kernel panic\n")
    with pytest.raises(Exception, match="the machine did not get ready") as caught:
        wait(console._domain, "console:login: ", 0)
    assert "for its console to say 'login: '" in str(caught.value)
    assert "| Kernel panic" in str(caught.value)


def test_a_log_file_tells_it_too(define: Callable[..., Domain], tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    domain = define(f"<serial type='file'><source path='{log}'/></serial>")
    domain.console.begin()
    domain.console.boots()
    log.write_text("box login: ")
    wait(domain, "console:login: ", 0)


class Sleepless:
    """In place of the module `time`: something happens instead of sleep."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self.sleep = sleep

    @staticmethod
    def monotonic() -> Any:
        return 0.0
