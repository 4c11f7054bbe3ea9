"""Which state of its machine each test starts from.

pytest's fixtures are on one side, the savepoints of machines on the other. A *preparation* is a
class, module or session fixture that asks for `class_vm`, `module_vm` or `session_vm`, itself or
through others. Each makes a state of its own, on top of the states of the preparations that its
test has before it. pytest sets it up once for its scope, so one that was made on other states than
those of a test is torn down first, and made anew.
"""

import contextlib
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from pytest_kvmsnap import reporting, run
from pytest_kvmsnap.course import Course, begin, course_of, has_begun
from pytest_kvmsnap.errors import ConnectionLostError
from pytest_kvmsnap.markers import FIXTURES, Request, request_of, requests_of
from pytest_kvmsnap.preparations import (
    hidden,
    made_for_others,
    prepared_by,
    too_late,
    unset,
    unset_on_error,
)
from pytest_kvmsnap.usage import closure_of, closure_under, is_ours, nearest

if TYPE_CHECKING:
    from pytest_kvmsnap.lab.ledger import Ledger
    from pytest_kvmsnap.lab.savepoints import Savepoints, State
    from pytest_kvmsnap.usage import Definition
    from pytest_kvmsnap.vm import VM

_STATES = pytest.StashKey["_States"]()


def clean_machine(request: pytest.FixtureRequest) -> "VM":
    """Give a test its machine, clean; it is put back when the test is torn down."""
    with run.told():
        return states_of(request.config).clean_machine(_item_of(request))


@contextlib.contextmanager
def held_machine(request: pytest.FixtureRequest) -> "Iterator[VM]":
    """Give a wide fixture its machine; what is done with it is undone at the fixture's end."""
    states = states_of(request.config)
    with run.told():
        if not has_begun(_item_of(request)):  # nobody listened when this was set up
            _refuse_hidden_preparation(request)
        wanted = states.request(_item_of(request), request.scope)
        savepoints = run.lab_of(request.config).savepoints(wanted)
    scope = request.scope
    states.held[scope] = (wanted, savepoints)
    savepoints.holders.add(scope)
    yield savepoints.machine.vm(partial(states.used, savepoints, wanted, scope))
    del states.held[scope]
    savepoints.end(scope)


def states_of(config: pytest.Config) -> "_States":
    """Return the states of this run, which listens to pytest from the first call on."""
    if _STATES not in config.stash:
        config.stash[_STATES] = states = _States(config)
        config.pluginmanager.register(states, "kvmsnap-states")
        reporting.listen(config, _starts_of)
    return config.stash[_STATES]


def _starts_of(item: pytest.Item) -> "dict[Ledger, str]":
    return {machine.ledger: start for machine, start in course_of(item).starts.items()}


def _item_of(request: pytest.FixtureRequest) -> pytest.Item:
    item: pytest.Item = request._pyfuncitem  # a wide fixture has no other way to its test
    return item


def _active(item: pytest.Item) -> "list[Definition]":
    """Return the fixtures that a test uses so far, `getfixturevalue` included.

    One that is overridden is left out as soon as its override is set up.
    """
    request: Any = getattr(item, "_request", None)
    return list(request._fixture_defs.values()) if request else []  # False after the test


def _scopes_of(item: pytest.Item) -> set[str]:
    """Return the scopes of our fixtures in a test."""
    return {definition.scope for definition in closure_of(item) if is_ours(definition)}


def _refuse_hidden_preparation(request: pytest.FixtureRequest) -> None:
    """Refuse a wide fixture that asks for ours by `getfixturevalue`: the next time nobody sees it.

    Raises:
        ConfigError: that is so.
    """
    item: pytest.Item = _item_of(request)
    ours: Definition = request._fixturedef  # type: ignore[attr-defined]
    for asking in request._iter_chain():
        definition = getattr(asking, "_fixturedef", None)
        if definition is None or definition is ours or definition.scope == "function":
            continue
        if ours not in closure_under(item, definition):
            raise hidden(definition.argname, ours.argname)


