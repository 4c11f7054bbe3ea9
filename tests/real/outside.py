"""Starts a machine and runs commands in its guest, in a process that then leaves it alone.

`python outside.py URI NAME [COMMAND …]`: an embedded libvirt serves one process, and needs one that
lasts a while to get hold of a guest's agent, so this is not virsh's job.
"""

import sys

from pytest_kvmsnap.guest.agent import Agent
from pytest_kvmsnap.guest.ready import AgentSign, wait_ready
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.libvirt_api import connect

if __name__ == "__main__":
    uri, name, *command = sys.argv[1:]
    hypervisor = connect(uri)
    domain = Domain(hypervisor, hypervisor.find(name), name)
    if domain.state() == "shut off":
        domain.start()
    wait_ready(domain, AgentSign(domain), 60)
    if command:
        done = Agent(domain).run(["/bin/sh", "-c", *command])
        sys.stdout.write(done.stdout.decode())
    hypervisor.close()
