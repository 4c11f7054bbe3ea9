"""Images that grow: the space that they take on the host's disk, watched from test to test."""

from pathlib import Path

from pytest_kvmsnap.machine.domain import Domain
from pytest_kvmsnap.sizes import mib


class Growth:
    """The images of one machine, from when this run took it.

    Only those that are on this host and that this user may look at. A look is one `stat` for each.
    """

    def __init__(self, domain: Domain, limit: int) -> None:
        self._name = domain.name
        self._limit = limit
        self._before: dict[Path, int] = {}
        self._told: set[Path] = set()
        for disk in domain.disks(inactive=True) if domain.hypervisor.is_local else ():
            if disk.is_snapshotted and disk.path is not None and disk.kind == "file":
                space = _space(disk.path)
                if space is not None:
                    self._before[disk.path] = space

    def news(self, test: str) -> list[str]:
        """Return what to tell after a test: each image that grew beyond the limit, once."""
        lines = []
        for path, before in self._before.items():
            grown = 0 if path in self._told else (_space(path) or 0) - before
            if grown > self._limit:
                self._told.add(path)
                lines.append(
                    f"{self._name}: its image {path} grew by {mib(grown)} since this run took the"
                    f" machine, as seen after {test}. Its snapshots hold memory and disk: those of"
                    " preparations until these are over, the first ones until the end of the run."
                    " Let preparations hold less, leave out the memory with --kvmsnap-live=no, or"
                    f" raise --kvmsnap-growth-limit (now {mib(self._limit)})."
                )
        return lines

    def so_far(self) -> int:
        """Return by how many bytes the images grew; one that shrank or went counts as none."""
        return sum(max(0, (_space(path) or 0) - before) for path, before in self._before.items())


def _space(path: Path) -> int | None:
    """Return the bytes that a file takes on the disk, None when it cannot be looked at."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return None
