"""Gathers what the gateway runs on into one root directory, which becomes the image.

That is this Python with what the gateway may use of its library, the environment /app with the
packages, the shared libraries that all of it loads, and a few files of /etc. The Dockerfile runs
it; it needs nothing but the standard library, and Debian's or another glibc.

Two runs over the same files give the same bytes: compiled code is bound to no time, and every file
has the date and the rights that are chosen here.
"""

from __future__ import annotations

import argparse
import compileall
import os
import py_compile
import re
import shutil
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

APP = Path("/app")

# Of the standard library: tests, graphical programs, and what installs or builds packages.
_UNUSED = {
    *("test", "tests", "idlelib", "tkinter", "turtledemo", "turtle.py", "lib2to3", "pydoc_data"),
    *("ensurepip", "venv", "distutils", "site-packages", "__pycache__"),
}
# Its extensions that draw in libraries which nothing else needs, or that only its own tests use.
_UNUSED_EXTENSIONS = re.compile(
    r"(_tkinter|_curses|_curses_panel|readline|_gdbm|_dbm|nis|ossaudiodev|_sqlite3|_test\w*|_xxtest\w*|xx\w*)\."
)
_INSTALLERS = re.compile(r"(pip|setuptools|pkg_resources|_distutils_hack|distutils-precedence)\b")

# `files` first: without this file glibc asks the network even for localhost.
_ETC = {
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "etc/passwd": "tokenwire:x:65532:65532:tokenwire:/nonexistent:/nonexistent\n",
    "etc/group": "tokenwire:x:65532:\n",
}
_COMMAND = f"""#!{APP}/bin/python
import sys

from tokenwire_service.cli import main

sys.exit(main())
"""


class MissingError(Exception):
    """Something that the image needs is not on this machine."""


def main() -> None:
    """The command line: what goes where, and how it is dated."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--packages", type=Path, required=True, help="folder of the own packages")
    parser.add_argument("--root", type=Path, required=True, help="where to; must not be there yet")
    parser.add_argument("--date", type=int, required=True, help="of every file, seconds since 1970")
    arguments = parser.parse_args()
    assemble(arguments.packages, arguments.root, arguments.date)


def assemble(packages: Path, root: Path, date: int) -> None:
    """Fills `root`. Raises MissingError where a library is not here or the result does not run."""
    copy_python(root, _is_unused)
    site = copy_app(packages, root)
    copy_libraries(root)
    copy_etc(root)
    for folder in (site, root / _standard_library().relative_to("/")):
        # Without the root's own name, so that tracebacks say where a file is in the image.
        compiled = compileall.compile_dir(
            folder,
            maxlevels=20,
            quiet=1,
            stripdir=str(root),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        if not compiled:
            raise MissingError(f"{folder} cannot be compiled")
    normalise(root, date)
    prove(root)


def _standard_library() -> Path:
    return Path(os.__file__).resolve().parent


def _is_unused(path: Path) -> bool:
    return path.name in _UNUSED or bool(
        path.parent.name == "lib-dynload" and _UNUSED_EXTENSIONS.match(path.name)
    )


def copy_python(root: Path, leave: Callable[[Path], bool]) -> None:
    """The interpreter and its library, where they are here, without what `leave` says."""

    def left(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if leave(Path(folder, name)) or name.startswith("config-")}

    library = _standard_library()
    shutil.copytree(library, root / library.relative_to("/"), ignore=left, symlinks=True)
    executable = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    _copy(executable, root)
    for shared in sorted(Path(sys.base_prefix, "lib").glob("libpython3*.so.*")):
        _copy(shared, root)


def copy_app(packages: Path, root: Path) -> Path:
    """The environment without what installs packages; where its packages are."""
    executable = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    binaries = root / APP.relative_to("/") / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(executable)
    (binaries / "tokenwire").write_text(_COMMAND)
    (binaries / "tokenwire").chmod(0o755)
    # The version that Python asks for to know that this is an environment, and no more.
    home = f"home = {executable.parent}\ninclude-system-site-packages = false\n"
    (binaries.parent / "pyvenv.cfg").write_text(home)
    (site,) = APP.glob("lib/python3*/site-packages")
    target = root / site.relative_to("/")
    shutil.copytree(
        site,
        target,
        ignore=lambda _folder, names: {
            name for name in names if name == "__pycache__" or _INSTALLERS.match(name)
        },
    )
    for package in sorted(packages.iterdir()):
        shutil.copytree(
            package, target / package.name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return target


def copy_libraries(root: Path, also: Iterable[str] = ()) -> None:
    """The shared libraries that the binaries in `root` load and that are not in `root` yet, and
    those beside the C library that `also` names; with what Debian notes of their packages, where
    scanners look for it."""
    for name in ("lib", "lib64"):  # as here: the loader's own path begins with one of them
        if Path("/", name).is_symlink() and not (root / name).is_symlink():
            (root / name).symlink_to(Path("/", name).readlink())
    loader = _loader()
    wanted: dict[str, Path] = {loader.name: loader}
    for binary in sorted(_binaries(root)):
        for library in _loaded_by(loader, binary):
            if not library.is_relative_to(root):
                wanted[library.name] = library
    libc = wanted["libc.so.6"].parent
    wanted |= {name: libc / name for name in also}
    packages = _owners(wanted.values())
    for path in wanted.values():
        _copy(path, root)
    for package, status in packages.items():
        noted = root / "var/lib/dpkg/status.d" / package
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.write_text(status)


def _loader() -> Path:
    """The dynamic loader that this very process was started with."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split()[-1])
        if path.name.startswith("ld-linux"):
            # Binaries name it by this path, which need not be where it really is.
            found = [p for p in (Path("/lib64", path.name), Path("/lib", path.name)) if p.exists()]
            return found[0] if found else path
    raise MissingError("this Python has no dynamic loader: is it linked with glibc?")


