"""Runs worlds: many on all cores with a report, or one seed again with the story of its breaches.

make simulate                     as many as CI does
make simulate SEEDS=0:20          only these
make simulate SEED=7              one, and the history of every call that a breach names
make simulate SEED=7 CALL=c12     one, and the history of that call

Worlds of replicas that share limits are others (replicas.py): make simulate SHARED=7, SHARED=0:20
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from simulation.history import OK, PLACES, History
from simulation.judge import judge
from simulation.replicas import FAULTS
from simulation.replicas import World as SharedWorld
from simulation.sharing_judge import calm, judge_shared, known_elsewhere
from simulation.vtime import run
from simulation.world import World

from tokenwire_service.errors import CODES, Fault
from tokenwire_service.errors import reasons as reason_numbers

SEEDS = range(255)
SIZE = 4000  # calls in each world
LEAST = 100  # how often everything must have been met in all of them
SHARED_SEEDS = range(32)
SHARED_SIZE = 1000

# Every reason of the contract that a chat can end with where callers are not known. INTERNAL is a
# defect, and no world may see one.
_NEVER = (
    "CALLER_UNAUTHENTICATED",
    "CALLER_FORBIDDEN",
    "CALLER_QUOTA_EXCEEDED",
    "TOKENIZER_UNAVAILABLE",
    "INTERNAL",
)
REASONS = tuple(
    name
    for name in (
        reason_numbers.ErrorReason.Name(number).removeprefix("ERROR_REASON_") for number in CODES
    )
    if name not in _NEVER
)


@dataclass
class Summary:
    """What came of one world, or of several."""

    worlds: int = 0
    calls: int = 0
    virtual_seconds: float = 0.0
    broken: list[str] = field(default_factory=list)
    met: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, name)
    digests: dict[int, str] = field(default_factory=dict)  # by seed

    def add(self, other: Summary) -> None:
        """Takes in what came of others."""
        self.worlds += other.worlds
        self.calls += other.calls
        self.virtual_seconds += other.virtual_seconds
        self.broken += other.broken
        self.met.update(other.met)
        self.digests.update(other.digests)


# What must be met, by kind.
TO_MEET: dict[str, tuple[str, ...]] = {
    "outcome": (OK, *REASONS),
    "fault": tuple(fault.value for fault in Fault),
    "cancelled": PLACES,
    "method": ("chat", "stream", "cumulative", "item"),
    "event": (
        "reload",
        "stall",
        "drain",
        "cut off at the end of the drain",
        "slow reader",
        "retry answered",
        "fallback answered",
        "account of another tier answered",
        "key that has the model answered",
        "stream made a whole answer",
        "whole answer made a stream",
    ),
}


def tell(seed: int, size: int = SIZE, *, clock_jumps: bool = True) -> History:
    """The history of one world."""
    collecting = gc.isenabled()
    gc.disable()  # what a world makes lives as long as the world
    try:
        return run(World(seed, size, clock_jumps=clock_jumps).run())
    finally:
        if collecting:
            gc.enable()


def summarize(seed: int, size: int = SIZE) -> Summary:
    """One world, judged."""
    history = tell(seed, size)
    summary = Summary(1, len(history.calls), max(c.ended for c in history.calls) - history.began)
    summary.broken = [f"seed {seed}: {each}" for each in judge(history)]
    summary.digests[seed] = digest(history)
    met = summary.met
    for call in history.calls:
        met["outcome", call.outcome] += 1
        met["method", call.method] += 1
        if call.left_at is not None:
            met["cancelled", call.left_in] += 1
        for request in call.requests:
            if request.fault is not None:
                met["fault", request.fault.fault.value] += 1
        if call.outcome == OK:
            met["event", "retry answered"] += len(call.requests) > 1
            model = call.requests[-1].lease.model
            before = {
                request.fault.fault
                for request in call.requests[:-1]
                if request.fault is not None and request.lease.model == model
            }
            met["event", "fallback answered"] += model != call.models[0]
            met["event", "account of another tier answered"] += Fault.OVER_TIER in before
            met["event", "key that has the model answered"] += Fault.MODEL_NOT_FOUND in before
            met["event", "stream made a whole answer"] += call.folded and not call.kinds
            met["event", "whole answer made a stream"] += call.folded and bool(call.kinds)
        cut_off = call.outcome == "GATEWAY_DRAINING" and not call.while_draining
        met["event", "cut off at the end of the drain"] += cut_off
        met["event", "slow reader"] += call.slow
    met["event", "reload"] += history.reloads
    met["event", "stall"] += len(history.stalls)
    met["event", "drain"] += bool(history.drained_at < 1e300)
    del history
    gc.collect()  # see `tell`
    return summary


# The same of worlds of replicas.
SHARED_TO_MEET: dict[str, tuple[str, ...]] = {
    "outcome": ("OK", "CALLER_QUOTA_EXCEEDED", "GATEWAY_OVERLOADED", "RATE_LIMITED", "CANCELLED"),
    "fault": FAULTS,
    "event": (
        "admitted while Redis was away",
        "admitted within a minute of that, with it",
        "reservation without an answer",
        "closed key left alone by another",
    ),
}


def summarize_shared(seed: int, size: int = SHARED_SIZE) -> Summary:
    """One world of replicas, judged."""
    history = run(SharedWorld(seed, size).run())
    rpcs, met = history.rpcs, Counter[tuple[str, str]]()
    for rpc in rpcs:
        met["outcome", rpc.outcome] += 1
        away = [(began, ended) for began, ended in history.away[rpc.replica] if began > 0]
        at = rpc.admitted_at
        met["event", "admitted while Redis was away"] += any(a < at < b for a, b in away)
        met["event", "admitted within a minute of that, with it"] += any(
            at - 60 < b < at for _, b in away
        ) and calm(history, at, at)
    for _, kind in history.faults:
        met["fault", kind] += 1
    met["event", "reservation without an answer"] += len(history.unheard)
    met["event", "closed key left alone by another"] += known_elsewhere(history)
    summary = Summary(1, len(rpcs), max(r.ended for r in rpcs) - min(r.began for r in rpcs))
    summary.broken = [f"seed {seed}: {each}" for each in judge_shared(history)]
    summary.met = met
    told = "\n".join(map(str, rpcs)) + f"{history.faults} {history.away}"
    summary.digests[seed] = hashlib.sha256(told.encode()).hexdigest()
    return summary


def digest(history: History) -> str:
    """Two histories that differ in anything have different ones."""
    told = hashlib.sha256()
    for call in history.calls:
        told.update(str(call).encode())
        told.update(f"{call.kinds} {call.text} {call.usage}".encode())
    for event in history.ring:
        told.update(f"{type(event).__name__} {event.at!r} {event.upstream}".encode())
    return told.hexdigest()


def on_all_cores(
    seeds: Iterable[int], size: int = SIZE, one: Callable[[int, int], Summary] = summarize
) -> Summary:
    """All these worlds, judged. Processes of their own, so that each hashes its texts otherwise:
    the same seed must run the same all the same."""
    whole = Summary()
    workers = os.process_cpu_count() if sys.version_info >= (3, 13) else os.cpu_count()
    context = multiprocessing.get_context("spawn")
    seeds = list(seeds)
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for summary in pool.map(one, seeds, [size] * len(seeds)):
            whole.add(summary)
    return whole


def report(summary: Summary, seconds: float, to_meet: dict[str, tuple[str, ...]] = TO_MEET) -> str:
    """For people: how much was simulated, what was met how often, what broke."""
    seeds = sorted(summary.digests)
    lines = [
        f"simulated {summary.calls:,} requests in {summary.worlds} worlds "
        f"(seeds {seeds[0]} to {seeds[-1]}), {summary.virtual_seconds / 3600:,.0f} h of their "
        f"time in {seconds:.0f} s: {len(summary.broken)} violations"
    ]
    for kind, names in to_meet.items():
        others = sorted({name for k, name in summary.met if k == kind} - set(names))
        lines.append(f"  {kind}:")
        lines += [f"    {name:30} {summary.met[kind, name]:>10,}" for name in (*names, *others)]
    lines += [f"  {each}" for each in summary.broken[:20]]
    if summary.broken:
        seed = summary.broken[0].split()[1].rstrip(":")
        again = f"SEED={seed}" if to_meet is TO_MEET else f"SHARED={seed}"
        lines.append(f"  again, with the calls' histories: make simulate {again}")
    return "\n".join(lines)


def story(seed: int, size: int, wanted: str = "") -> str:
    """One world again: its breaches, and the histories of the calls that they name."""
    history = tell(seed, size)
    broken = judge(history)
    names = {wanted} if wanted else set(re.findall(r"\bc\d+\b", " ".join(broken)))
    moments = [float(at) for at in re.findall(r"at (\d+\.\d+)", " ".join(broken[:3]))]
    lines = [f"seed {seed}: {len(history.calls)} calls, {len(broken)} violations", *broken]
    lines += [str(call) for call in history.calls if call.name in names]
    for event in history.ring:
        if any(abs(event.at - at) < 0.01 for at in moments):
            lines.append(f"    {event}")
    return "\n".join(lines)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="one world, told in full")
    parser.add_argument("--call", default="", help="with --seed: this call")
    parser.add_argument("--seeds", default="", help="from:to")
    parser.add_argument("--size", type=int, default=SIZE, help="calls in each world")
    parser.add_argument("--shared", default="", help="worlds of replicas: seed, or from:to")
    given = parser.parse_args()
    if given.shared:
        first, _, last = given.shared.partition(":")
        seeds = range(int(first), int(last or int(first) + 1))
        began = time.monotonic()
        summary = on_all_cores(seeds, SHARED_SIZE, summarize_shared)
        print(report(summary, time.monotonic() - began, SHARED_TO_MEET))
        return bool(summary.broken)
    if given.seed is not None:
        print(story(given.seed, given.size, given.call))
        return 0
    first, _, last = given.seeds.partition(":")
    seeds = range(int(first), int(last)) if last else SEEDS
    began = time.monotonic()
    summary = on_all_cores(seeds, given.size)
    print(report(summary, time.monotonic() - began))
    return bool(summary.broken)


if __name__ == "__main__":
    sys.exit(main())
