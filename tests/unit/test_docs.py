"""The pages say what stands: links lead somewhere, the architecture's page draws every module."""

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "service" / "tokenwire_service"
_LISTED = subprocess.run(
    ["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False
)
PAGES = sorted(
    page
    for page in (
        [ROOT / name for name in _LISTED.stdout.split("\0") if name]
        if _LISTED.returncode == 0  # else this is no checkout, but a copy of one
        else [
            *ROOT.glob("*.md"),
            *(p for d in ("docs", "clients", "service", "tests") for p in (ROOT / d).rglob("*.md")),
        ]
    )
    if page.exists()
)
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Its text without code, in which brackets mean other things."""
    text = re.sub(
        r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return re.sub(r"`[^`\n]*`", "`", text)


def anchors(page: Path) -> set[str]:
    """Where GitHub lets a link point to in a page."""
    text = re.sub(
        r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 0
        while (again := f"{anchor}-{number}" if number else anchor) in found:
            number += 1
        found.add(again)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page)):
            there = (page.parent / target).resolve()
            ahead.extend(there.glob("*.md") if there.is_dir() else ())
            if there.suffix == ".md" and there.exists():
                ahead.append(there)
    docs = {page for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert docs - seen == set()


def test_the_house_is_drawn_with_every_module() -> None:
    house = ARCHITECTURE.partition("## The house")[2].partition("```")[2].partition("```")[0]
    drawn = set(re.findall(r"(?<=\s)(\w+\.py)\b", house))
    there = {
        path.name
        for path in (*PACKAGE.glob("*.py"), *(PACKAGE / "upstream").glob("*.py"))
        if path.name != "__init__.py"
    }
    clients = {path.name for path in (ROOT / "clients/python/src/tokenwire").glob("*.py")}
    assert there - drawn == set()
    tests = {"harness.py", "everything.py"}
    assert drawn - there - clients - tests == set()


def test_the_layers_are_drawn_as_they_are_held() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
    block = ARCHITECTURE.partition("## Direction")[2]
    for contract in contracts[:2]:
        block = block.partition("```")[2]
        drawn, _, block = block.partition("```")
        assert layers(drawn) == [set(layer.split(" : ")) for layer in contract["layers"]]


def layers(block: str) -> list[set[str]]:
    """Each line's names; what follows two blanks, or more, and is no name is a remark."""
    lines = [re.split(r" {3,}", line)[0] for line in block.strip().splitlines()]
    return [set(line.split()) for line in lines]


def test_each_decision_has_a_number_of_its_own() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    numbers = [int(page.name[:4]) for page in pages]
    assert len(set(numbers)) == len(numbers)
    for page, number in zip(pages, numbers, strict=True):
        assert page.read_text(encoding="utf-8").startswith(f"# {number}. ")


def test_every_line_of_the_log_is_told() -> None:
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    events = {
        first.value
        for path in PACKAGE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in {"info", "warning", "error", "exception"}
        and ast.unparse(call.func.value).endswith("logger")
        for first in call.args[:1]
        if isinstance(first, ast.Constant)
    }
    assert len(events) > 10  # else this finds nothing any more
    assert {event for event in events if f"`{event.partition(':')[0]}" not in page} == set()


def test_every_reason_has_a_case_of_conformance() -> None:
    cases = (ROOT / "tests" / "conformance" / "cases.yaml").read_text(encoding="utf-8")
    contract = (ROOT / "protos/tokenwire/v1/error_reason.proto").read_text(encoding="utf-8")
    reasons = set(re.findall(r"^  ERROR_REASON_(\w+) = [1-9]", contract, flags=re.MULTILINE))
    assert len(reasons) > 20
    # Their clients end these two calls themselves, most often: the cases look at the code.
    reasons -= {"DEADLINE_EXCEEDED", "CANCELLED"}
    assert {reason for reason in reasons if f'"reason": "{reason}"' not in cases} == set()
