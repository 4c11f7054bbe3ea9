"""A machine of somebody's, and all that a run must leave as it was."""

import base64
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from daemonlab import PATIENCE, DaemonLab, SharedMachine

_IN_GUEST = "cat /run/as-found /opt/abc; ls -A /root /run /var/tmp"


class Kept:
    """A machine that starts by itself with the host, has a snapshot of its owner's, and stays.

    `found` is how every run finds it. One that does not boot stays in its firmware for good, which
    spares the processor.
    """

    def __init__(self, lab: DaemonLab, name: str, state: str, *, boots: bool = True) -> None:
        self.name = name
        self._lab = lab
        self._machine = machine = lab.make(name)
        self._copy: Path | None = None
        if not boots:
            xml = machine.disk.with_suffix(".xml")
            xml.write_text(re.sub(r"<(kernel|initrd|cmdline)>.*?</\1>", "", machine.as_made))
            machine.define(xml)
        machine.virsh("autostart")
        if state == "running":
            machine.start("echo found > /run/as-found")
        else:
            self._copy = machine.disk.with_suffix(".copy")
            shutil.copy(machine.disk, self._copy)
        machine.virsh("snapshot-create-as", "theirs")
        self.found = self.look()

    def look(self) -> dict[str, object]:
        """Return all that a run must leave as it was."""
        machine = self._machine
        links = self._lab.folder.glob("etc/**/autostart/*")  # libvirt sees where they lead, not we
        info = ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", str(machine.disk)]
        told = json.loads(subprocess.run(info, capture_output=True, check=True).stdout)
        return {
            "state": machine.state,
            "starts by itself": f"{self.name}.xml" in [link.name for link in links],
            "definition": machine.definition,
            "snapshots": [machine.virsh("snapshot-dumpxml", name) for name in machine.snapshots],
            "current": machine.current,
            "in the image": told.get("snapshots"),
            "content": in_guest(machine, _IN_GUEST) if self._copy is None else self._compared(),
            "files": sorted(path.name for path in self._lab.images.glob(f"*{self.name}*")),
        }

    def _compared(self) -> str:
        compare = ["qemu-img", "compare", "-f", "qcow2", "-F", "qcow2"]
        command = [*compare, str(self._copy), str(self._machine.disk)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    def qemu(self) -> int:
        """Return its process."""
        (pid_file,) = self._lab.folder.glob(f"run/libvirt/qemu/**/{self.name}.pid")
        return int(pid_file.read_text())

    def discard(self) -> None:
        self._lab.discard(self._machine)
        if self._copy is not None:
            self._copy.unlink()


def in_guest(machine: SharedMachine, command: str) -> str:
    """Run a shell command in a guest whose agent answers; return what it says."""
    words = {"path": "/bin/sh", "arg": ["-c", command], "capture-output": True}
    pid = ask_agent(machine, "guest-exec", words)["pid"]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        done = ask_agent(machine, "guest-exec-status", {"pid": pid})
        if done["exited"]:
            return base64.b64decode(done.get("out-data", "")).decode()
    raise AssertionError(f"in the guest, {command} does not end")


def ask_agent(machine: SharedMachine, command: str, arguments: dict[str, object]) -> Any:
    asked = json.dumps({"execute": command, "arguments": arguments})
    return json.loads(machine.virsh("qemu-agent-command", asked))["return"]
