"""`tokenwire keys`: the keys of a running gateway, as a table or as JSON."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToJson

from tokenwire.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from tokenwire_service.settings import DEFAULT_ADMIN

SECONDS = 5.0  # to answer; it takes milliseconds
# Of a channel to the admin port. A proxy of the environment leads away from this machine.
OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1))

_HEAD = ("KEY", "STATE", "GROUP", "RUNNING", "ATTEMPTS", "OK", "FAULTS", "LEFT", "TOKENS", "USED")
_RIGHT = frozenset({"RUNNING", "ATTEMPTS", "OK", "LEFT", "TOKENS"})
_SCOPES = {
    admin_service_pb2.CLOSURE_SCOPE_KEY: "the key",
    admin_service_pb2.CLOSURE_SCOPE_KEY_MODEL: "the key, for {}",
    admin_service_pb2.CLOSURE_SCOPE_GROUP: "its quota group",
    admin_service_pb2.CLOSURE_SCOPE_GROUP_MODEL: "its quota group, for {}",
    admin_service_pb2.CLOSURE_SCOPE_UPSTREAM: "the upstream",
    admin_service_pb2.CLOSURE_SCOPE_UPSTREAM_MODEL: "the upstream, for {}",
}


def run_keys(
    target: str | None,
    *,
    as_json: bool,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Asks and prints; returns the exit code: 0, or 1 with one line on `stderr`."""
    stdout, stderr = stdout or sys.stdout, stderr or sys.stderr
    target = target or DEFAULT_ADMIN
    try:
        listing = _ask(target)
    except grpc.RpcError as error:
        stderr.write(f"tokenwire keys: {explained(error, target)}\n")
        return 1
    if as_json:
        text = MessageToJson(listing, always_print_fields_with_no_presence=True)
    else:
        text = "\n".join(table(listing))
    try:
        stdout.write(text + "\n")
        stdout.flush()
    except BrokenPipeError:
        # The reader has gone, as after `| head`. Python would complain when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        return 1
    return 0


def _ask(target: str) -> admin_service_pb2.ListKeysResponse:
    with grpc.insecure_channel(target, options=OPTIONS) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        answer: admin_service_pb2.ListKeysResponse = stub.ListKeys(
            admin_service_pb2.ListKeysRequest(), timeout=SECONDS
        )
        return answer


def unreachable(target: str) -> str:
    """Why nobody may answer there."""
    return (
        f"no gateway answers at {target}: is it running, on this machine, with admin.listen "
        "there? --target takes another address"
    )


def explained(error: grpc.RpcError, target: str) -> str:
    """One sentence for people."""
    code = error.code()
    if code is grpc.StatusCode.UNAVAILABLE:
        return unreachable(target)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return (
            f"what answers at {target} does not know the question: that may be the port for "
            "callers, --target takes that of admin.listen"
        )
    return _plain(f"{target} answered {code.name}: {error.details()}")


def configuration(gateway: admin_service_pb2.Gateway) -> Iterator[str]:
    """Which one is in force, where it has changed, and what is wrong with its file now."""
    if gateway.config_problem:
        problems = gateway.config_problem.splitlines()
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        yield _plain(
            f"configuration {gateway.config_generation} stays in force, its file is refused: "
            f"{problems[0]}{more}"
        )
    elif gateway.config_generation > 1:
        yield f"configuration {gateway.config_generation}"


def table(listing: admin_service_pb2.ListKeysResponse) -> Iterator[str]:
    """Lines for people: the gateway, then each upstream with its keys."""
    gateway = listing.gateway
    draining = ", draining" if gateway.draining else ""
    yield (
        f"gateway {gateway.version}, up {duration(gateway.uptime)}{draining}: "
        f"{gateway.in_flight} of {gateway.slots} slots, {gateway.queued} queued, "
        f"retry budget {gateway.retry_budget:.1f}"
    )
    yield from configuration(gateway)
    for upstream in listing.upstreams:
        yield ""
        yield (
            f"upstream {upstream.name}: {upstream.in_flight} of {upstream.slots} slots, "
            f"{upstream.queued} queued, {upstream.waiting} waiting for a key, "
            f"keys set {_times(upstream.keys_generation)}"
        )
        for closure in upstream.closures:
            yield f"  {closed(closure)}"
        lines = _aligned([_HEAD, *map(_row, upstream.keys)])
        yield f"  {next(lines)}"
        for key, line in zip(upstream.keys, lines, strict=True):
            yield f"  {line}"
            for closure in key.closures:
                yield f"    {closed(closure)}"
            if key.counters.HasField("last_fault"):
                yield f"    last fault {_last(key.counters.last_fault)}"
        for group in upstream.quota_groups:
            if group.HasField("concurrency_limit"):
                yield (
                    f"  quota group {group.quota_group}, for {_model(group.model)}: "
                    f"{group.in_flight} running, bears {math.floor(group.concurrency_limit)}"
                )
    for file in listing.key_files:
        if file.problem:
            yield ""
            yield (
                f"key file {_plain(file.path)}: {file.problem}; its last good keys stay "
                f"({', '.join(file.upstreams)})"
            )


def _row(key: admin_service_pb2.Key) -> tuple[str, ...]:
    counts = key.counters
    faults = " ".join(f"{each.fault}:{each.count}" for each in counts.faults)
    used = f"{duration(counts.last_used_ago)} ago" if counts.HasField("last_used_ago") else "never"
    return (
        key.id,
        state(key.state),
        key.quota_group,
        str(key.in_flight),
        str(counts.attempts),
        str(counts.successes),
        faults or "-",
        str(counts.abandoned),
        str(counts.prompt_tokens + counts.completion_tokens),
        used,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(_HEAD, row, widths, strict=True)
        )
        yield "  ".join(cells).rstrip()


def closed(closure: admin_service_pb2.Closure) -> str:
    """What is closed, for how long, and why."""
    scope = _SCOPES.get(closure.scope, "something").format(_model(closure.model))
    until = ""
    if closure.HasField("opens_in") and closure.opens_in.ToNanoseconds() > 0:
        until = f" for {duration(closure.opens_in)}"
    return f"{state(closure.state)}{until}: {scope} ({closure.fault or 'unknown'})"


def _last(fault: admin_service_pb2.LastFault) -> str:
    facts = (fault.fault, str(fault.http_status or ""), fault.upstream_code)
    return f"{_plain(' '.join(filter(None, facts)))}, {duration(fault.ago)} ago"


def state(number: admin_service_pb2.KeyState.ValueType) -> str:
    """In words."""
    name = admin_service_pb2.KeyState.Name(number)
    return name.removeprefix("KEY_STATE_").lower().replace("_", " ")


def _model(name: str) -> str:
    return _plain(name) or "the list of models"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def duration(span: Duration) -> str:
    """In the two largest units: `4.2s`, `3m 5s`, `2h 10m`, `4d 3h`."""
    seconds = span.ToNanoseconds() / 1e9
    if seconds < 60:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // smaller}{name}"
    return f"{whole // 60}m {whole % 60}s"


def _plain(text: str) -> str:
    """Model names come from callers, and a terminal obeys escape codes."""
    return "".join(char if char.isprintable() else "?" for char in text)
