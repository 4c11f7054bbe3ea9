"""Where the example's machines come from, unless you name one of yours.

`pytest example_suite` builds two machines and a golden image in a folder of its own and removes
them at the end. With `--kvmsnap-uri qemu:///system --kvmsnap-domain centos` the same tests run on
your machine; add `--example-snapshot NAME` for those that start from a snapshot, and
`--example-golden IMAGE` for those on a golden image. `--example-failure` has a test fail on
purpose, which leaves a folder with what can be seen of its machine.
"""

import contextlib
import os
from pathlib import Path

import pytest

import guest
from lab import Lab, LabError, open_lab, reap_orphans
from pytest_kvmsnap import VM

MACHINE = "kvmsnap-example"
INSTALLED = "kvmsnap-example-installed"  # a machine with a snapshot
GOLDEN = "golden.raw"  # looked for in image-path

_LAB = pytest.StashKey[Lab]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("example")
    group.addoption(
        "--example-snapshot", metavar="NAME", help="a snapshot of the machine that you name"
    )
    group.addoption("--example-golden", metavar="IMAGE", help="a golden image of yours")
    group.addoption(
        "--example-failure", action="store_true", help="run a test that fails, and see what it left"
    )
    if "--require-real" not in [name for option in group.options for name in option.names()]:
        group.addoption(
            "--require-real", action="store_true", help="fail where QEMU or libvirt is missing"
        )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the tests of which one fails, unless they are asked for."""
    is_wanted: bool = config.getoption("example_failure")
    return True if collection_path.name == "test_failing.py" and not is_wanted else None


def is_yours(config: pytest.Config) -> bool:
    """Tell whether the suite runs on the reader's own machine."""
    return bool(config.getoption("kvmsnap_uri") or config.getoption("kvmsnap_domain"))


def pytest_kvmsnap_lab(config: pytest.Config) -> dict[str, object] | None:
    """Tell the plugin about our machines; it asks only when a test will use one."""
    if is_yours(config):
        return None
    try:
        return _build_lab(config)
    except (LabError, guest.GuestError, OSError) as error:
        raise pytest.UsageError(f"the example's machines cannot be built: {error}") from error


def _build_lab(config: pytest.Config) -> dict[str, object]:
    config.stash[_LAB] = lab = open_lab()
    # in containers whose first process does not collect ended QEMUs, each revert would take longer
    stack = contextlib.ExitStack()
    stack.enter_context(reap_orphans())
    config.add_cleanup(stack.close)
    complete = lab.images / "complete"
    if not complete.exists():  # else an earlier run was killed, and the plugin puts it right
        linux = guest.build(print)
        log = lab.images / "console.log"
        lab.add_machine(MACHINE, guest=linux, disk_format="raw", console_log=log)
        lab.add_machine(INSTALLED, guest=linux, disk_format="qcow2")
        lab.add_snapshot(INSTALLED, "installed")
        guest.copy_disk(linux, lab.images / GOLDEN)
        complete.touch()
    # where the plugin converts golden images, and makes thin copies; gone with the lab
    os.environ["TMPDIR"] = str(lab.images)
    return {
        "uri": lab.uri,
        "domain": MACHINE,
        "image-path": lab.images,
        "lock-dir": lab.folder / "locks",
    }


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Point the tests that start from a snapshot, or on a golden image, at what there is."""
    for item in items:
        if item.get_closest_marker("installed") is not None:
            _mark_installed(item, config.getoption("example_snapshot"))
        if item.get_closest_marker("golden") is not None:
            _mark_golden(item, config.getoption("example_golden"))


def _mark_installed(item: pytest.Item, snapshot: str | None) -> None:
    if not is_yours(item.config):
        item.add_marker(pytest.mark.kvm_domain(INSTALLED))
        item.add_marker(pytest.mark.kvm_snapshot("installed"))
    elif snapshot:
        item.add_marker(pytest.mark.kvm_snapshot(snapshot))
    else:
        item.add_marker(pytest.mark.skip(reason="name a snapshot with --example-snapshot"))


def _mark_golden(item: pytest.Item, image: str | None) -> None:
    if not is_yours(item.config):
        item.add_marker(pytest.mark.kvm_golden(GOLDEN, memory="128 MiB"))
    elif image:
        item.add_marker(pytest.mark.kvm_golden(Path(image).absolute()))
    else:
        item.add_marker(pytest.mark.skip(reason="name a golden image with --example-golden"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "installed: Start from a snapshot, see conftest.py.")
    config.addinivalue_line("markers", "golden: Run on a golden image, see conftest.py.")


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove our machines; the plugin has left them off by now."""
    lab = config.stash.get(_LAB, None)
    if lab is not None and not any((lab.folder / "run" / "qemu").glob("*.xml")):
        lab.remove()


@pytest.fixture
def marked_vm(vm: VM) -> VM:
    """A clean machine with `123` in /opt/abc. Ours comes with it; yours gets it here."""
    if vm.run(["test", "-e", "/opt/abc"]).returncode != 0:
        vm.run("mkdir -p /opt && echo 123 > /opt/abc", check=True)
    return vm


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """Some megabytes that do not compress."""
    path = tmp_path / "big"
    path.write_bytes(os.urandom(5 * 1024 * 1024))
    return path
