"""Renders the chart as Helm does, without a cluster: values in, manifests out.

    python deploy/render.py < requests.json > answers.json

Reads a JSON list of values, each as it would stand in a values file, and answers with a list as
long: {"manifests": text of each template by its name} or {"error": why it cannot be rendered}. Runs
in the environment of `make setup-deploy`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import helm_python

CHART = Path(__file__).parent / "chart" / "tokenwire"


def render(values: dict[str, Any]) -> dict[str, str]:
    """The text of each template that renders to something, by its file's name, for a release called
    tokenwire. Raises helm_python.HelmError, also where the values do not fit values.schema.json."""
    with helm_python.Chart.load(CHART) as loaded:
        loaded.validate_schema(values)
        rendered = loaded.render(values, name="tokenwire", namespace="default")
    return {Path(path).name: text for path, text in sorted(rendered.items()) if text.strip()}


def main() -> None:
    """Answers what standard input asks."""
    answers: list[dict[str, Any]] = []
    for values in json.load(sys.stdin):
        try:
            answers.append({"manifests": render(values)})
        except helm_python.HelmError as error:
            answers.append({"error": str(error)})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
