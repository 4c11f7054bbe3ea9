"""What people get wrong is told once, before the first test, with its cure; nothing is changed."""

from typing import TYPE_CHECKING

import pytest
from testdriver import definition, disk

if TYPE_CHECKING:
    from testdriver import Host, Suite

ONE_TEST = "def test_machine(vm): pass"


def assert_refused(result: pytest.RunResult, *texts: str) -> str:
    """Check that a run ended with one message before the first test; return the message."""
    out, err = result.stdout.str(), result.stderr.str()
    assert result.ret == pytest.ExitCode.USAGE_ERROR, out + err
    for text in texts:
        assert (out + err).count(text) == 1, f"{text!r} is there other than once:\n{out}{err}"
        assert text in err
    for noise in ("Traceback", "libvirtError", "INTERNALERROR", "During handling", "passed"):
        assert noise not in out + err
    return err


@pytest.fixture
def refuse(suite: "Suite", host: "Host") -> "Refuse":
    return Refuse(suite, host)


class Refuse:
    """Run a suite and check that it is refused and that nothing is changed."""

    def __init__(self, suite: "Suite", host: "Host") -> None:
        self.suite = suite
        self.host = host

    def __call__(
        self, *texts: str, args: tuple[str, ...] = (), tests: str = ONE_TEST, **kwargs: str | None
    ) -> str:
        before = self.host.looks()
        files = images(self.suite)
        if tests:
            self.suite.write(tests)
        message = assert_refused(self.suite.run(*args, **kwargs), *texts)
        assert self.host.looks() == before
        assert images(self.suite) == files
        assert self.suite.left_over() == []
        return message


def images(suite: "Suite") -> dict[str, int]:
    """Return the files of the folder for images, and their sizes."""
    folder = suite.pytester.path / "images"
    return {path.name: path.stat().st_size for path in folder.glob("*")}


# which machine


@pytest.mark.parametrize(
    ("names", "cure"),
    [
        (["centos7", "centos8"], "did you mean 'centos8' or 'centos7'?"),
        (["alpha", "beta"], "domains there: alpha, beta"),
        ([f"alpha{i:02}" for i in range(13)], "alpha08, alpha09 and 3 more"),
        ([], "this host has no domain at all: is the URI right?"),
    ],
    ids=["close", "others", "many", "none"],
)
def test_unknown_domain(refuse: Refuse, host: "Host", names: list[str], cure: str) -> None:
    for name in names:
        host.define(name)
    refuse("there is no domain 'centos88'", "where: test:///default", cure, domain="centos88")


def test_no_domain_named(refuse: Refuse) -> None:
    refuse(
        "no machine is named for a test that asks for one",
        "where: test_no_domain_named.py::test_machine",
        '@pytest.mark.kvm_domain("NAME")',
        "--kvmsnap-domain NAME",
        domain=None,
    )


@pytest.mark.parametrize(
    ("present", "cure"),
    [
        (["base", "extra"], "snapshots there: base, extra"),
        ([], "virsh snapshot-create-as box missing"),
    ],
)
def test_unknown_snapshot(refuse: Refuse, host: "Host", present: list[str], cure: str) -> None:
    host.define()
    for name in present:
        host.snapshot(name)
    refuse(
        "there is no snapshot 'missing' of box",
        "where: box at test:///default",
        cure,
        tests=f"import pytest\n@pytest.mark.kvm_snapshot('missing')\n{ONE_TEST}",
    )


def test_unreachable_uri(refuse: Refuse) -> None:
    refuse(
        "cannot connect to qemu+unix:///system?socket=/nonexistent",
        "why:   Failed to connect socket to '/nonexistent'",
        "sudo systemctl start libvirtd",
        args=("--kvmsnap-uri=qemu+unix:///system?socket=/nonexistent",),
    )


def test_nonsensical_uri(refuse: Refuse) -> None:
    refuse(
        "cannot connect to test:///nowhere.xml",
        "check the URI: virsh -c URI list must work",
        args=("--kvmsnap-uri=test:///nowhere.xml",),
    )


# markers

