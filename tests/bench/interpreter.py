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
import platform, sys, sysconfig
optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
if sys.base_prefix == "/usr":
    whose = "the distribution's"  # which does not tell how it was built
else:
    whose = f"built with{'' if optimised else 'out'} profile-guided optimisation"
print(f"{platform.python_version()} ({platform.python_compiler()}), {whose}")
"""


def environment(name: str, own: Path) -> Path:
    """The virtual environment to run in: `own`, or the one of that `name` that
    `make setup-bench-python` made for the named Python."""
    named = os.environ.get("BENCH_PYTHON")
    if not named:
        return own
    made = BUILT / "python" / name
    same = (made / "bin/python").resolve() == Path(named).resolve()
    if not same or not (made / ".complete").exists():
        raise SystemExit(f"{made} was not made for {named}: make setup-bench-python")
    return made


def path(*folders: Path) -> dict[str, str]:
    """The environment variable for packages that are not installed."""
    return {"PYTHONPATH": os.pathsep.join(map(str, folders))}


def description() -> str:
    """Its version, and how it was built."""
    python = os.environ.get("BENCH_PYTHON") or sys.executable
    done = subprocess.run([python, "-c", _ASKED], capture_output=True, text=True, check=True)
    return done.stdout.strip()
