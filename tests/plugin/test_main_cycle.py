"""Every test gets the machine clean, and the run leaves it as it was found."""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from testdriver import Calls, Host, Suite

STATES = ("running", "paused", "shut off")

THREE_TESTS = """
    import pytest

    @pytest.mark.parametrize("number", range(3))
    def test_machine(vm, number):
        assert vm.state == "running"
"""


@pytest.mark.parametrize("state", STATES)
def test_a_test_gets_a_running_machine_whatever_it_was_found_as(
    suite: "Suite", host: "Host", state: str
) -> None:
    host.define(state=state)
    suite.write(THREE_TESTS)
    suite.run().assert_outcomes(passed=3)


@pytest.mark.parametrize("autostart", [0, 1])
@pytest.mark.parametrize("snapshots", [[], ["one", "two"]], ids=["none", "two"])
@pytest.mark.parametrize("live", ["yes", "no"])
@pytest.mark.parametrize("state", STATES)
def test_the_machine_is_left_as_it_was_found(
    suite: "Suite", host: "Host", state: str, live: str, snapshots: list[str], autostart: int
) -> None:
    domain = host.define(state=state)
    domain.setAutostart(autostart)
    for name in snapshots:
        host.snapshot(name)
    before = host.look()
    suite.write(THREE_TESTS)
    suite.run(f"--kvmsnap-live={live}").assert_outcomes(passed=3)
    assert host.look() == before
    assert suite.left_over() == []


@pytest.mark.parametrize("state", STATES)
def test_a_current_snapshot_that_is_not_the_newest_is_current_again(
    suite: "Suite", host: "Host", state: str
) -> None:
    domain = host.define(state=state)
    host.snapshot("one")
    host.snapshot("two")
    domain.revertToSnapshot(domain.snapshotLookupByName("one"), 0)
    before = host.look()
    assert before.current == "one"
    suite.write(THREE_TESTS)
    suite.run().assert_outcomes(passed=3)
    assert host.look() == before