BAD_MARKERS = {
    "kvm_domain()": "no domain is named",
    "kvm_domain": "no domain is named",
    "kvm_domain(7)": "a name must be text, not 7",
    "kvm_domain('')": "a name must be text, not ''",
    "kvm_domain(' ')": "a name must be text, not ' '",
    "kvm_domain(name='box')": "unexpected keyword argument 'name'",
    "kvm_snapshot()": "missing a required argument: 'name'",
    "kvm_snapshot('one', 'two')": "too many positional arguments",
    "kvm_snapshot(None)": "a name must be text, not None",
    "kvm_snapshot(nmae='one')": "'n",
}


@pytest.mark.parametrize("marker", BAD_MARKERS)
def test_wrong_marker_arguments(refuse: Refuse, host: "Host", marker: str) -> None:
    host.define()
    name = marker.partition("(")[0]
    message = refuse(
        f"wrong arguments: @pytest.mark.{marker if '(' in marker else marker + '()'}",
        "test_machine",
        f"the marker is {name}(",
        tests=f"import pytest\n@pytest.mark.{marker}\n{ONE_TEST}",
    )
    assert BAD_MARKERS[marker] in message


def test_a_marker_of_a_module_is_told_once_and_with_the_module(
    refuse: Refuse, host: "Host"
) -> None:
    host.define()
    refuse(
        "wrong arguments: @pytest.mark.kvm_domain()",
        "where: test_a_marker_of_a_module_is_told_once_and_with_the_module.py\n",
        tests="""
        import pytest
        pytestmark = pytest.mark.kvm_domain()
        def test_one(vm): pass
        def test_two(vm): pass
        """,
    )


@pytest.mark.parametrize("value", ["7", "''"])
def test_wrong_parameter_of_vm(refuse: Refuse, host: "Host", value: str) -> None:
    host.define()
    refuse(
        "a parameter of vm must be a domain's name",
        f"got {value}",
        tests="import pytest\n"
        f"@pytest.mark.parametrize('vm', [{value}], indirect=True)\n{ONE_TEST}",
    )


def test_all_problems_are_told_in_one_message(refuse: Refuse, host: "Host") -> None:
    host.define("cdrom only", disk("/x.iso", "raw", device="cdrom"))
    refuse(
        "3 problems must be solved before the first test can run",
        "there is no domain 'one'",
        "there is no domain 'two'",
        "cdrom only cannot be used for tests",
        tests="""
        import pytest

        @pytest.mark.parametrize("vm", ["one", "two", "cdrom only", "two"], indirect=True)
        def test_machine(vm): pass
        """,
    )


def test_all_wrong_markers_are_told_in_one_message(refuse: Refuse, host: "Host") -> None:
    host.define()
    refuse(
        "2 problems must be solved before the first test can run",
        "@pytest.mark.kvm_domain()",
        "@pytest.mark.kvm_snapshot()",
        tests="""
        import pytest

        @pytest.mark.kvm_domain()
        def test_one(vm): pass

        @pytest.mark.kvm_snapshot()
        def test_two(vm): pass
        """,
    )


# options

BAD_VALUES = [
    ("uri", "", "must not be empty"),
    ("domain", " ", "must not be empty"),
    ("snapshot", "", "must not be empty"),
    ("convert", "maybe", "must be one of: auto, check, never"),
    ("live", "maybe", "must be yes or no"),
    ("verify", "", "must be one of: canary, state"),
    ("revert", "slow", "must be one of: force, fast"),
    ("ready", "telepathy", "must be agent, ssh, none, or console: and a regular expression"),
    ("ready-timeout", "0", "must be a number of seconds above 0"),
    ("revert-timeout", "soon", "must be a number of seconds"),
    ("lock-timeout", "-1", "must be a number of seconds above 0"),
    ("lock-dir", "relative", "must be an absolute path"),
]


@pytest.mark.parametrize("asked", ["vm", "tmp_path"], ids=["used", "unused"])
@pytest.mark.parametrize(("option", "value", "why"), BAD_VALUES)
def test_wrong_option_on_the_command_line(
    suite: "Suite", option: str, value: str, why: str, asked: str
) -> None:
    suite.write(f"def test_machine({asked}): pass")
    result = suite.pytester.runpytest_inprocess("-Werror", f"--kvmsnap-{option}={value}")
    assert_refused(result, f"wrong value for --kvmsnap-{option}", why, f"{value!r}: ")


