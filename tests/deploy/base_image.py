"""Makes the image that the Dockerfile builds on in tests: this machine's Python, pip, a shell.

It stands in for python:3.11-slim where no registry can be reached. The wheels that the gateway is
installed from lie inside, so that the build itself needs no network.

    python tests/deploy/base_image.py WHEELS ARCHIVE.tar
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PIP = "[global]\nno-index = true\nfind-links = /wheels\ndisable-pip-version-check = true\n"
# What python:3.11-slim has for the packages that are installed on it: the C library's other parts,
# and two of the compiler's.
_LIBRARIES = (
    *("librt.so.1", "libdl.so.2", "libpthread.so.0", "libutil.so.1", "libresolv.so.2"),
    *("libgcc_s.so.1", "libstdc++.so.6"),
)


def make(wheels: Path, archive: Path) -> None:
    """Writes the base's only layer to `archive`."""
    spec = importlib.util.spec_from_file_location("assemble", ROOT / "deploy/image/assemble.py")
    assert spec is not None
    assert spec.loader is not None
    assemble = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(assemble)
    left = {"test", "tests", "idlelib", "tkinter", "turtledemo", "site-packages", "__pycache__"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        assemble.copy_python(
            root,
            lambda path: path.name in left or path.name.startswith(("_tkinter.", "_test", "xx")),
        )
        python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
        shell = root / "usr/bin/sh"
        shell.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(Path("/bin/sh").resolve(), shell)
        if Path("/bin").is_symlink():
            (root / "bin").symlink_to("usr/bin")
        (root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
        if not (root / "usr/local/bin/python").exists():
            (root / "usr/local/bin/python").symlink_to(python)
        assemble.copy_libraries(root, also=_LIBRARIES)
        assemble.copy_etc(root)
        (root / "tmp").mkdir()
        (root / "etc/pip.conf").write_text(_PIP)
        shutil.copytree(wheels, root / "wheels")
        _copy_notes(root)
        with tarfile.open(archive, "w") as tar:
            tar.add(root, arcname=".", filter=_owned_by_root)


def _copy_notes(root: Path) -> None:
    """What dpkg knows, as a Debian image has it."""
    database = Path("/var/lib/dpkg")
    if not database.exists():
        return
    target = root / database.relative_to("/")
    shutil.rmtree(target, ignore_errors=True)
    (target / "info").mkdir(parents=True)
    shutil.copy2(database / "status", target)
    for listing in (database / "info").glob("*.list"):
        if listing.name.startswith("lib"):
            shutil.copy2(listing, target / "info")


def _owned_by_root(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    os.umask(0o022)
    make(Path(sys.argv[1]), Path(sys.argv[2]))
