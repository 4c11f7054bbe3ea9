"""Talking to a guest over its serial console: for guests without agent or network."""

import codecs
import re
import time
from collections.abc import Sequence

from pytest_kvmsnap.errors import ConsoleError
from pytest_kvmsnap.machine.domain import Domain

Pattern = str | re.Pattern[str]

_SLICE = 0.2  # seconds between looks whether the machine is still there


class Console:
    """The serial console of a machine, in the manner of pexpect.

    `expect` waits for a text and `sendline` types one. What the guest said before the last match is
    in `before`, the match itself in `match`, its text in `after`. Waiting begins with the first
    thing that the console said in the test, or since `VM.revert` in it, and goes on behind each
    match.

    Attributes:
        timeout: seconds that `expect` waits unless told otherwise.
    """

    def __init__(self, domain: Domain) -> None:
        self.timeout: float = 30
        self.before = ""
        self.after = ""
        self.match: re.Match[str] | None = None
        self._domain = domain
        self._console = domain.console
        self._text = ""  # heard, and not matched yet
        self._mark = self._position = -1  # as if there had been a jump in time
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def send(self, text: str) -> None:
        """Type a text.

        Raises:
            ConsoleError: the machine is off, has no such console, or somebody else has it open.
        """
        self._console.type(text.encode())

    def sendline(self, text: str = "") -> None:
        """Type a text and press Enter."""
        self.send(f"{text}\r")

    def sendcontrol(self, key: str) -> None:
        """Press Ctrl and a key: `sendcontrol("c")`."""
        self.send(chr(ord(key.upper()) & 0x1F))

    def expect(self, pattern: Pattern | Sequence[Pattern], timeout: float | None = None) -> int:
        """Wait until the console says something; return the index of the pattern that matched.

        Patterns are regular expressions, in which `$` is of little use: more may be on its way.
        Of several that match, the one whose match begins first counts.

        Raises:
            ConsoleError: it did not within `timeout` seconds, or the machine went off; the message
                has what it said instead.
        """
        __tracebackhide__ = True
        given = [pattern] if isinstance(pattern, str | re.Pattern) else list(pattern)
        return self._expect([re.compile(each) for each in given], timeout)

    def expect_exact(self, text: str | Sequence[str], timeout: float | None = None) -> int:
        """Wait for one of these texts as they are; else like `expect`."""
        __tracebackhide__ = True
        given = [text] if isinstance(text, str) else list(text)
        return self._expect([re.compile(re.escape(each)) for each in given], timeout)

    def _expect(self, patterns: Sequence[re.Pattern[str]], timeout: float | None) -> int:
        __tracebackhide__ = True
        patience = self.timeout if timeout is None else timeout
        end = time.monotonic() + patience
        self._console.listen()
        while True:
            is_there = self._console.is_heard  # before what it heard is taken
            self._take()
            index = self._matched(patterns)
            if index is not None:
                return index
            left = end - time.monotonic()
            if left <= 0 or not is_there:
                raise self._missed(patterns, patience if is_there else None)
            self._console.wait(self._position, min(left, _SLICE))

    def _take(self) -> None:
        if self._mark != self._console.mark:  # another test began, or the machine was reverted
            self._mark = self._position = self._console.mark
            self._text = ""
            self._decoder.reset()
        heard = self._console.heard(self._position)
        self._position += len(heard)
        self._text += self._decoder.decode(heard)

    def _matched(self, patterns: Sequence[re.Pattern[str]]) -> int | None:
        found = [
            (match.start(), index, match)
            for index, each in enumerate(patterns)
            if (match := each.search(self._text))
        ]
        if not found:
            return None
        _, index, self.match = min(found, key=lambda each: each[:2])
        self.before, self.after = self._text[: self.match.start()], self.match[0]
        self._text = self._text[self.match.end() :]
        return index

    def _missed(self, patterns: Sequence[re.Pattern[str]], waited: float | None) -> ConsoleError:
        wanted = " or ".join(repr(each.pattern) for each in patterns)
        what = f"the console did not say {wanted}"
        if waited is None:
            return self._console.unheard(what)
        said = "\n".join("| " + line for line in self._console.lines().splitlines())
        return ConsoleError(
            what,
            where=self._domain.where,
            why=f"waited {waited:g} s"
            + (f"; it said last:\n{said}" if said else "; it said nothing at all"),
        )
