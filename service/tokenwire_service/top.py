"""`tokenwire top`: a running gateway, live in the terminal."""

from __future__ import annotations

import math
import sys
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import TextIO

import grpc
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenwire.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from tokenwire_service import keytable
from tokenwire_service.settings import DEFAULT_ADMIN

Second = admin_service_pb2.Second

_KEPT = 300  # seconds
_MINUTE = 60  # seconds that rates and times are told of
_BARS = " ▁▂▃▄▅▆▇█"
_STATE_STYLES = {
    admin_service_pb2.KEY_STATE_READY: "green",
    admin_service_pb2.KEY_STATE_RETIRED: "bold red",
    admin_service_pb2.KEY_STATE_COOLING: "yellow",
}
_COLUMNS = ("KEY", "STATE", "RUNNING", "ATTEMPTS", "TOKENS", "FAULTS", "WHY")
_NUMBERS = frozenset({"RUNNING", "ATTEMPTS", "TOKENS"})


def run_top(
    target: str | None,
    *,
    interval: float,
    once: bool,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Shows until Ctrl-C or the gateway's end; returns the exit code: 0, or 1 with one line on
    `stderr`. `once`: one view, as plain text. `interval`: seconds."""
    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    target = target or DEFAULT_ADMIN
    request = admin_service_pb2.WatchStatusRequest()
    request.interval.FromNanoseconds(int(interval * 1e9))
    console = Console(file=stdout, highlight=False)
    seconds: deque[Second] = deque(maxlen=_KEPT)
    try:
        with grpc.insecure_channel(target, options=keytable.OPTIONS) as channel:
            grpc.channel_ready_future(channel).result(keytable.SECONDS)
            calls = admin_service_pb2_grpc.AdminServiceStub(channel).WatchStatus(request)
            if once:
                status = next(calls)
                console.print(view(status.listing, status.seconds, console.width))
                return 0
            with Live(console=console, screen=True, auto_refresh=False) as live:
                for status in calls:
                    seconds.extend(status.seconds)
                    live.update(
                        view(status.listing, seconds, console.width, console.height), refresh=True
                    )
    except KeyboardInterrupt:
        return 0
    except grpc.FutureTimeoutError:
        stderr.write(f"tokenwire top: {keytable.unreachable(target)}\n")
        return 1
    except grpc.RpcError as error:
        if seconds and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
            stderr.write(f"tokenwire top: the gateway at {target} has ended\n")
        else:
            stderr.write(f"tokenwire top: {keytable.explained(error, target)}\n")
        return 1
    return 0


def view(
    listing: admin_service_pb2.ListKeysResponse,
    seconds: Sequence[Second],
    width: int,
    height: int | None = None,
) -> RenderableType:
    """All of it, as wide as `width` columns; what exceeds `height` lines is left out, and said."""
    parts: list[RenderableType] = [*_head(listing.gateway, list(seconds), width)]
    room = math.inf if height is None else height - len(parts)  # lines
    for number, upstream in enumerate(listing.upstreams):
        head = [
            Text(),
            _line(
                f"{upstream.name}  {upstream.in_flight} of {upstream.slots} slots, "
                f"{upstream.queued} queued, {upstream.waiting} waiting for a key",
                "bold",
            ),
            *(_line(f"  {keytable.closed(each)}", "yellow") for each in upstream.closures),
        ]
        further = len(listing.upstreams) - number - 1
        lines = len(head) + 1 + len(upstream.keys)  # 1: the names of the columns
        if lines + (1 if further else 0) <= room:
            parts += [*head, _keys(upstream.keys)]
            room -= lines
            continue
        shown = int(room) - len(head) - 2  # and a line for what is left out
        if shown >= 1:
            parts += [*head, _keys(upstream.keys[:shown])]
            left = f"{len(upstream.keys) - shown} more keys, {further} more upstreams"
        else:
            left = f"{further + 1} more upstreams"
        parts.append(_line(f"  {left}: a higher window shows more, tokenwire keys all", "dim"))
        break
    return Group(*parts)


def _head(
    gateway: admin_service_pb2.Gateway, seconds: Sequence[Second], width: int
) -> Iterable[Text]:
    minute = list(seconds)[-_MINUTE:]
    span = max(1, len(minute))
    yield _line(
        f"tokenwire {gateway.version}  up {keytable.duration(gateway.uptime)}"
        + ("  DRAINING" if gateway.draining else ""),
        "bold",
    )
    yield _line(
        f"{gateway.in_flight} of {gateway.slots} slots, {gateway.queued} queued, "
        f"retry budget {gateway.retry_budget:.1f}"
    )
    for line in keytable.configuration(gateway):
        yield _line(line, "yellow" if gateway.config_problem else "")
    times = [each for each in minute if each.HasField("first_text_p50")]
    middle = sorted(each.first_text_p50.ToNanoseconds() / 1e6 for each in times)
    worst = max((each.first_text_p99.ToNanoseconds() / 1e6 for each in times), default=0.0)
    facts = (
        ("calls running", [each.in_flight for each in seconds], f"{gateway.in_flight}"),
        (
            "calls ended/s",
            [each.succeeded + each.left + _total(each.failed) for each in seconds],
            f"{sum(each.succeeded for each in minute) / span:.1f} OK, "
            f"{sum(_total(each.failed) for each in minute) / span:.1f} failed, "
            f"{sum(each.left for each in minute) / span:.1f} left",
        ),
        (
            "deltas/s",
            [each.deltas for each in seconds],
            f"{sum(each.deltas for each in minute) / span:.1f}",
        ),
        (
            "first text, ms",
            [each.first_text_p50.ToNanoseconds() // 1_000_000 for each in seconds],
            f"median {middle[len(middle) // 2]:.0f}, worst p99 {worst:.0f}" if middle else "none",
        ),
        (
            "retries/s",
            [each.retries for each in seconds],
            f"{sum(each.retries for each in minute) / span:.1f}",
        ),
    )
    for name, values, told in facts:
        bars = sparkline(values, max(0, min(60, width - 50)))
        yield _line(f"{name:15} {bars}  {told}")
    failed: Counter[str] = Counter()
    for each in minute:
        failed.update({found.reason: found.count for found in each.failed})
    if failed:
        told = ", ".join(f"{reason} {count}" for reason, count in failed.most_common(6))
        yield _line(f"failed in the last minute: {told}", "red")


def _total(counts: Iterable[admin_service_pb2.ReasonCount]) -> int:
    return sum(each.count for each in counts)


def _line(text: str, style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _keys(keys: Iterable[admin_service_pb2.Key]) -> Table:
    rows = [_row(key) for key in keys]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, *cells in zip(_COLUMNS, *rows, strict=True):
        # What is too wide for the window is cut where it tells least: at the end, and in words.
        least = None if name in ("FAULTS", "WHY") else max(len(name), *map(len, cells), 0)
        table.add_column(
            name, justify="right" if name in _NUMBERS else "left", no_wrap=True, min_width=least
        )
    for row in rows:
        table.add_row(*row)
    return table


def _row(key: admin_service_pb2.Key) -> tuple[Text, ...]:
    counts = key.counters
    return (
        Text(f"  {key.id}"),
        Text(keytable.state(key.state), style=_STATE_STYLES.get(key.state, "")),
        Text(str(key.in_flight)),
        Text(str(counts.attempts)),
        Text(str(counts.prompt_tokens + counts.completion_tokens)),
        Text(
            " ".join(f"{each.fault}:{each.count}" for each in counts.faults) or "-",
            overflow="ellipsis",
        ),
        Text("; ".join(keytable.closed(each) for each in key.closures) or "-", overflow="ellipsis"),
    )


def sparkline(values: Sequence[float], width: int) -> str:
    """The last `width` values as bars, the highest of them full; blank where there are none yet."""
    shown = list(values)[-width:] if width else []
    most = max(shown, default=0)
    bars = (
        _BARS[0] if value <= 0 else _BARS[max(1, round(value / most * (len(_BARS) - 1)))]
        for value in shown
    )
    return "".join(bars).rjust(width)
