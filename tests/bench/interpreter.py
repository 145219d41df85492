"""Which Python runs the systems that are written in it: that of $BENCH_PYTHON, or the tests' own.

The image has one that was built with profile-guided optimisation, and so have distributions:
Debian's does a unary call in 762 us where one that was built without takes 913.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.traffic import BUILT

_ASKED = """\
import platform, sys
whose = "the distribution's" if sys.base_prefix == "/usr" else "built by hand"
print(f"{platform.python_version()} ({platform.python_compiler()}), {whose}")
"""


def environment(name: str, own: Path) -> Path:
    """The virtual environment to run in: `own`, or the one of that `name` that
    `make setup-bench-python` made for the named Python."""
    named = os.environ.get("BENCH_PYTHON")
    if not named:
        return own
    made = BUILT / "python" / name
    if (made / "bin/python").resolve() != Path(named).resolve():
        raise SystemExit(f"{made} is not one of {named}: make setup-bench-python")
    return made


def path(*folders: Path) -> dict[str, str]:
    """The environment variable for packages that are not installed."""
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def description() -> str:
    """Its version, and where it is from: how it was built it need not tell."""
    python = os.environ.get("BENCH_PYTHON") or sys.executable
    done = subprocess.run([python, "-c", _ASKED], capture_output=True, text=True, check=True)
    return done.stdout.strip()
