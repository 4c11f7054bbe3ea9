"""Proof by the guest itself that a revert took place.

Two marks are made right before a revert and looked for right after it: a file in the guest's
memory, and a block on its disk, overwritten in place and read past the page cache. The block must
have been allocated before the snapshot: a *new* file looks absent whenever the memory was reverted,
even if the disk was not (tried).
"""

import subprocess
from dataclasses import dataclass

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest.agent import Agent, Finished
from pytest_kvmsnap.guest.clock import Clock

MEMORY = "/run/pytest-kvmsnap.canary"
DISK = "/var/tmp/pytest-kvmsnap.canary"  # noqa: S108 - a path of the guest
_BLOCK = 4096

# The scripts get their paths and the token as arguments. They start as few processes as they can:
# right after a revert each takes a guest some milliseconds, in software emulation some dozens.
_PLANT = """
exec dd if=/dev/zero of="$1" bs=4096 count=1 conv=fsync
"""
_MARK = """
umask 077
echo "$3" > "$1" || exit
exec dd of="$2" bs=4096 count=1 iflag=fullblock oflag=direct conv=notrunc,fsync
"""
# What is said of the memory and of the disk goes to the standard error, parted by a line.
_LOOK = """
LC_ALL=C; export LC_ALL
true < "$1"
echo -- >&2
exec dd if="$2" iflag=direct bs=4096 count=1
"""
_LINE = "--\n"
_NOT_RUN = (126, 127)


@dataclass(frozen=True)
class Canary:
    """The marks of one machine; `token` tells them from those of other reverts."""

    agent: Agent
    token: str

    def plant(self) -> bool:
        """Allocate the block on the disk, for a snapshot that is about to be taken."""
        return self._is_done(_PLANT, DISK)

    def mark(self) -> bool:
        """Make both marks, right before a revert; False when the guest cannot take them."""
        block = self.token.encode().ljust(_BLOCK, b"\0")
        return self._is_done(_MARK, MEMORY, DISK, self.token, stdin=block)

    def look(self, clock: Clock) -> str | None:
        """Look for the marks, right after a revert, and set the guest's clock.

        Returns what is wrong: nothing ("") when they are gone, None when the guest cannot look.
        """
        script, arguments = clock.script()
        done = self._done(script + _LOOK, *arguments, MEMORY, DISK)
        word, _, block = done.stdout.partition(b"\n") if done is not None else (b"", b"", b"")
        clock.heard(word.decode(errors="replace"))
        if done is None:
            return None
        of_memory, line, of_disk = done.stderr.decode(errors="replace").partition(_LINE)
        if not line or done.status in _NOT_RUN:
            return None
        if not of_memory:
            return f"memory: {MEMORY} is still there"
        if not _says_absent(of_memory, MEMORY):
            return f"memory: {of_memory.strip()}"
        if self.token.encode() in block:
            return f"disk: {DISK} still has the mark"
        if done.status and not _says_absent(of_disk, DISK):
            return f"disk: {of_disk.strip() or f'dd ended with the status {done.status}'}"
        return ""

    def remove(self) -> None:
        """Remove the block on the disk again."""
        self._done('rm -f "$1"', DISK)

    def _is_done(self, script: str, *arguments: str, stdin: bytes | None = None) -> bool:
        done = self._done(script, *arguments, stdin=stdin)
        return done is not None and done.status == 0

    def _done(self, script: str, *arguments: str, stdin: bytes | None = None) -> Finished | None:
        try:
            return self.agent.run(["/bin/sh", "-c", script, "sh", *arguments], stdin=stdin)
        except (AgentError, subprocess.TimeoutExpired):
            return None


def _says_absent(said: str, path: str) -> bool:
    """Tell whether the system says that there is no such file: any other error proves nothing."""
    return any(path in line and "no such file" in line.lower() for line in said.splitlines())
