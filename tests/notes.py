"""Notes on a machine of libvirt's test driver, and suites of tests that take and read them.

They are in the machine's title, which stands for its disk: a revert brings it back.
"""

import textwrap
from typing import TYPE_CHECKING

import libvirt

if TYPE_CHECKING:
    from testdriver import Suite

    from pytest_kvmsnap import VM

START = "import pytest\nfrom notes import read, write\n\n"


def write(vm: "VM", word: str) -> None:
    """Add a word to the machine."""
    words = [*read(vm), word]
    vm.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, " ".join(words), None, None, 0)


def read(vm: "VM") -> list[str]:
    """Return the words on the machine."""
    try:
        return vm.domain.metadata(libvirt.VIR_DOMAIN_METADATA_TITLE, None, 0).split()
    except libvirt.libvirtError:
        return []


def write_suite(suite: "Suite", tests: str, conftest: str = "") -> None:
    """Write a suite whose tests add to the machine and read what is there."""
    suite.write(
        START + textwrap.dedent(tests), START + textwrap.dedent(conftest) if conftest else ""
    )
