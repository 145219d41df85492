"""Installs the wheel into an empty environment, with the lowest versions that it says will do, and
has a project there run and pass `mypy --strict`, the README's snippets included.

python check.py FOLDER_OF_WHEELS FOLDER
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TOOLS = Path(sys.executable).parent  # uv and mypy, which the empty environment has not


def run(*command: str | Path, cwd: Path) -> str:
    """What it printed. Ends the program with that if it failed."""
    ran = subprocess.run(
        command, cwd=cwd, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if ran.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{ran.stdout}")
    return ran.stdout


def snippets(readme: Path) -> list[str]:
    """One program for each section of the README, with what it says each begins with."""
    sections = re.split(r"^#{2,3} ", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    code = [re.findall(r"^```python\n(.*?)^```", s, re.MULTILINE | re.DOTALL) for s in sections]
    found = [each for each in code if each]
    begin = found[0][-1]  # of "Connect"
    return ["\n".join([begin, *each]) for each in found[1:]]


def main(wheels: Path, folder: Path) -> None:
    """All of it, in `folder`, which is made anew."""
    [wheel] = wheels.glob("tokenwire-*.whl")
    uv = TOOLS / "uv"
    run(uv, "venv", "--quiet", "--clear", "--python", sys.executable, folder, cwd=HERE)
    python = folder / "bin/python"
    # Only what stands in a requirements file is "direct", and so the lowest of what the wheel asks.
    asked = ("-r", HERE.parent / "pyproject.toml", "--extra", "pydantic")
    lowest = ("--resolution", "lowest-direct", "--only-binary", ":all:")
    run(uv, "pip", "install", "--quiet", "--python", python, *lowest, *asked, wheel, cwd=HERE)
    said = run(python, "-I", HERE / "story.py", cwd=folder)
    if said != "from outside\n":
        sys.exit(f"story.py said {said!r}")
    project = folder / "project"
    project.mkdir()
    for i, text in enumerate(snippets(HERE.parent / "README.md")):
        (project / f"readme_{i}.py").write_text(text, encoding="utf-8")
    for path in (HERE / "story.py", *(HERE.parent / "examples").glob("*.py")):
        (project / path.name).write_bytes(path.read_bytes())
    strict = ("--strict", "--no-incremental", "--config-file", "")
    run(TOOLS / "mypy", *strict, "--python-executable", python.absolute(), ".", cwd=project)
    versions = run(uv, "pip", "freeze", "--python", python, cwd=HERE).split()
    print("tokenwire runs, and is typed, with", ", ".join(v for v in versions if "==" in v))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