@pytest.mark.parametrize(("option", "value", "why"), [row for row in BAD_VALUES if row[1].strip()])
def test_wrong_option_in_ini(suite: "Suite", option: str, value: str, why: str) -> None:
    key = option.replace("-", "_")
    suite.write("def test_machine(vm): pass")
    suite.pytester.makeini(f"[pytest]\nkvmsnap_{key} = {value}")
    result = suite.pytester.runpytest_inprocess("-Werror")
    assert_refused(result, f"wrong value for kvmsnap_{key} in ini", why, f"{value!r}: ")


@pytest.mark.parametrize(("option", "value", "why"), BAD_VALUES)
def test_wrong_option_from_the_hook(suite: "Suite", option: str, value: str, why: str) -> None:
    suite.write(
        "def test_machine(vm): pass",
        conftest=f"def pytest_kvmsnap_lab(config): return {{{option!r}: {value!r}}}",
    )
    result = suite.pytester.runpytest_inprocess("-Werror")
    origin = f"wrong value for {option!r} from the hook pytest_kvmsnap_lab"
    assert_refused(result, origin, why, f"{value!r}: ")


@pytest.mark.parametrize(
    ("returned", "texts"),
    [
        ("['domain']", ("it returned list, not a mapping",)),
        ("{'domian': 'box'}", ("'domian' is no option", "did you mean 'domain'?")),
        ("{'domain': object}", ("must be text, a number or a path",)),
    ],
)
def test_a_wrong_result_of_the_hook(
    refuse: Refuse, suite: "Suite", returned: str, texts: tuple[str, ...]
) -> None:
    suite.pytester.makeconftest(f"def pytest_kvmsnap_lab(config): return {returned}")
    refuse("the hook pytest_kvmsnap_lab", *texts, domain=None)


def test_an_unknown_one_of_several_domains_on_the_command_line(
    refuse: Refuse, host: "Host"
) -> None:
    host.define()
    refuse("there is no domain 'two'", "domains there: box", args=("--kvmsnap-domain=two",))


# the domain itself


def test_transient_domain(refuse: Refuse, host: "Host") -> None:
    domain = host.connection.createXML(definition("box", disk("/images/box.qcow2")))
    refuse("box cannot be used for tests", "it is transient", "virsh dumpxml, then virsh define")
    domain.destroy()


@pytest.mark.parametrize(
    "devices",
    [
        ("<input type='tablet' bus='usb'/>",),
        (disk("/x.iso", "raw", device="cdrom"),),
        (
            disk(None, None, device="cdrom"),
            disk("/x.img", "raw", device="floppy", target="fda", more="<readonly/>"),
        ),
        (disk("/x.qcow2", more="<readonly/>"),),
    ],
    ids=["none", "cdrom", "empty and floppy", "read-only"],
)
def test_domain_without_a_writable_disk(
    refuse: Refuse, host: "Host", devices: tuple[str, ...]
) -> None:
    host.define("box", *devices)
    refuse(
        "box cannot be used for tests",
        "it has no writable disk, and an internal snapshot lives in one",
        "give it a qcow2 disk, if only a small one: virsh -c test:///default edit box",
    )


def test_transient_disk(refuse: Refuse, host: "Host") -> None:
    host.define("box", disk("/x.qcow2", more="<transient/>"))
    refuse("its disk vda is transient", "remove <transient/>")


def test_managed_save(refuse: Refuse, host: "Host") -> None:
    host.define(state="running").managedSave(0)
    refuse(
        "it has a managed save: a revert would be undone by the stale memory in it",
        "virsh managedsave-remove",
    )


HOSTDEV = (
    "<hostdev mode='subsystem' type='pci'><source>"
    "<address domain='0' bus='0' slot='5' function='0'/></source></hostdev>"
)
SHARED_MEMORY = "<shmem name='x'><model type='ivshmem-plain'/><size unit='M'>4</size></shmem>"


