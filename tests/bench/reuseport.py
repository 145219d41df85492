"""How evenly Linux divides connections among processes that listen on one port.

`PYTHONPATH=tests python -m bench.reuseport`: why a gateway is one process (docs/operations.md).
"""

from __future__ import annotations

import contextlib
import socket
import statistics

TRIALS = 300


def busiest(processes: int, connections: int) -> float:
    """The share of the connections that the busiest listener has, by SO_REUSEPORT."""
    with contextlib.ExitStack() as stack:
        listeners: list[socket.socket] = []
        port = 0
        for _ in range(processes):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(("127.0.0.1", port))
            port = listener.getsockname()[1]
            listener.listen(connections)
            listener.setblocking(False)
            listeners.append(listener)
        for _ in range(connections):
            stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        return max(map(_accepted, listeners)) / connections


def _accepted(listener: socket.socket) -> int:
    count = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()
            count += 1
    return count


def main() -> None:
    """Prints a table: median, and the worst of ten."""
    print("| processes | connections | the busiest has | in one of ten | even would be |")
    print("| --- | --- | --- | --- | --- |")
    for processes in (2, 4):
        for connections in (2, 4, 8, 16, 64):
            shares = sorted(busiest(processes, connections) for _ in range(TRIALS))
            median, tenth = statistics.median(shares), shares[TRIALS * 9 // 10]
            cells = (
                processes,
                connections,
                f"{median:.0%}",
                f"{tenth:.0%}",
                f"{1 / processes:.0%}",
            )
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
