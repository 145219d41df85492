"""Builds images and runs containers without a Docker engine: buildah, podman, runc, in a store of
their own below build/image."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.tools import ROOT, missing, run

BASE = "localhost/tokenwire-base"
IMAGE = "localhost/tokenwire"
# What `.dockerignore` lets into a build, and what makes it.
_SOURCES = (
    *("Dockerfile", ".dockerignore", "service/requirements.txt", "deploy/image/assemble.py"),
    *("service/tokenwire_service", "clients/python/src/tokenwire"),
)
_BUILD = ROOT / "build/image"
_CONFIGURATION = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""
LOCKED_DOWN = (
    *("--network", "none", "--read-only", "--read-only-tmpfs=false", "--cap-drop", "all"),
    *("--security-opt", "no-new-privileges", "--memory", "512m"),
)


def _digest(arguments: dict[str, str]) -> str:
    """Of all that the image is made from."""
    digest = hashlib.sha256(repr(sorted(arguments.items())).encode())
    for source in _SOURCES:
        path = ROOT / source
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Engine:
    """The programs, with one store."""

    configuration: Path

    @classmethod
    def found(cls, folder: Path) -> Engine:
        """What `make setup-image` has installed; without it the test skips, but fails in CI."""
        if not (_BUILD / ".complete").exists() or os.geteuid() != 0:
            missing("an engine for containers (which needs root)", "setup-image")
        configuration = folder / "containers.conf"
        configuration.write_text(_CONFIGURATION)
        return cls(configuration)

    def _command(self, program: str, *arguments: str | Path) -> tuple[str | Path, ...]:
        return (program, "--root", _BUILD / "store", "--runroot", _BUILD / "run", *arguments)

    def _variables(self) -> dict[str, str]:
        return {"CONTAINERS_CONF": str(self.configuration), "BUILDAH_ISOLATION": "chroot"}

    def podman(self, *arguments: str | Path, check: bool = True) -> str:
        """What it writes."""
        command = self._command("podman", *arguments)
        return run(*command, check=check, **self._variables()).strip()

    def log(self, name: str) -> str:
        """Both outputs of a container."""
        ran = subprocess.run(
            self._command("podman", "logs", name),
            env={**os.environ, **self._variables()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
        )
        return ran.stdout

    def built(self, **arguments: str) -> str:
        """The tag of the image of the sources as they are now. It is built by whoever asks first;
        the test processes beside it wait."""
        with (_BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            base = self.podman("image", "inspect", "--format", "{{.Id}}", BASE)
            tag = f"{IMAGE}:test-{_digest({**arguments, 'base': base})}"
            images = self.podman("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
            if tag not in images:
                self.build(tag, **arguments)
                for old in images:
                    if old.startswith(f"{IMAGE}:test-"):
                        self.podman("image", "rm", "--force", old)
        return tag

    def build(self, tag: str, **arguments: str) -> None:
        """Builds the project's Dockerfile as it is, from the start, without a network."""
        given = [
            part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")
        ]
        date = ("--timestamp", arguments["SOURCE_DATE_EPOCH"])
        alone = ("--network", "none", "--no-cache", "--quiet")
        base = ("--build-arg", f"BASE={BASE}")
        bud = ("bud", *alone, *base, *given, *date, "--tag", tag, ROOT)
        run(*self._command("buildah", *bud), **self._variables())

    def image(self, tag: str) -> dict[str, Any]:
        """What is known of it."""
        (found,) = json.loads(self.podman("image", "inspect", tag))
        return dict(found)

    @contextmanager
    def files(self, tag: str) -> Iterator[Path]:
        """Its root, mounted."""
        try:
            yield Path(self.podman("image", "mount", tag))
        finally:
            self.podman("image", "unmount", tag)

    @contextmanager
    def running(self, tag: str, *options: str | Path) -> Iterator[Container]:
        """A container of it; gone in the end."""
        container = Container(self, self.podman("run", "--detach", *options, tag))
        try:
            yield container
        finally:
            self.podman("rm", "--force", "--time", "0", container.name)

    @contextmanager
    def playing(self, manifests: str, pod: str, container: str) -> Iterator[Container]:
        """The container of the Pod that some YAML tells of, on this machine's own network."""
        played = self.configuration.with_name("played.yaml")
        played.write_text(manifests)
        try:
            self.podman("play", "kube", "--network", "host", played)
            yield Container(self, f"{pod}-{container}")
        finally:
            self.podman("pod", "rm", "--force", "--time", "0", pod, check=False)
            for name in self.podman("volume", "ls", "--format", "{{.Name}}").splitlines():
                self.podman("volume", "rm", name, check=False)


@dataclass(frozen=True)
class Container:
    """One that runs, or has run."""

    engine: Engine
    name: str

    @property
    def log(self) -> str:
        """Both its outputs."""
        return self.engine.log(self.name)

    def event(self, name: str) -> dict[str, Any]:
        """The first line of the log with this event, once it is there."""
        give_up = time.monotonic() + 30
        while True:
            log = self.log
            for line in log.splitlines():
                if line.startswith("{") and json.loads(line)["event"] == name:
                    found: dict[str, Any] = json.loads(line)
                    return found
            if time.monotonic() > give_up or self.inspect()["State"]["Status"] == "exited":
                pytest.fail(f"no event {name}: {log}")
            time.sleep(0.1)

    def inspect(self) -> dict[str, Any]:
        """What the engine knows of it."""
        (found,) = json.loads(self.engine.podman("container", "inspect", self.name))
        return dict(found)

    def execute(self, *command: str) -> str:
        """What a program in it writes."""
        return self.engine.podman("exec", self.name, *command)

    def terminated(self) -> int:
        """Its exit code after a SIGTERM; 137 where it had to be killed after half a minute. (Unlike
        a mere signal, `stop` keeps a Pod's container from being started again.)"""
        self.engine.podman("stop", "--time", "30", self.name)
        return int(self.inspect()["State"]["ExitCode"])
