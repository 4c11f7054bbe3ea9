"""The daemon that tests of several processes stand on."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
import pytest
from daemon import Daemon, running_daemon

if TYPE_CHECKING:
    from sharedhost import SharedSuite

MEETING = """
import pathlib, time, libvirt

def await_file(name):
    for _ in range(3000):
        if pathlib.Path(name).exists():
            return
        time.sleep(0.02)
    raise AssertionError(f"there is no {name}")
"""


def test_two_runs_see_the_same_domain(shared: "SharedSuite") -> None:
    shared.host.define(state="running")
    shared.write(
        f"""{MEETING}
def test_has_it(vm):
    pathlib.Path("held").touch()
    await_file("seen")

def test_sees_it():
    await_file("held")
    box = libvirt.open({shared.uri!r}).lookupByName("box")
    pathlib.Path("seen").write_text(" ".join(box.snapshotListNames()))
"""
    )
    for run in shared.run_together(["-k", "has_it"], ["-k", "sees_it"]):
        run.assert_outcomes(passed=1, deselected=1)
    assert (shared.pytester.path / "seen").read_text().startswith("kvmsnap-found-")
    assert shared.host.look().snapshots == ()
    assert shared.left_over() == []


@pytest.mark.parametrize("end", [Daemon.stop, Daemon.kill])
def test_daemon_comes_back(shared: "SharedSuite", end: Callable[[Daemon], None]) -> None:
    shared.host.define()
    before = shared.libvirtd.pid
    others = libvirt.open(shared.uri)
    shared.restart_libvirtd(end)
    assert shared.libvirtd.pid != before
    with pytest.raises(libvirt.libvirtError):
        others.listAllDomains()
    assert shared.host.looks() == {}


def test_daemon_leaves_nothing(libvirtd: Daemon) -> None:
    """The fixture is asked for, since it tells where there can be no daemon."""
    with running_daemon() as another:
        assert another.folder != libvirtd.folder
        another.stop()
        another.start()
        pid = another.pid
        assert str(another.folder) not in Path("/proc/self/mountinfo").read_text()
    assert not another.folder.exists()
    assert not Path(f"/proc/{pid}").exists()
