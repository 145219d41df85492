"""What Linux says of processes and cores: CPU, memory, who else used a core."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from bench import interpreter

_TICKS = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def tree(root: int) -> list[int]:
    """A process and all that descend from it, as far as they live."""
    found, ahead = [], [root]
    while ahead:
        pid = ahead.pop()
        try:
            threads = list((PROC / str(pid) / "task").iterdir())
            ahead += [int(child) for t in threads for child in (t / "children").read_text().split()]
        except OSError:
            continue  # it ended
        found.append(pid)
    return found


def cpu_seconds(root: int) -> float:
    """User and system time of a process and all that descend from it, also of those that ended."""
    ticks = 0
    for pid in tree(root):
        try:
            fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime: proc(5)
    return ticks / _TICKS


def pss_mib(root: int) -> float:
    """Memory of a process and all that descend from it, shared pages divided among their users."""
    kib = 0
    for pid in tree(root):
        try:
            rollup = (PROC / str(pid) / "smaps_rollup").read_text()
        except OSError:
            continue
        kib += int(rollup.partition("\nPss:")[2].split()[0])
    return kib / 1024


def core_busy_seconds(core: int) -> float:
    """What a core has worked for processes, any of them, and for other machines on its host."""
    for line in (PROC / "stat").read_text().splitlines():
        if line.startswith(f"cpu{core} "):
            user, nice, system, _idle, _iowait, _irq, _softirq, steal = map(int, line.split()[1:9])
            return (user + nice + system + steal) / _TICKS
    raise LookupError(f"no core {core}")


@dataclass(frozen=True)
class Usage:
    """What a process tree used, on the core it is pinned to, in a time. Seconds."""

    wall: float
    cpu: float
    core_busy: float

    @property
    def foreign_share(self) -> float:
        """The share of the time in which the core worked for others, 0 to 1."""
        return max(0.0, self.core_busy - self.cpu) / self.wall if self.wall else 0.0


class Meter:
    """Between its making and `read`."""

    def __init__(self, root: int, core: int, now: float) -> None:
        self._root, self._core, self._began = root, core, now
        self._cpu, self._busy = cpu_seconds(root), core_busy_seconds(core)

    def read(self, now: float) -> Usage:
        """What was used since."""
        return Usage(
            now - self._began,
            cpu_seconds(self._root) - self._cpu,
            core_busy_seconds(self._core) - self._busy,
        )


def scheduling(pid: int) -> str:
    """Its policy, such as SCHED_OTHER."""
    names = ("SCHED_OTHER", "SCHED_BATCH", "SCHED_IDLE", "SCHED_FIFO", "SCHED_RR")
    number = os.sched_getscheduler(pid)
    return next((n for n in names if getattr(os, n, None) == number), str(number))


def description() -> dict[str, str]:
    """This machine, for whoever compares figures."""
    cpu = (PROC / "cpuinfo").read_text()
    model = next((x for x in cpu.splitlines() if x.startswith("model name")), ":unknown")
    memory = (PROC / "meminfo").read_text().split()[1]
    return {
        "cpu": model.partition(":")[2].strip(),
        "cores": str(os.cpu_count()),
        "memory": f"{int(memory) / 2**20:.0f} GiB",
        "kernel": platform.release(),
        "python": interpreter.description(),
    }
