"""Runs atheris over the targets, each in a process of its own, for a stated time.

`python -m fuzz.campaign SECONDS [TARGET ...]`; with TARGET alone in a process of its own it is
`python -m fuzz.campaign --one TARGET FOLDER SECONDS`. What breaks a target is written to
build/fuzz and named.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOUND = ROOT / "build/fuzz"


def fuzz(target: str, folder: Path) -> None:
    """Fuzzes one target until libFuzzer's options end it; never returns."""
    import atheris

    with atheris.instrument_imports(include=["tokenwire_service.upstream"]):
        from fuzz.targets import TARGETS

    atheris.Setup([sys.argv[0], str(folder), *sys.argv[4:]], TARGETS[target])
    atheris.Fuzz()


def run(target: str, seconds: int, *, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """One target in a process of its own, starting from its seeds. Exit code 0: it held."""
    from fuzz.seeds import seeds

    folder = FOUND / target
    folder.mkdir(parents=True, exist_ok=True)
    for data in seeds(target):
        (folder / hashlib.sha1(data).hexdigest()).write_bytes(data)
    options = [
        f"-max_total_time={seconds}",
        f"-artifact_prefix={FOUND}/broken-{target}-",
        *("-max_len=4096", "-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1"),
        *([f"-seed={seed}"] if seed else []),
    ]
    return subprocess.run(
        [sys.executable, "-m", "fuzz.campaign", "--one", target, str(folder), *options],
        cwd=ROOT / "tests",
        stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=seconds + 120,
    )


def main(arguments: Iterable[str]) -> int:
    """Every target for so many seconds, after every cut of every long SSE case; 1 if any broke."""
    from corpus.test_sse_corpus import literal_splits, read_cases
    from fuzz.targets import TARGETS

    seconds, *targets = arguments
    broken = 0
    if not targets:
        splits = sum(literal_splits(case) for case in read_cases())
        sys.stdout.write(f"SSE cases: {splits} cuts in two, all the same\n")
    for target in targets or TARGETS:
        done = run(target, int(seconds))
        stats = [line for line in done.stdout.splitlines() if "number_of_executed" in line]
        state = "held" if done.returncode == 0 else "BROKEN"
        sys.stdout.write(f"{target}: {state} {' '.join(stats)}\n")
        if done.returncode:
            broken = 1
            sys.stdout.write(done.stdout[-4000:])
        sys.stdout.flush()
    return broken


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        fuzz(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(main(sys.argv[1:]))
