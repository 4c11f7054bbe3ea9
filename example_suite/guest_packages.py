"""The packages of Debian or Ubuntu that the example's guest is made of, and the tools that are run.

Nothing is installed: what is needed is downloaded as any user may, and unpacked into a folder.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

# Both distributions' names for "the newest kernel for virtual machines".
KERNEL_PACKAGES = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
# Programs that are taken with the shared libraries that they need.
PROGRAM_PACKAGES = ("qemu-guest-agent", "grub-common", "dropbear-bin")
APT_LISTS = Path("/var/lib/apt/lists")
# The root account of APT would otherwise complain that it cannot enter our private folder.
APT = ("-q", "-o", "APT::Sandbox::User=root")


class GuestError(RuntimeError):
    """The example's guest cannot be built here; says why and what to do instead."""


def run(*command: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a tool and return what it printed.

    Raises `GuestError` with the tool's complaint if it fails, or is missing.
    """
    # ordinary users of Debian do not have the folders of mke2fs on their path
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            capture_output=True,
            check=True,
            encoding="utf-8",
            errors="replace",
            env=os.environ | {"LC_ALL": "C", "PATH": path} | environment,
        )
    except FileNotFoundError:
        raise GuestError(f"{command[0]} is needed to build the example guest; install it") from None
    except subprocess.CalledProcessError as error:
        raise GuestError(f"{' '.join(command[:4])} … failed: {error.stderr.strip()}") from error
    return done.stdout


def lists_stamp() -> str:
    """Return a text that changes when APT learns of other packages.

    To ask APT itself takes most of a second.
    """
    try:
        lists = sorted(path for path in APT_LISTS.iterdir() if "_Packages" in path.name)
        return "\n".join(f"{path.name} {path.stat().st_mtime_ns}" for path in lists)
    except OSError:
        return ""


def versions() -> dict[str, str]:
    """Ask APT for the packages that the guest is made of and their candidate versions."""
    kernel = _kernel_package()
    shown = _show(kernel, "busybox-static", "grub-pc-bin", *PROGRAM_PACKAGES)
    found = {name: fields["Version"] for name, fields in shown.items()}
    names = _kernel_parts(shown[kernel])
    # Ubuntu keeps the modules in a package of their own, on which the image depends.
    names += [part for image in _show(*names).values() for part in _kernel_parts(image)]
    del found[kernel]
    return found | dict.fromkeys(names, shown[kernel]["Version"])


def _kernel_package() -> str:
    """Return the name of the package that depends on this distribution's newest kernel."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        release = {}
    families = [release.get("ID", ""), *release.get("ID_LIKE", "").split()]
    package = next((KERNEL_PACKAGES[name] for name in families if name in KERNEL_PACKAGES), None)
    if package is None or shutil.which("dpkg-deb") is None:
        raise GuestError(
            "the example guest is built from Debian or Ubuntu packages; run the suite on your own"
            " machine with --kvmsnap-uri and --kvmsnap-domain"
        )
    architecture = run("dpkg", "--print-architecture").strip()
    if architecture != "amd64":
        raise GuestError(
            f"the example guest is built for amd64 only, not for {architecture}; run the suite on"
            " your own machine with --kvmsnap-uri and --kvmsnap-domain"
        )
    return package


def _kernel_parts(fields: dict[str, str]) -> list[str]:
    return re.findall(r"\blinux-(?:image|modules)-\d[^\s,|]*", fields.get("Depends", ""))


def _show(*packages: str) -> dict[str, dict[str, str]]:
    """Return the control fields of the candidates of `packages`, by package name."""
    text = run("apt-cache", "show", "--no-all-versions", *packages)
    records = [
        dict(re.findall(r"^(\S+): (.*)$", record, re.MULTILINE)) for record in text.split("\n\n")
    ]
    found = {fields["Package"]: fields for fields in records if fields}
    if missing := [name for name in packages if name not in found]:
        raise GuestError(f"APT knows no {', '.join(missing)}; apt-get update, then try again")
    return found


def unpack(packages: Sequence[str], work: Path, say: Callable[[str], None]) -> Path:
    """Download and unpack `packages` and the libraries of the programs; return the folder."""
    archives, unpacked = work / "archives", work / "unpacked"
    archives.mkdir()
    names = [*packages, *_library_packages()]
    say(f"downloading {len(names)} packages")
    run("apt-get", *APT, "download", *names, cwd=archives)
    for archive in sorted(archives.glob("*.deb")):
        run("dpkg-deb", "-x", str(archive), str(unpacked))
    return unpacked


def _library_packages() -> list[str]:
    """Return the packages that may hold the shared libraries of the programs."""
    options = [f"--no-{kind}" for kind in ("pre-depends", "recommends", "suggests", "conflicts")]
    options += [f"--no-{kind}" for kind in ("breaks", "replaces", "enhances")]
    text = run("apt-cache", "depends", "--recurse", *options, *PROGRAM_PACKAGES)
    return sorted(set(re.findall(r"^(?:lib|zlib)[^\s:]*$", text, re.MULTILINE)))


def libraries(unpacked: Path, program: Path) -> list[Path]:
    """Return the shared libraries that an unpacked program needs, its loader the last.

    Raises `GuestError` if no unpacked package holds one.
    """
    listed = run_unpacked(unpacked, program, loader_options=("--list",))
    found = [Path(path) for path in re.findall(r"=> (/\S+)", listed)]
    if strange := [path.name for path in found if unpacked not in path.parents]:
        raise GuestError(f"no package that {program.name} needs holds {', '.join(strange)}")
    loader = _loader(unpacked)
    return [*(path for path in found if path.name != loader.name), loader]


def run_unpacked(
    unpacked: Path, program: Path, *arguments: str, loader_options: Sequence[str] = ()
) -> str:
    """Run an unpacked program with the unpacked libraries; return what it printed."""
    folders = {path.parent for path in unpacked.glob("**/*-linux-gnu/lib*.so.*")}
    search = ":".join(str(folder) for folder in sorted(folders))
    options = ["--inhibit-cache", "--library-path", search, *loader_options]
    return run(str(_loader(unpacked)), *options, str(program), *arguments)


def _loader(unpacked: Path) -> Path:
    return next(path for path in unpacked.glob("**/lib64/ld-linux-x86-64.so.2"))
