"""revert=fast: inside the running QEMU while that is provably the same, else told why not."""

from collections.abc import Callable, Collection

from pytest_kvmsnap.errors import ConnectionLostError, MachineError
from pytest_kvmsnap.machine import domainxml, fast_revert
from pytest_kvmsnap.machine.agentport import AgentPort
from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.machine.fast_revert import Look, Watch


class FastReverts:
    """The fast reverts of one machine, to the snapshot that libvirt last brought it to.

    Every one that is not possible is left to libvirt's forced revert; each reason is told once.
    """

    def __init__(self, domain: Domain, tell: Callable[[str], None]) -> None:
        self._domain = domain
        self._tell = tell
        self._told: set[str] = set()
        self._watch = Watch(domain)
        self._snapshot = ""
        self._look: Look | None = None

    def note(self, snapshot: str) -> None:
        """Note how the machine looks at a snapshot that it was just brought to, unless we know."""
        if self._look is not None and self._snapshot == snapshot:
            return
        self._look = None
        if self._domain.state() != "running":
            return
        if self._domain.hypervisor.kind != "QEMU":
            self._say("the driver of that libvirt is not QEMU's")
            return
        try:
            self._watch.start()
            look = fast_revert.look(self._domain, snapshot, self._watch)
        except ConnectionLostError:
            raise
        except MachineError as error:
            self._say(error.why or error.what)
            return
        reason = fast_revert.unfit(look)
        if reason is None:
            self._snapshot, self._look = snapshot, look
        else:
            self._say(reason)

    def deleted(self, snapshots: Collection[str]) -> None:
        """Note that we deleted snapshots ourselves."""
        if self._look is not None:
            outside = self._look.outside
            left = outside._replace(snapshots=outside.snapshots.difference(snapshots))
            self._look = self._look._replace(outside=left)

    def revert(self, snapshot: str, timeout: float) -> bool:
        """Revert inside QEMU if that is the same; tell whether it is done.

        If not, the machine may be in any state, and only a forced revert helps.
        """
        before, self._look = self._look, None
        if before is None or self._snapshot != snapshot:
            return False
        try:
            now = fast_revert.look(self._domain, snapshot, self._watch)
            changes = fast_revert.changes(before, now)
            if changes:
                self._say("; ".join(changes))
                return False
            fast_revert.load(self._domain, snapshot, now, timeout)
        except ConnectionLostError:
            raise
        except MachineError as error:
            self._say(error.why or error.what)
            return False
        if any(domainxml.sees_agent(look.outside.live) for look in (before, now)):
            AgentPort(self._domain).open()
        self._look = before
        return True

    def forget(self) -> None:
        """Have the next revert be a forced one: only a new QEMU cures what is wrong."""
        self._look = None

    def close(self) -> None:
        """End the watch over the machine."""
        self._watch.stop()

    def _say(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._tell(f"{self._domain.name}: reverted by force, not fast: {reason}")