def _binaries(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _loaded_by(loader: Path, binary: Path) -> Iterator[Path]:
    # The variable, unlike the loader's option --list, goes on after what it cannot find.
    traced = {"LD_TRACE_LOADED_OBJECTS": "1"}
    listed = subprocess.run(
        [loader, binary], env=traced, capture_output=True, text=True, check=False
    )
    for line in listed.stdout.splitlines():
        name, arrow, where = line.partition("=>")
        if arrow and "not found" in where:
            raise MissingError(f"{binary} needs {name.strip()}, which is not here")
        if arrow and where.split()[0].startswith("/"):
            yield Path(where.split()[0])


def _owners(libraries: Iterable[Path]) -> dict[str, str]:
    """Package -> what dpkg notes of it; empty where there is no dpkg."""
    database = Path("/var/lib/dpkg")
    owner = {
        line: listing.name.removesuffix(".list").partition(":")[0]
        for listing in (database / "info").glob("*.list")
        for line in listing.read_text().splitlines()
    }
    names = set()
    for path in libraries:
        real = path.resolve()
        unmerged = str(real).removeprefix("/usr")  # packages older than the merge of /lib and /usr
        names |= {owner[p] for p in (str(path), str(real), unmerged) if p in owner}
    noted = {}
    if (database / "status").exists():
        for paragraph in (database / "status").read_text(encoding="utf-8").split("\n\n"):
            name = paragraph.partition("\n")[0].removeprefix("Package: ")
            if name in names:
                noted[name] = paragraph.strip() + "\n"
    return noted


def copy_etc(root: Path) -> None:
    """Names, authorities, and how the distribution wants TLS to be."""
    for name, text in _ETC.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    folder = Path(ssl.get_default_verify_paths().openssl_cafile).parent
    for file in (folder / "openssl.cnf", Path("/etc/ssl/certs/ca-certificates.crt")):
        if file.exists():
            _copy(file, root)
        elif file.suffix == ".crt":
            raise MissingError(f"{file} is not here: providers' certificates need authorities")


def _copy(path: Path, root: Path) -> None:
    """The file itself, under this name; links in the folder's path are followed, as they may be the
    root's own, too."""
    target = root / path.parent.resolve().relative_to("/") / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        shutil.copy2(path.resolve(), target)


def normalise(root: Path, date: int) -> None:
    """Everything readable by all, writable by root alone, and of one date; nothing is executable
    but what is started, and the loader that starts it."""
    for path in (*root.rglob("*"), root):
        if not path.is_symlink():
            started = path.parent.name == "bin" or path.name.startswith("ld-linux")
            executable = path.is_dir() or started
            path.chmod(0o755 if executable else 0o644)
        os.utime(path, (date, date), follow_symlinks=False)


def prove(root: Path) -> None:
    """Every module of the gateway can be imported within the root."""
    imports = (
        "import importlib, pkgutil, tokenwire_service as package\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)"
    )
    ran = subprocess.run(
        [APP / "bin/python", "-B", "-c", imports],
        preexec_fn=lambda: os.chroot(root),
        cwd="/",
        env={},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        raise MissingError(f"the gateway cannot be imported within {root}:\n{ran.stderr}")


if __name__ == "__main__":
    try:
        main()
    except MissingError as error:
        sys.exit(f"assemble: {error}")