class _States:
    def __init__(self, config: pytest.Config) -> None:
        # by ours that are wide, by their scope
        self.held: dict[str, tuple[Request, Savepoints]] = {}
        self._config = config
        self._made: dict[Definition, dict[Request, State]] = {}
        self._being_made: list[tuple[str, set[Savepoints]]] = []
        self._item: pytest.Item | None = None

    # pytest's hooks

    # Inside of what pytest wraps around a test, which must have begun when an error is raised here.
    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, object, object]:
        __tracebackhide__ = True
        self._item = item
        begin(item)
        with run.told():
            lab = run.lab_of(self._config)
            lab.replace_failed()
            self._unmake_what_does_not_fit(item)
            lab.prepare(self._by_machine(item, _scopes_of(item)), item.nodeid)
            lab.begin()
        result = yield
        with run.told():
            self._enter(item)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        __tracebackhide__ = True
        course = course_of(item)
        course.is_in_call = True
        try:
            return (yield)
        finally:
            course.is_in_call = False

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: "Definition", request: pytest.FixtureRequest
    ) -> Generator[None, object, object]:
        __tracebackhide__ = True
        item = _item_of(request)
        if fixturedef.scope == "function":
            with unset_on_error(fixturedef, request):
                self._enter(item, [asking.fixturename for asking in request._iter_chain()])
            return (yield)
        if is_ours(fixturedef):
            return (yield)
        with self._preparation(fixturedef, request, item):
            return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, object, object]:
        __tracebackhide__ = True
        course_of(item).is_in_test = False
        lab = run.lab_of(self._config)
        try:
            result = yield
        except BaseException:
            lab.settle()  # what fails here is told to the next who needs the machine
            raise
        with run.told():
            for failure in lab.settle():
                raise failure
        return result

    def pytest_enter_pdb(self) -> None:
        """Tell how to reach the machines of the test, which is torn down after the debugger."""
        from pytest_kvmsnap.guest.reach import ways_to

        voice = run.voice(self._config)
        for savepoints in course_of(self._item).entered.values() if self._item else ():
            machine = savepoints.machine
            voice.line(
                f"{machine.domain.name} stays as the test left it until you leave the debugger;"
                f" reach it by {', '.join(ways_to(machine.guest))}"
            )

    # what a test starts from

    def request(self, item: pytest.Item, scope: str) -> Request:
        return request_of(item, scope, run.settings_of(self._config))

    def _savepoints(self, request: Request) -> "Savepoints":
        savepoints = run.lab_of(self._config).savepoints(request)
        if self._item is not None:
            course_of(self._item).works_on(savepoints.machine)
        return savepoints

    def clean_machine(self, item: pytest.Item) -> "VM":
        request = self.request(item, "function")
        course = course_of(item)
        if request not in course.vms:
            self._start_clean(item, request)
        return course.vms[request]

    def used(self, savepoints: "Savepoints", request: Request, scope: str) -> None:
        """Note a use of the machine of a wide fixture, and bring it to where it is used.

        Mostly it is there already. It is not when a test asked for it by `getfixturevalue`.

        A fixture that uses it without asking for it fails.
        """
        __tracebackhide__ = True
        savepoints.machine.touched()
        with run.told():
            if self._being_made:
                name, machines = self._being_made[-1]
                if savepoints not in machines:
                    raise hidden(name, FIXTURES[scope])
            elif self._item is not None and scope in savepoints.holders:
                course = course_of(self._item)
                if course.is_in_test and request.machine not in course.entered:
                    self._hold(self._item, request, scope)

    def _enter(self, item: pytest.Item, under_way: Sequence[str | None] = ()) -> None:
        """Bring the machines that wide fixtures hold to where the test starts.

        To be called when these are set up, before a fixture of the test itself uses the machine.
        Preparations that an override of the test's own scope hides from pytest are set up now.
        `under_way` are the names of the fixtures that are being set up.
        """
        course = course_of(item)
        if course.is_in_test:
            return
        course.is_in_test = True
        for definition in self._not_yet_asked_for(item):
            if definition.argname not in under_way:
                item._request.getfixturevalue(definition.argname)  # type: ignore[attr-defined]
        scopes = _scopes_of(item)
        wide = {self.request(item, scope).machine for scope in scopes - {"function"}}
        for request, scope in self._by_machine(item, scopes).items():
            if scope != "function":
                self._hold(item, request, scope)
            elif request.machine in wide:  # else `vm` brings it there itself
                self._start_clean(item, request)

    def _not_yet_asked_for(self, item: pytest.Item) -> "dict[Definition, dict[Request, str]]":
        """Return the preparations of a test that are to be set up still, with their machines."""
        active = _active(item)
        return {
            definition: prepared
            for definition, ours in closure_of(item).items()
            if (prepared := self._prepared_by(item, definition, ours))
            and definition not in active
            and nearest(item, definition) not in active
        }

    def _start_clean(self, item: pytest.Item, request: Request) -> None:
        for definition, prepared in self._not_yet_asked_for(item).items():
            if request in prepared:
                raise too_late(definition.argname, request, "vm", item.nodeid)
        savepoints = self._savepoints(request)
        course = self._work_on(item, savepoints)
        state = self._state(item, request)
        course.starts[savepoints.machine] = state.snapshot
        savepoints.start(state)
        vm = course.vms[request] = self._vm(savepoints)
        course.entered[request.machine] = savepoints

        def undo() -> None:
            del course.vms[request]
            hook, failed = self._config.hook, course.has_failed
            try:
                hook.pytest_kvmsnap_before_revert(vm=vm, item=item, failed=failed)
            finally:
                with run.told():
                    savepoints.undo(state)
                    self._refuse_what_came_late(item, request, state)

        item.addfinalizer(undo)
        self._config.hook.pytest_kvmsnap_vm_ready(vm=vm)

    def _work_on(self, item: pytest.Item, savepoints: "Savepoints") -> "Course":
        course = course_of(item)
        course.works_on(savepoints.machine)
        savepoints.machine.used_by(item.nodeid)
        return course

    @staticmethod
    def _vm(savepoints: "Savepoints") -> "VM":
        return savepoints.machine.vm(savepoints.machine.touched)

    def _refuse_what_came_late(self, item: pytest.Item, request: Request, state: "State") -> None:
        """Refuse a preparation that the test asked for while `vm` was in use.

        That it was made for another test before makes no difference.
        """
        for definition in _active(item):
            made = self._made.get(definition, {}).get(request)
            if made is not None and not state.is_on(made):
                raise too_late(definition.argname, request, "vm", item.nodeid)

    def _hold(self, item: pytest.Item, request: Request, scope: str) -> None:
        savepoints = self._savepoints(request)
        course = self._work_on(item, savepoints)
        state = self._state(item, request)
        course.starts[savepoints.machine] = state.snapshot
        is_new = savepoints.go_on(state, scope)
        course.entered[request.machine] = savepoints
        if is_new:
            try:
                self._config.hook.pytest_kvmsnap_vm_ready(vm=self._vm(savepoints))
            except BaseException:  # the next test starts anew, and has the hook called again
                savepoints.break_off(state, scope)
                raise

    def _by_machine(self, item: pytest.Item, scopes: Collection[str]) -> dict[Request, str]:
        return requests_of(item, scopes, run.settings_of(self._config))

    def _state(self, item: pytest.Item, request: Request) -> "State":
        """Return the innermost state that the test's own fixtures made, else the machine's root.

        Raises:
            ConfigError: they were made on different states (`getfixturevalue` leads there).
        """
        state = self._savepoints(request).root(request.snapshot)
        for definition in dict.fromkeys([*closure_of(item), *_active(item)]):
            made = self._made.get(definition, {}).get(request)
            if made is None or state.is_on(made):
                continue
            if not made.is_on(state):
                raise made_for_others(definition.argname, item.nodeid)
            state = made
        return state

    # preparations

    def _unmake_what_does_not_fit(self, item: pytest.Item) -> None:
        """Tear down the preparations of a test that were made on other states than it has.

        So are our own wide fixtures that give another machine than the test's markers and
        parameters name, and what was made on a throwaway machine that is no more. pytest sets all
        of them up again.
        """
        __tracebackhide__ = True
        fitting: dict[Request, State] = {}
        unsure: set[Request] = set()
        misfits = []
        for definition, ours in closure_of(item).items() if self.held else ():
            if is_ours(definition) and definition.scope in self.held:
                wanted, savepoints = self.held[definition.scope]
                is_there = run.lab_of(self._config).current(wanted) is savepoints
                if not is_there or wanted != self.request(item, definition.scope):
                    misfits.append(definition)
                continue
            made = self._made.get(definition)
            requests = self._prepared_by(item, definition, ours).keys()
            if (
                made is not None
                and made.keys() == requests
                and not requests & unsure
                and all(
                    state.was_made_on(fitting.get(r)) and self._keeper(r, state) is not None
                    for r, state in made.items()
                )
            ):
                fitting |= made
                continue
            unsure |= requests
            if made is not None:
                misfits.append(definition)
        with contextlib.ExitStack() as stack:  # all of them, whatever some raise
            for definition in misfits:
                stack.callback(definition.finish, item._request)  # type: ignore[attr-defined]

    def _prepared_by(
        self, item: pytest.Item, definition: "Definition", ours: "Iterable[Definition]"
    ) -> dict[Request, str]:
        return prepared_by(item, definition, ours, run.settings_of(self._config))

    @contextlib.contextmanager
    def _preparation(
        self, definition: "Definition", request: pytest.FixtureRequest, item: pytest.Item
    ) -> Iterator[None]:
        """Set up a wide fixture; if it is a preparation, keep the states that it makes."""
        __tracebackhide__ = True
        above: dict[Request, State] = {}
        named = closure_under(item, definition)
        with unset_on_error(definition, request):
            for wanted in self._prepared_by(item, definition, named[definition]):
                self._refuse_in_use(item, wanted, definition)
                self._work_on(item, self._savepoints(wanted))
                above[wanted] = self._state(item, wanted)
            machines = {wanted: self._savepoints(wanted) for wanted in above}
            course = course_of(item)
            for wanted, state in above.items():
                course.starts[machines[wanted].machine] = state.snapshot
                machines[wanted].start(state)
                course.entered[wanted.machine] = machines[wanted]
                self._config.hook.pytest_kvmsnap_vm_ready(vm=self._vm(machines[wanted]))
            definition.addfinalizer(partial(self._drop, definition))
        finalizers = len(definition._finalizers)
        self._being_made.append((definition.argname, set(machines.values())))
        before = _active(item)
        try:
            yield
        except BaseException as error:
            for wanted, state in above.items():
                machines[wanted].give_up(state)
            if isinstance(error, ConnectionLostError):  # which says nothing about the next try
                unset(definition, request, error)
            raise
        finally:
            self._being_made.pop()
        with unset_on_error(definition, request):
            self._refuse_hidden(item, definition, {*named, *before})
        if above:
            with unset_on_error(definition, request):
                self._keep(item, definition, above)
            if len(definition._finalizers) > finalizers:  # it has something to tear down
                definition.addfinalizer(partial(self._resume, definition))
            self._tear_down_first(definition, request, above)

    def _refuse_hidden(
        self, item: pytest.Item, definition: "Definition", known: "set[Definition]"
    ) -> None:
        """Refuse what a wide fixture asked for by `getfixturevalue`: the next time nobody sees it.

        `known` are the fixtures that it names, and those that were in use before it.

        Raises:
            ConfigError: it is a wide fixture of ours, or a preparation.
        """
        for other in reversed(_active(item)):  # the ones that ask for others come last
            is_of_machine = other in self._made or (is_ours(other) and other.scope != "function")
            if is_of_machine and other not in known:
                raise hidden(definition.argname, other.argname)

    def _refuse_in_use(self, item: pytest.Item, wanted: Request, definition: "Definition") -> None:
        in_use = {request.machine for request in course_of(item).vms}
        if self._being_made and self._savepoints(wanted) in self._being_made[-1][1]:
            by = self._being_made[-1][0]
        elif wanted.machine in in_use:
            by = "vm"
        else:
            return
        raise too_late(definition.argname, wanted, by, item.nodeid)

    def _keep(
        self, item: pytest.Item, definition: "Definition", above: "dict[Request, State]"
    ) -> None:
        made: dict[Request, State] = {}
        try:
            for wanted, state in above.items():
                made[wanted] = self._savepoints(wanted).keep(state, definition.argname)
        except BaseException:
            for wanted, state in above.items():
                if wanted in made:
                    self._savepoints(wanted).drop(made[wanted])
                self._savepoints(wanted).give_up(state)
            raise
        self._made[definition] = made
        for wanted in made:
            del course_of(item).entered[wanted.machine]  # the test starts somewhere else now

    def _tear_down_first(
        self,
        definition: "Definition",
        request: pytest.FixtureRequest,
        above: "dict[Request, State]",
    ) -> None:
        """Do what pytest does for fixtures that ask for each other, for states on each other."""
        made = self._made[definition]

        def finish() -> None:
            __tracebackhide__ = True
            if self._made.get(definition) is made:  # it was not torn down and made anew since
                definition.finish(request)  # type: ignore[arg-type]

        for other, states in self._made.items():
            if any(states.get(wanted) is state for wanted, state in above.items()):
                other.addfinalizer(finish)

    def _resume(self, definition: "Definition") -> None:
        with run.told():
            for wanted, state in self._made.get(definition, {}).items():
                keeper = self._keeper(wanted, state)
                if keeper is not None and not keeper.machine.has_failed:
                    keeper.resume(state)

    def _drop(self, definition: "Definition") -> None:
        for wanted, state in self._made.pop(definition, {}).items():
            keeper = self._keeper(wanted, state)
            if keeper is not None:
                keeper.drop(state)

    def _keeper(self, request: Request, state: "State") -> "Savepoints | None":
        """Return the savepoints that hold a state, None when its machine is no more."""
        savepoints = run.lab_of(self._config).current(request)
        return savepoints if savepoints is not None and savepoints.holds(state) else None