def test_all_blockers_of_all_machines_are_told_in_one_message(refuse: Refuse, host: "Host") -> None:
    own = disk("/images/devices.qcow2")
    host.define("devices", own, HOSTDEV, SHARED_MEMORY, "<sound model='usb'/>")
    host.define(
        "disks",
        disk("/images/disks.vmdk", "vmdk"),
        disk("/images/disks.qcow2", target="vdb", more="<encryption format='luks'/>"),
        disk("/images/floppy.img", "raw", target="fda", device="floppy"),
    )
    flash = "<loader readonly='yes' type='pflash'>/code.fd</loader><nvram>/vars.fd</nvram></os>"
    host.connection.defineXML(
        definition("firmware", disk("/images/firmware.qcow2")).replace("</os>", flash)
    )
    host.define("one", disk("/images/shared.qcow2"))
    host.define("two", disk("/images/shared.qcow2"), state="running").managedSave(0)
    host.define("good")
    message = refuse(
        "11 problems must be solved before the first test can run",
        "it has a device of the host (pci), which cannot be snapshotted while it runs",
        "it has shared memory whose master it is not, which cannot be snapshotted while it runs",
        "it has a USB sound card, which cannot be snapshotted while it runs",
        "its disk vda has the format vmdk, and internal snapshots need qcow2",
        "its disk vdb is encrypted, and internal snapshots do not work with that",
        "its floppy disk fda is writable, and internal snapshots need qcow2",
        "the domain two uses the image of its disk vda too: /images/shared.qcow2",
        "it has a managed save",
        "the domain one uses the image of its disk vda too: /images/shared.qcow2",
        "there is no domain 'lost'",
        tests="""
        import pytest

        MACHINES = ["devices", "disks", "firmware", "one", "two", "good", "lost"]

        @pytest.mark.parametrize("vm", MACHINES, indirect=True)
        def test_machine(vm): pass
        """,
        domain=None,
    )
    assert "good cannot be used" not in message
    assert message.count("\n  cure:  ") == 11
    assert message.count("virsh -c test:///default edit devices") == 3
    assert "UEFI" in message


def test_without_the_memory_devices_are_no_blockers(suite: "Suite", host: "Host") -> None:
    host.define("box", disk("/images/box.qcow2"), HOSTDEV, SHARED_MEMORY)
    suite.write(ONE_TEST)
    suite.run("--kvmsnap-live=no").assert_outcomes(passed=1)
    host.domain().create()
    result = suite.run("--kvmsnap-live=no")
    assert_refused(result, "2 problems", "a device of the host (pci)", "shared memory")


def test_no_agent_channel_although_ready_is_agent(refuse: Refuse, host: "Host") -> None:
    host.define()
    refuse(
        "it has no guest agent channel, and ready=agent waits for the agent",
        "add a channel with the target org.qemu.guest_agent.0",
        "--kvmsnap-ready=none",
        args=("--kvmsnap-ready=agent",),
    )


def test_snapshot_of_a_run_on_another_host(refuse: Refuse, host: "Host") -> None:
    host.define()
    host.snapshot("theirs", description="pytest-kvmsnap run 1234 on elsewhere, pid 5")
    refuse(
        "its snapshot 'theirs' belongs to another run: pytest-kvmsnap run 1234 on elsewhere, pid 5",
        "--kvmsnap-clean on its host",
        "pytest --kvmsnap-clean --kvmsnap-force --kvmsnap-uri test:///default --kvmsnap-domain box",
    )


def test_a_lock_folder_that_cannot_be_made(refuse: Refuse, host: "Host", suite: "Suite") -> None:
    host.define()
    (suite.pytester.path / "file").touch()
    refuse(
        f"cannot use {suite.pytester.path}/file/locks for locks",
        "Not a directory",
        "--kvmsnap-lock-dir, the same to all runs on this host",
        args=(f"--kvmsnap-lock-dir={suite.pytester.path}/file/locks",),
    )


# raw disks


@pytest.fixture
def raw(suite: "Suite") -> str:
    """The path of a raw image."""
    folder = suite.pytester.mkdir("images")
    path = folder / "box.raw"
    path.write_bytes(b"content".ljust(2**20, b"\0"))
    return str(path)


