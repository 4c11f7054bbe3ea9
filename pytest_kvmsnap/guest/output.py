"""Output of any length: libvirt takes no answer of more than 10 MiB from the agent.

It loses the agent with a longer one, and how long it gets is known only when it is there. So the
command's streams go through pipes whose readers pass on the beginning of each, and keep the rest in
a file. That takes the guest four processes more, so it is done only where it is asked for.
"""

import contextlib
import secrets
import shlex
import subprocess
from collections.abc import Sequence

from pytest_kvmsnap.errors import AgentError
from pytest_kvmsnap.guest.agent import Agent, Finished

KEPT = 48 * 65536
"""Bytes of each stream that come with the status; both are 8 MiB of JSON."""

_NOT_THERE = 127

# The command takes the place of the shell, so it keeps its parent, its status and its signals. Here
# documents are the pipes, which need neither a name nor a process: each is opened for writing
# beside the end that the shell has (a shell that keeps them in files goes without all this). Only
# `exec` closes the others for good: for redirections of anything else shells keep copies.
_WHOLE = """
rest=$1
shift
command -v "$1" >/dev/null || { echo "$rest" >&2; exit 127; }
command -v dd >/dev/null || exec "$@"
exec 3<<E 4<<E 5<<E 6<<E
E
E
E
E
[ -p /proc/self/fd/3 ] || exec "$@" 3<&- 4<&- 5<&- 6<&-
exec 7>/proc/self/fd/3 8>/proc/self/fd/4
pass_on() {
    LC_ALL=C dd bs=65536 count=48 iflag=fullblock 2>/proc/self/fd/5
    read -r blocks _ <&5
    if [ "$blocks" = 48+0 ]; then umask 077; exec cat >"$1"; fi
}
(exec <&3 3<&- 4<&- 6<&- 7>&- 8>&-; pass_on "$rest.1") &
(exec <&4 >&2 5<&6 3<&- 4<&- 6<&- 7>&- 8>&-; pass_on "$rest.2") &
exec "$@" >&7 2>&8 3<&- 4<&- 5<&- 6<&- 7>&- 8>&-
"""


def run_whole(
    agent: Agent,
    command: Sequence[str],
    *,
    stdin: bytes | None = None,
    timeout: float = 60,
    shown: str | None = None,
) -> Finished:
    """Run a command as `Agent.run` does, by way of the guest's shell; output may be of any length.

    What is beyond `KEPT` is in the guest's /tmp for a moment.
    """
    rest = f"/tmp/.kvmsnap-output-{secrets.token_hex(8)}"  # noqa: S108 - in the guest
    argv = ["/bin/sh", "-c", _WHOLE, "sh", rest, *command]
    try:
        done = agent.run(argv, stdin=stdin, timeout=timeout, shown=shown or shlex.join(command))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(AgentError, subprocess.TimeoutExpired):
            _remove(agent, rest)
        raise
    if done.status == _NOT_THERE and done.stderr.decode(errors="replace").strip() == rest:
        return agent.run(command, shown=shown)  # it was not run, and the agent tells why
    if max(len(done.stdout), len(done.stderr)) < KEPT:
        return done
    try:
        return done._replace(
            stdout=_completed(agent, done.stdout, f"{rest}.1"),
            stderr=_completed(agent, done.stderr, f"{rest}.2"),
        )
    finally:
        _remove(agent, rest)


def _completed(agent: Agent, beginning: bytes, rest: str) -> bytes:
    return beginning if len(beginning) < KEPT else b"".join([beginning, *agent.read(rest)])


def _remove(agent: Agent, rest: str) -> None:
    agent.run(["rm", "-f", f"{rest}.1", f"{rest}.2"], timeout=10)
