"""Writes deploy/kustomize/base: the chart with its default values, as kustomize wants it.

The chart is the one source. What is Helm's own goes: two labels, and the checksum by which pods are
replaced when the configuration changes in what needs a restart; kustomize's generator does that for
any change, by the ConfigMap's name.
`make manifests` runs it; a test finds a base that is not what it would write.

    python deploy/manifests.py FOLDER
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml
from render import render

_HEADER = "# Written by `make manifests` from deploy/chart/tokenwire: not edited by hand.\n"
_HELMS = re.compile(
    r"^ *(helm\.sh/chart|app\.kubernetes\.io/managed-by|checksum/config):.*\n", re.MULTILINE
)


def base() -> dict[str, str]:
    """The text of each file, by its name."""
    manifests = render({})
    (config,) = yaml.safe_load_all(manifests.pop("configmap.yaml"))
    del manifests["NOTES.txt"]
    files = {
        name: _HEADER + _HELMS.sub("", text).strip() + "\n" for name, text in manifests.items()
    }
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(files),
        "configMapGenerator": [
            {"name": config["metadata"]["name"], "files": sorted(config["data"])}
        ],
    }
    files["kustomization.yaml"] = _HEADER + yaml.safe_dump(kustomization, sort_keys=False)
    return files | {name: _HEADER + text for name, text in config["data"].items()}


def main() -> None:
    """Leaves nothing else in the folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    files = base()
    for there in folder.iterdir():
        if there.name not in files:
            there.unlink()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
