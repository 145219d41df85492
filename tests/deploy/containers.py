"""Builds images and runs containers without a Docker engine: buildah, podman, runc, in a store of
their own below build/image."""

from __future__ import annotations

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

    def _run(self, program: str, *arguments: str | Path, check: bool = True) -> str:
        store = ("--root", _BUILD / "store", "--runroot", _BUILD / "run")
        return run(
            *(program, *store, *arguments),
            check=check,
            CONTAINERS_CONF=str(self.configuration),
            BUILDAH_ISOLATION="chroot",
        ).strip()

    def podman(self, *arguments: str | Path, check: bool = True) -> str:
        """What it writes."""
        return self._run("podman", *arguments, check=check)

    def build(self, tag: str, **arguments: str) -> None:
        """Builds the project's Dockerfile as it is, from the start, without a network."""
        given = [
            part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")
        ]
        date = ("--timestamp", arguments["SOURCE_DATE_EPOCH"])
        alone = ("--network", "none", "--no-cache", "--quiet")
        base = ("--build-arg", f"BASE={BASE}")
        self._run("buildah", "bud", *alone, *base, *given, *date, "--tag", tag, ROOT)

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
            for kind in ("volume", "secret"):
                for name in self.podman(kind, "ls", "--format", "{{.Name}}").splitlines():
                    self.podman(kind, "rm", name)


@dataclass(frozen=True)
class Container:
    """One that runs, or has run."""

    engine: Engine
    name: str

    @property
    def log(self) -> str:
        """Both its outputs."""
        command = (
            "podman",
            "--root",
            _BUILD / "store",
            "--runroot",
            _BUILD / "run",
            "logs",
            self.name,
        )
        ran = subprocess.run(
            command,
            env={**os.environ, "CONTAINERS_CONF": str(self.engine.configuration)},
            capture_output=True,
            text=True,
            check=True,
        )
        return ran.stdout + ran.stderr

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
