"""Suites of tests that write notes on a machine and read them, to see which state it is in.

They are in the machine's title, which stands for its disk: libvirt's test driver brings it back
with a revert.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from testdriver import Suite

NOTES = '''
import libvirt

def write(vm, word):
    """Add a word to the machine."""
    words = [*read(vm), word]
    vm.domain.setMetadata(libvirt.VIR_DOMAIN_METADATA_TITLE, " ".join(words), None, None, 0)

def read(vm):
    """Return the words on the machine."""
    try:
        return vm.domain.metadata(libvirt.VIR_DOMAIN_METADATA_TITLE, None, 0).split()
    except libvirt.libvirtError:
        return []
'''
START = "import pytest\nfrom words import read, write\n\n"  # `notes` is this module

DATABASE = """
@pytest.fixture(scope="module")
def database(module_vm):
    write(module_vm, "database")
    return "the database"
"""


def write(suite: "Suite", tests: str, conftest: str = "") -> None:
    """Write a suite whose tests add to the machine and read what is there."""
    suite.pytester.makepyfile(words=NOTES)
    suite.pytester.syspathinsert()
    suite.write(START + tests, START + conftest if conftest else "")
