"""The command line: tokenwire serve | top | keys | check-config | simulate | chat | demo.

What a subcommand needs is imported when it runs: `tokenwire --help` and `tokenwire chat` do not
load the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import sys
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenwire_service import __version__

if TYPE_CHECKING:
    from tokenwire_service.config import Config
    from tokenwire_service.reload import Source

EXIT_FAILED = 1
EXIT_USAGE = 2

_COLLECT_AT = 10_000  # objects more than there were; Python's own is 700

_SIMULATED = """
  ************************************************************************
  **  SIMULATED ANSWERS: no model is asked, every answer is made up.    **
  **  Set OPENAI_API_KEY, or name a file with --config, for real ones.  **
  ************************************************************************
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    # gRPC reads this when it is imported. Its core writes lines of its own form to stderr, about
    # what is told here as well.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from tokenwire_service import terminal

    parser = argparse.ArgumentParser(prog="tokenwire", description="A gRPC gateway for LLM chat.")
    parser.add_argument("--version", action="version", version=f"tokenwire {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the gateway")
    serve.add_argument("--config", type=Path, metavar="FILE", help="YAML file; none is needed")
    serve.add_argument("--listen", metavar="ADDR", help="host:port; default 127.0.0.1:50051")
    serve.set_defaults(run=_serve)

    top = commands.add_parser("top", help="watch a running gateway, in the terminal")
    top.add_argument(
        "--target",
        metavar="ADDR",
        help="its setting admin.listen (default: $TOKENWIRE_ADMIN or 127.0.0.1:50052)",
    )
    top.add_argument(
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="between two looks, from 0.1 to 60 (default: %(default)g)",
    )
    top.add_argument("--once", action="store_true", help="print one view and end")
    top.set_defaults(run=_top)

    keys = commands.add_parser("keys", help="show the keys of a running gateway")
    keys.add_argument(
        "--target",
        metavar="ADDR",
        help="its setting admin.listen (default: $TOKENWIRE_ADMIN or 127.0.0.1:50052)",
    )
    keys.add_argument("--json", action="store_true", help="print everything as one JSON object")
    keys.set_defaults(run=_keys)

    check = commands.add_parser("check-config", help="say what is wrong with a configuration")
    check.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="default: $TOKENWIRE_CONFIG, else only the environment is checked",
    )
    check.add_argument("--config", type=Path, metavar="FILE", help="the same")
    check.set_defaults(run=_check_config)

    simulate = commands.add_parser("simulate", help="run a made-up OpenAI-compatible upstream")
    simulate.add_argument(
        "--listen", default="127.0.0.1:8081", metavar="HOST:PORT", help="default: %(default)s"
    )
    simulate.add_argument(
        "--tokens-per-second",
        type=float,
        default=60.0,
        metavar="N",
        help="pace of an answer (default: %(default)g; 0: as fast as possible)",
    )
    simulate.set_defaults(run=_simulate)

    chat = commands.add_parser("chat", help="ask a running gateway, in the terminal")
    terminal.add_chat_arguments(chat)
    chat.set_defaults(run=terminal.run_chat)

    demo = commands.add_parser("demo", help="watch a gateway work, from start to end")
    demo.set_defaults(run=_demo)

    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    code: int = arguments.run(arguments)
    return code


