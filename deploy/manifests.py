"""Writes what kustomize wants from the chart: the base, which is the chart with its default values,
and a component for each thing that can be switched on and is of a kind that others define.

The chart is the one source. What is Helm's own goes: two labels, and the checksum by which pods are
replaced when the configuration changes in what needs a restart; kustomize's generator does that for
any change, by the ConfigMap's name.
`make manifests` runs it; a test finds what it would not write.

    python deploy/manifests.py FOLDER
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml
from render import render

_HEADER = "# Written by `make manifests` from deploy/chart/tokenwire: not edited by hand.\n"
_HELMS = re.compile(
    r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by|checksum/config):.*\n", re.MULTILINE
)
# Component -> the values that switch it on. The dashboard is no object for the cluster: it is
# imported into Grafana, or handed to a sidecar of whatever label.
_COMPONENTS: dict[str, dict[str, Any]] = {
    "monitoring": {"monitoring": {"enabled": True, "dashboard": False}},
    "grpcroute": {"grpcRoute": {"enabled": True}},
}
Files = dict[str, str]


def base() -> Files:
    """The text of each file, by its name."""
    manifests = render({})
    (config,) = yaml.safe_load_all(manifests.pop("configmap.yaml"))
    del manifests["NOTES.txt"]
    files = _cleaned(manifests)
    files["kustomization.yaml"] = _written(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": sorted(files),
            "configMapGenerator": [
                {"name": config["metadata"]["name"], "files": sorted(config["data"])}
            ],
        }
    )
    return files | {name: _HEADER + text for name, text in config["data"].items()}


def component(values: dict[str, Any]) -> Files:
    """The same of what these values add to the base."""
    before = render({})
    files = _cleaned({k: v for k, v in render(values).items() if k not in before})
    files["kustomization.yaml"] = _written(
        {
            "apiVersion": "kustomize.config.k8s.io/v1alpha1",
            "kind": "Component",
            "resources": sorted(files),
        }
    )
    return files


def _cleaned(manifests: dict[str, str]) -> Files:
    return {name: _HEADER + _HELMS.sub("", text).strip() + "\n" for name, text in manifests.items()}


def _written(kustomization: dict[str, Any]) -> str:
    return _HEADER + yaml.safe_dump(kustomization, sort_keys=False)


def main() -> None:
    """Leaves nothing else in the folders that it writes."""
    written = {"base": base()} | {name: component(on) for name, on in _COMPONENTS.items()}
    for name, files in written.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        for there in folder.iterdir():
            if there.name not in files:
                there.unlink()
        for file, text in files.items():
            (folder / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