@pytest.mark.parametrize("convert", ["check", "never"])
def test_raw_disk_that_shall_not_be_converted(
    refuse: Refuse, host: "Host", raw: str, convert: str
) -> None:
    host.define("box", disk(raw, "raw"))
    refuse(
        "box has raw disks, and internal snapshots need qcow2",
        f"vda: {raw} (would become {raw.removesuffix('.raw')}.qcow2, and take up to",
        f"option convert is {convert!r}",
        "--kvmsnap-convert=auto",
        args=(f"--kvmsnap-convert={convert}",),
    )


@pytest.mark.parametrize("state", ["running", "paused"])
def test_raw_disk_of_a_machine_that_is_on(
    refuse: Refuse, host: "Host", raw: str, state: str
) -> None:
    host.define("box", disk(raw, "raw"), state=state)
    refuse(
        "the raw disk vda of box cannot be converted to qcow2",
        f"where: box at test:///default, {raw}",
        f"the machine is {state}, and only one that is off can be converted",
        "virsh -c test:///default shutdown box",
    )


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_existing_target(refuse: Refuse, host: "Host", suite: "Suite", raw: str, kind: str) -> None:
    target = suite.pytester.path / "images" / "box.qcow2"
    if kind == "file":
        target.write_text("precious")
    else:
        target.symlink_to("nowhere")
    host.define("box", disk(raw, "raw"))
    if kind == "dangling link":
        suite.write(ONE_TEST)
        assert_refused(suite.run(), f"{target} exists already")
        assert target.is_symlink()
    else:
        refuse(f"{target} exists already, and we overwrite nothing", "else move it away")
        assert target.read_text() == "precious"


@pytest.mark.parametrize("path", ["same", "link"])
def test_image_that_another_domain_uses_too(
    refuse: Refuse, host: "Host", suite: "Suite", raw: str, path: str
) -> None:
    other = suite.pytester.path / "link.raw"
    other.symlink_to(raw)
    host.define("box", disk(raw, "raw"))
    host.define("twin", disk(raw if path == "same" else other, "raw"))
    refuse("the domain twin uses the same file, and the two would part", "an image of its own")


def test_two_raw_disks_that_would_become_the_same_image(
    refuse: Refuse, host: "Host", suite: "Suite", raw: str
) -> None:
    second = suite.pytester.path / "images" / "box.img"
    second.write_bytes(b"second".ljust(2**20, b"\0"))
    host.define("box", disk(raw, "raw"), disk(second, "raw", target="vdb"))
    refuse("2 problems must be solved", f"{raw}\n  why:   another raw disk would become")


def test_block_device(refuse: Refuse, host: "Host") -> None:
    host.define("box", disk("/dev/null", "raw"))
    refuse("it is no file but a device", "qemu-img convert -f raw -O qcow2")


def test_raw_disks_of_two_machines_are_told_together(
    refuse: Refuse, host: "Host", raw: str
) -> None:
    host.define("box", disk(raw, "raw"), state="running")
    host.define("other", disk("/dev/null", "raw"))
    refuse(
        "2 problems must be solved",
        "raw disk vda of box",
        "raw disk vda of other",
        tests="""
        import pytest
        @pytest.mark.parametrize("vm", ["box", "other"], indirect=True)
        def test_machine(vm): pass
        """,
    )


# the same, met in the set-up


@pytest.mark.parametrize(
    ("domain", "text"), [("nowhere", "there is no domain 'nowhere'"), ("box", "no writable disk")]
)
def test_what_could_not_be_known_before_is_told_in_the_set_up(
    suite: "Suite", host: "Host", domain: str, text: str
) -> None:
    host.define("box", disk("/x.iso", "raw", device="cdrom"))
    before = host.looks()
    suite.write("def test_machine(request): request.getfixturevalue('vm')")
    result = suite.run(domain=domain)
    result.assert_outcomes(failed=1)
    out = result.stdout.str()
    assert text in out
    assert "Traceback" not in out
    assert "libvirtError" not in out
    assert host.looks() == before
    assert suite.left_over() == []


def test_a_message_in_the_set_up_is_told_once(suite: "Suite", host: "Host") -> None:
    suite.write("def test_machine(request): request.getfixturevalue('vm')")
    out = suite.run("-rN", domain="nowhere").stdout.str()
    assert out.count("there is no domain 'nowhere'") == 1
