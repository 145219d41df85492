"""A name server with one name whose addresses change, as for a headless Service of Kubernetes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dnslib import QTYPE, RCODE, RR, A, DNSRecord
from dnslib.server import BaseResolver, DNSHandler, DNSLogger, DNSServer

NAME = "tokenwire.internal"


class Zone(BaseResolver):  # type: ignore[misc]  # no types are published for it
    """Answers with `addresses` as they are when it is asked. `asked` counts that."""

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.asked = 0
        self.target = ""  # where gRPC clients find it

    def resolve(self, request: DNSRecord, handler: DNSHandler) -> DNSRecord:
        """One answer. There are addresses of IPv4 alone."""
        reply = request.reply()
        if str(request.q.qname).rstrip(".") != NAME:
            reply.header.rcode = RCODE.NXDOMAIN
        elif request.q.qtype == QTYPE.A:
            self.asked += 1
            for address in self.addresses:
                reply.add_answer(RR(request.q.qname, QTYPE.A, rdata=A(address), ttl=0))
        return reply


def _silent(_: str) -> None:
    """What it would print."""


@contextmanager
def serving(port: int) -> Iterator[Zone]:
    """Serves it on the loopback interface. `port`: of what the addresses stand for."""
    zone = Zone()
    server = DNSServer(
        zone, address="127.0.0.1", port=0, logger=DNSLogger("", prefix=False, logf=_silent)
    )
    server.start_thread()
    number = server.server.server_address[1]
    zone.target = f"dns://127.0.0.1:{number}/{NAME}:{port}"
    try:
        yield zone
    finally:
        server.stop()
        server.server.server_close()
