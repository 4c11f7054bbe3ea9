"""The tree of a machine's states: where tests start, and what preparations added to that.

A *state* is kept as a snapshot. The roots are the machine's baseline and snapshots of its owner;
each preparation adds a state below the one that it was made from. A *line* is how the machine goes
on from a state in tests that hold it for longer than themselves: nothing is undone between them,
so a line that is left for another state is kept as a snapshot too, and comes back.
"""

import re
from collections.abc import Hashable
from dataclasses import dataclass

from pytest_kvmsnap.errors import ConnectionLostError, KvmsnapError
from pytest_kvmsnap.lab.machine import Machine


@dataclass(eq=False)
class State:
    """A state that tests and preparations start from.

    `snapshots` are those that hold it: first the one to go to, then those that its preparation took
    itself. `above` is the state that it was made from, None for a root.
    """

    snapshots: tuple[str, ...]
    above: "State | None" = None

    @property
    def snapshot(self) -> str:
        return self.snapshots[0]

    @property
    def root(self) -> "State":
        return self if self.above is None else self.above.root

    def is_on(self, other: "State") -> bool:
        """Tell whether it is another state, or was made from it, however indirectly."""
        return self is other or (self.above is not None and self.above.is_on(other))

    def was_made_on(self, other: "State | None") -> bool:
        """Tell whether it was made right from this state; None stands for a root."""
        if other is None:
            return self.above is not None and self.above.above is None
        return self.above is other


@dataclass(eq=False)
class _Line:
    """`head` are the snapshots that hold it while the machine is elsewhere."""

    state: State
    holder: Hashable
    head: tuple[str, ...] = ()
    lost: KvmsnapError | None = None


class Savepoints:
    """The states of one machine, and which of them it is at.

    `holders` are the fixtures that hold the machine for longer than a test.
    """

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.holders: set[Hashable] = set()
        self._roots: dict[str, State] = {}
        self._lines: list[_Line] = []
        self._line: _Line | None = None  # the one that the machine is on
        self._at: State | None = None  # the state that the machine was last at or goes on from
        self._is_owing = False  # what was done since then is to be undone
        self._is_in_test = True  # it was taken for one

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs the machine just now. One that failed is never idle."""
        return not self.holders and not self._is_in_test and not self.machine.has_failed

    def reserve(self) -> None:
        """Note that a test is about to use the machine: it is not idle until `settle`."""
        self._is_in_test = True

    def root(self, snapshot: str | None) -> State:
        """Return the state of the baseline, or of an existing snapshot.

        Raises:
            MachineError: the baseline cannot be had.
        """
        name = self.machine.start_of(snapshot)
        return self._roots.setdefault(name, State((name,)))

    def holds(self, state: State) -> bool:
        """Tell whether a state is one of this machine."""
        return state.root in self._roots.values()

    def start(self, state: State) -> None:
        """Bring the machine to a state, running and ready, for a test or a preparation.

        Raises:
            MachineError: that failed.
        """
        self._is_in_test = True
        self._leave_line()
        self.machine.go(state.snapshot)
        self.machine.touched()
        self._at, self._is_owing = state, False

    def undo(self, state: State) -> None:
        """Put the machine back to where a test started.

        Raises:
            RevertError: that failed.
        """
        self.machine.back(state.snapshot)
        self._at, self._is_owing = state, False

    # preparations

    def keep(self, above: State, name: str) -> State:
        """Keep what a preparation made of the state above as a state of its own.

        Raises:
            MachineError: the machine did not get ready, or the snapshot could not be taken.
        """
        label = re.sub(r"\W", "_", name, flags=re.ASCII)[:60]
        self._at = State(self.machine.keep(label), above)
        return self._at

    def give_up(self, above: State) -> None:
        """Note that a preparation failed: what it did is to be undone."""
        self._at, self._is_owing = above, True

    def resume(self, state: State) -> None:
        """Bring the machine to where a state was left, for what tears its preparation down.

        Raises:
            MachineError: that failed.
        """
        lines = [line for line in self._lines if line.state is state]
        if lines:
            self.go_on(state, lines[-1].holder)
        else:
            self.start(state)

    def drop(self, state: State) -> None:
        """Let go of a state whose preparation is torn down, and of the lines on it."""
        self._drop_lines([line for line in self._lines if line.state is state])
        self.machine.forget(state.snapshots)
        if self._at is state:
            self._at, self._is_owing = state.above, True

    # lines

    def go_on(self, state: State, holder: Hashable) -> bool:
        """Bring the machine to the line of a holder from a state; a new line starts at the state.

        Returns whether it is a new one.

        Raises:
            MachineError: that failed, or the line could not be kept when it was left.
        """
        self._is_in_test = True
        line = next((x for x in self._lines if (x.state, x.holder) == (state, holder)), None)
        if line is None:
            line = _Line(state, holder)
            self._lines.append(line)
        if line.lost is not None:
            raise line.lost
        if self._line is line:
            return False
        self._leave_line()
        if line.head:
            self.machine.go(line.head[0], as_kept=True)
        else:
            self.machine.go(state.snapshot)
        self.machine.touched()
        self._line, self._at, self._is_owing = line, state, False
        return not line.head

    def end(self, holder: Hashable) -> None:
        """Let go of the lines of a holder, whose scope has ended."""
        self.holders.discard(holder)
        self._drop_lines([line for line in self._lines if line.holder == holder])

    def break_off(self, state: State, holder: Hashable) -> None:
        """Let go of a line that did not come to be what it should."""
        self._drop_lines([x for x in self._lines if (x.state, x.holder) == (state, holder)])

    def settle(self) -> None:
        """Undo at the end of a test what was let go of, rather than when that is in the way.

        The snapshots that held it are deleted.

        Raises:
            MachineError: that failed.
        """
        self._is_in_test = False
        if self.machine.has_failed:
            return
        if self._is_owing and self._at is not None:
            self.undo(self._at)
        self.machine.tidy()

    def _leave_line(self) -> None:
        line, self._line = self._line, None
        if line is None:
            return
        try:
            kept = self.machine.keep_as_it_is("held")
        except ConnectionLostError:  # nothing is known of the line but that it is not left
            self._line = line
            raise
        except KvmsnapError as error:  # of no concern to the test that comes in between
            line.lost = error
        else:
            self.machine.forget(line.head[:1])
            line.head = kept + line.head[1:]

    def _drop_lines(self, lines: list[_Line]) -> None:
        for line in lines:
            self._lines.remove(line)
            self.machine.forget(line.head)
            if self._line is line:
                self._line, self._is_owing = None, True