def _serve(arguments: argparse.Namespace) -> int:
    from tokenwire_service.config import ConfigError, file_of, load
    from tokenwire_service.keyfiles import look_at
    from tokenwire_service.reload import Source
    from tokenwire_service.server import CutShortError, ListenError, ServerEndedError

    path = file_of(arguments.config, os.environ)

    def read() -> Config:
        return load(path, os.environ, listen=arguments.listen)

    source = None if path is None else Source(path, read, look_at(path))
    try:
        config = read()
    except ConfigError as error:
        print(*error.problems, sep="\n", file=sys.stderr)
        print("nothing was started", file=sys.stderr)
        return EXIT_USAGE
    try:
        _run(_serve_config(config, source))
    except (CutShortError, ListenError, ServerEndedError) as error:
        print(f"tokenwire: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


async def _serve_config(config: Config, source: Source | None = None) -> None:
    from tokenwire_service.server import Running, serve_until_signalled
    from tokenwire_service.simulated import with_simulator
    from tokenwire_service.telemetry import configure_logging, log_scrubber

    as_json = (config.log.format or ("text" if sys.stderr.isatty() else "json")) == "json"
    scrub = log_scrubber(key.secret for upstream in config.upstreams for key in upstream.keys)
    logger = configure_logging(config.log.level, as_json, scrub=scrub)
    for warning in config.warnings:
        logger.warning("configuration", extra={"fields": {"warning": warning}})
    if config.scheduling == "batch":
        _schedule_as_batch()
    async with AsyncExitStack() as stack:
        simulated = config.needs_simulator
        if simulated:
            config = await with_simulator(config, stack)

        def announce(running: Running) -> None:
            _settle()
            logger.info(
                "serving",
                extra={
                    "fields": {
                        "address": running.address,
                        "admin": running.admin or "off",
                        "status_page": running.page or "off",
                        "health": running.probes or "off",
                        "metrics": running.metrics or "off",
                        "upstreams": ",".join(u.name for u in config.upstreams),
                        "keys": sum(len(u.keys) for u in config.upstreams),
                    }
                },
            )
            if simulated:
                if not as_json:  # a person may be looking: one log line is easily missed
                    print(_SIMULATED, file=sys.stderr)
                logger.warning(
                    "SIMULATED ANSWERS: no OPENAI_API_KEY and no --config, so the built-in "
                    "simulator answers instead of a model"
                )

        try:
            await serve_until_signalled(config, logger, announce, scrub=scrub, source=source)
        finally:
            for handler in logger.handlers:  # before what the command itself has to say
                handler.flush()


def _top(arguments: argparse.Namespace) -> int:
    from tokenwire_service.top import run_top

    if not 0.1 <= arguments.interval <= 60:
        print("tokenwire top: --interval takes 0.1 to 60 seconds", file=sys.stderr)
        return EXIT_USAGE
    target = arguments.target or os.environ.get("TOKENWIRE_ADMIN")
    return run_top(target, interval=arguments.interval, once=arguments.once)


def _keys(arguments: argparse.Namespace) -> int:
    from tokenwire_service.keytable import run_keys

    target = arguments.target or os.environ.get("TOKENWIRE_ADMIN")
    return run_keys(target, as_json=arguments.json)


def _check_config(arguments: argparse.Namespace) -> int:
    from tokenwire_service.config import check

    return check(arguments.file or arguments.config, os.environ, sys.stdout)


def _simulate(arguments: argparse.Namespace) -> int:
    from tokenwire_service.simulator import run

    host, _, port = arguments.listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        print("tokenwire simulate: --listen takes HOST:PORT", file=sys.stderr)
        return EXIT_USAGE
    try:
        _run(run(host or "127.0.0.1", int(port), tokens_per_second=arguments.tokens_per_second))
    except (OSError, ValueError) as error:
        print(f"tokenwire simulate: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _demo(_arguments: argparse.Namespace) -> int:
    from tokenwire_service.demo import run_demo

    return run_demo(os.environ)


def _schedule_as_batch() -> None:
    """This process, with every thread that begins from here on, unless whoever started it chose a
    policy. gRPC's threads wake each other for each message: were they to pre-empt each other, too,
    there would be four times as many switches (docs/adr/0017)."""
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def _settle() -> None:
    """What is here when the gateway serves stays, so that the collector looks at it no more. A call
    leaves six objects in a cycle, grpc.aio's own: it need not run for every hundred of them, and
    with a thousand streams open it takes 30 ms and more."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AT)


def _run(main_coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs on uvloop, which costs less per message than asyncio's own loop."""
    try:
        import uvloop
    except ImportError:  # not made for Windows
        asyncio.run(main_coroutine)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main_coroutine)


if __name__ == "__main__":
    sys.exit(main())