def test_a_running_machine_costs_one_creation_and_one_revert_per_test(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    suite.write(THREE_TESTS)
    suite.run().assert_outcomes(passed=3)
    assert calls.log == ["take found", *["revert found"] * 3, "delete found"]


@pytest.mark.parametrize(("state", "up"), [("shut off", "start"), ("paused", "resume")])
def test_another_machine_costs_a_fixed_number_of_calls_more(
    suite: "Suite", host: "Host", calls: "Calls", state: str, up: str
) -> None:
    host.define(state=state)
    suite.write(THREE_TESTS)
    suite.run().assert_outcomes(passed=3)
    assert calls.log == [
        "take found",
        up,
        "take base",
        *["revert base"] * 3,
        "revert found",
        "delete base",
        "delete found",
    ]


def test_live_no_boots_a_machine_that_was_off_for_each_test(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define()
    suite.write(THREE_TESTS)
    suite.run("--kvmsnap-live=no").assert_outcomes(passed=3)
    assert calls.log == ["take found", *["start", "revert found"] * 3, "delete found"]


def test_live_no_shuts_a_running_machine_down_once(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define(state="running")
    suite.write(THREE_TESTS)
    suite.run("--kvmsnap-live=no").assert_outcomes(passed=3)
    assert calls.log == [
        "take found",
        "shutdown",
        "take base",
        *["start", "revert base"] * 3,
        "revert found",
        "delete base",
        "delete found",
    ]


def test_two_machines_do_not_get_into_each_others_way(
    suite: "Suite", host: "Host", calls: "Calls"
) -> None:
    host.define("one", state="running")
    host.define("two")
    before = host.looks()
    suite.write(
        """
        import pytest

        @pytest.mark.parametrize("vm", ["one", "two", "one", "two"], indirect=True)
        def test_machine(vm, request):
            assert vm.name == request.node.callspec.params["vm"]
        """
    )
    suite.run(domain=None).assert_outcomes(passed=4)
    assert host.looks() == before
    assert (calls.count("take"), calls.count("revert"), calls.count("delete")) == (3, 5, 3)


def test_vm_tells_name_uuid_and_uri(suite: "Suite", host: "Host") -> None:
    domain = host.define(state="running")
    suite.write(
        f"""
        def test_machine(vm):
            assert (vm.name, vm.uuid, vm.uri) == ("box", "{domain.UUIDString()}", "test:///default")
            assert vm.domain.name() == "box"
            assert repr(vm) == "<VM 'box' at test:///default>"
        """
    )
    suite.run().assert_outcomes(passed=1)


# named snapshots


@pytest.mark.parametrize("found", STATES)
@pytest.mark.parametrize("snapshotted", STATES)
def test_a_named_snapshot_is_the_start_and_is_never_touched(
    suite: "Suite", host: "Host", calls: "Calls", snapshotted: str, found: str
) -> None:
    domain = host.define(state=snapshotted)
    host.snapshot("installed")
    xml = domain.snapshotLookupByName("installed").getXMLDesc()
    bring_to(domain, found)
    before = host.look()
    suite.write(
        """
        import pytest

        @pytest.mark.kvm_snapshot("installed")
        @pytest.mark.parametrize("number", range(2))
        def test_machine(vm, number):
            assert vm.state == "running"
            assert vm.current_snapshot.name == "installed"
        """
    )
    suite.run().assert_outcomes(passed=2)
    assert host.look() == before
    assert domain.snapshotLookupByName("installed").getXMLDesc() == xml
    assert calls.snapshots == [
        "take found",
        *["revert installed"] * 3,
        "revert found",
        "delete found",
    ]


def bring_to(domain: object, state: str) -> None:
    """Bring a domain from anywhere to a state, without reverting."""
    if domain.isActive():  # type: ignore[attr-defined]
        domain.destroy()  # type: ignore[attr-defined]
    if state != "shut off":
        domain.create()  # type: ignore[attr-defined]
    if state == "paused":
        domain.suspend()  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", [("named", "plain"), ("plain", "named")])
@pytest.mark.parametrize("found", STATES)
def test_each_test_starts_from_its_own_state_in_any_order(
    suite: "Suite", host: "Host", found: str, order: tuple[str, str]
) -> None:
    domain = host.define(state="running")
    host.snapshot("installed")
    bring_to(domain, found)
    before = host.look()
    tests = {
        "named": """
            @pytest.mark.kvm_snapshot("installed")
            def test_named_{0}(vm):
                assert vm.current_snapshot.name == "installed"
        """,
        "plain": """
            def test_plain_{0}(vm):
                assert vm.current_snapshot.name.startswith("kvmsnap-")
        """,
    }
    source = [tests[kind].format(number) for number, kind in enumerate(order * 2)]
    suite.write("\n".join(["            import pytest", *source]))
    suite.run().assert_outcomes(passed=4)
    assert host.look() == before


def test_the_snapshot_option_is_for_tests_without_the_marker(suite: "Suite", host: "Host") -> None:
    host.define(state="running")
    host.snapshot("one")
    host.snapshot("two")
    suite.write(
        """
        import pytest

        def test_option(vm):
            assert vm.current_snapshot.name == "one"

        @pytest.mark.kvm_snapshot("two")
        def test_marker(vm):
            assert vm.current_snapshot.name == "two"
        """
    )
    suite.run("--kvmsnap-snapshot=one").assert_outcomes(passed=2)


# reuse


@pytest.mark.parametrize(
    "touch", ["vm.destroy()", "vm.domain.suspend()", "vm.snapshot('other')", "vm.reboot_by_hand()"]
)
def test_a_machine_that_was_touched_between_tests_is_reverted_anew(
    suite: "Suite", host: "Host", calls: "Calls", touch: str
) -> None:
    host.define(state="running")
    before = host.look()
    suite.write(
        """
        def test_one(vm):
            pass

        def test_two(vm):
            assert vm.state == "running"
            assert vm.current_snapshot.name.startswith("kvmsnap-found")
        """,
        conftest=f"""
        import pytest

        HELD = []

        @pytest.fixture(autouse=True)
        def keep(vm):
            vm.reboot_by_hand = lambda: (vm.destroy(), vm.start())
            HELD.append(vm)

        def pytest_runtest_logfinish(nodeid):
            if nodeid.endswith("test_one"):
                vm, = HELD
                {touch}
        """,
    )
    suite.run().assert_outcomes(passed=2)
    assert host.look() == before
    assert calls.count("revert") == 3


# what a test does to its machine

UNDONE = {
    "snapshot": "vm.snapshot()",
    "nested snapshots": "vm.snapshot('mine'); vm.snapshot('child')",
    "revert to its own": "vm.snapshot('mine'); vm.destroy(); vm.revert('mine'); vm.state",
    "destroy": "vm.destroy()",
    "shutdown": "vm.shutdown()",
    "pause": "vm.domain.suspend()",
    "autostart": "vm.domain.setAutostart(not vm.domain.autostart())",
    "managed save": "vm.domain.managedSave(0)",
    "undefine": "vm.domain.undefine()",
    "undefine and destroy": "raw = vm.domain; raw.undefine(); raw.destroy()",
    "destroy and undefine": "raw = vm.domain; raw.destroy(); raw.undefineFlags(3)",
    "redefine": ("vm.domain.connect().defineXML(vm.domain.XMLDesc(2).replace('8192', '4096'))"),
    "rename": "raw = vm.domain; raw.destroy(); raw.rename('other', 0)",
}


@pytest.mark.parametrize("mischief", list(UNDONE))
@pytest.mark.parametrize("state", STATES)
def test_what_a_test_did_to_the_machine_is_undone(
    suite: "Suite", host: "Host", mischief: str, state: str
) -> None:
    domain = host.define(state=state)
    host.snapshot("of the owner", description="not to be touched")
    uuid, before = domain.UUIDString(), host.looks()
    suite.write(
        f"""
        def test_mischief(vm):
            {UNDONE[mischief]}

        def test_next(vm):
            assert vm.state == "running"
            assert vm.domain.isPersistent()
            assert not vm.domain.hasManagedSaveImage()
            assert not vm.domain.autostart()
            assert not [s for s in vm.snapshots() if "mine" in s.name or "child" in s.name]
            assert vm.current_snapshot.name.startswith("kvmsnap-")
        """
    )
    result = suite.run()
    result.assert_outcomes(passed=2)
    assert result.ret == 0
    assert host.looks() == before
    assert host.domain().UUIDString() == uuid
    assert suite.left_over() == []


@pytest.mark.parametrize("mischief", UNDONE)
@pytest.mark.parametrize("live", ["yes", "no"])
def test_what_the_last_test_did_is_undone_too(
    suite: "Suite", host: "Host", mischief: str, live: str
) -> None:
    """With live=no the way back ends with a machine that is off: a managed save would stay."""
    host.define()
    host.snapshot("of the owner", description="not to be touched")
    before = host.looks()
    suite.write(f"def test_mischief(vm): {UNDONE[mischief]}")
    suite.run(f"--kvmsnap-live={live}").assert_outcomes(passed=1)
    assert host.looks() == before


def test_what_a_test_did_is_undone_before_a_snapshot_of_the_same_name_is_taken(
    suite: "Suite", host: "Host"
) -> None:
    host.define(state="running")
    suite.write(
        """
        import pytest

        @pytest.mark.parametrize("number", range(2))
        def test_machine(vm, number):
            taken = vm.snapshot("mine")
            assert taken.name == "mine"
            assert taken.state == "running"
            assert vm.current_snapshot == taken
            vm.delete_snapshot(taken)
            vm.snapshot("mine")
        """
    )
    suite.run().assert_outcomes(passed=2)


def test_fast_reverts_need_qemu(suite: "Suite", host: "Host", calls: "Calls") -> None:
    host.define(state="running")
    suite.write("def test_one(vm): pass\ndef test_two(vm): pass")
    result = suite.run("--kvmsnap-revert=fast")
    result.assert_outcomes(passed=2)
    assert calls.count("revert") == 2
    said = "kvmsnap: box: reverted by force, not fast: the driver of that libvirt is not QEMU's"
    assert result.outlines.count(said) == 1
