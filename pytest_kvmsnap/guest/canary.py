"""Proof by the guest itself that a revert took place.

Two marks are made right before a revert and looked for right after it: a file in the guest's
memory, and a block on its disk, overwritten in place and read past the page cache. The block must
have been allocated before the snapshot: a *new* file looks absent whenever the memory was reverted,
even if the disk was not (tried).
"""

import subprocess
from dataclasses import dataclass

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest.agent import Agent

MEMORY = "/run/pytest-kvmsnap.canary"
DISK = "/var/tmp/pytest-kvmsnap.canary"  # noqa: S108 - a path of the guest
_BLOCK = 4096

# The scripts get their paths and the token as arguments; each prints one word last.
_PLANT = """
set -e
dd if=/dev/zero of="$1" bs=4096 count=1 conv=fsync 2>/dev/null
echo planted
"""
_MARK = """
set -e
umask 077
echo "$3" > "$1"
dd of="$2" bs=4096 count=1 iflag=fullblock oflag=direct conv=notrunc,fsync 2>/dev/null
echo marked
"""
# "absent" means that the system says so: any other error proves nothing
_LOOK = """
LC_ALL=C; export LC_ALL
if said=$(cat "$1" 2>&1); then echo "memory: $1 is still there"; exit; fi
case $said in *"No such file"*) ;; *) echo "memory: $said"; exit ;; esac
if said=$(cat "$2" 2>&1 >/dev/null); then
    case $(dd if="$2" iflag=direct bs=4096 count=1 2>/dev/null | tr -d '\\000') in
        *"$3"*) echo "disk: $2 still has the mark"; exit ;;
    esac
else
    case $said in *"No such file"*) ;; *) echo "disk: $said"; exit ;; esac
fi
echo gone
"""


@dataclass(frozen=True)
class Canary:
    """The marks of one machine; `token` tells them from those of other reverts."""

    agent: Agent
    token: str

    def plant(self) -> bool:
        """Allocate the block on the disk, for a snapshot that is about to be taken."""
        return self._said(_PLANT, DISK) == "planted"

    def mark(self) -> bool:
        """Make both marks, right before a revert; False when the guest cannot take them."""
        block = self.token.encode().ljust(_BLOCK, b"\0")
        return self._said(_MARK, MEMORY, DISK, self.token, stdin=block) == "marked"

    def look(self) -> str | None:
        """Look for the marks, right after a revert.

        Returns what is wrong: nothing ("") when they are gone, None when the guest cannot look.
        """
        said = self._said(_LOOK, MEMORY, DISK, self.token)
        return "" if said == "gone" else said or None

    def remove(self) -> None:
        """Remove the block on the disk again."""
        self._said('rm -f "$1"', DISK)

    def _said(self, script: str, *arguments: str, stdin: bytes | None = None) -> str:
        try:
            done = self.agent.run(["/bin/sh", "-c", script, "sh", *arguments], stdin=stdin)
        except (AgentError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.decode(errors="replace").strip()
