"""The certificates of the gateway's own port, read again when their files change.

Whoever renews them replaces files (cert-manager through a mounted Secret, certbot, ...). They are
looked at on each new connection, so a renewed certificate serves from then on, and connections
that stand keep theirs. Files that cannot be used leave the last good ones in force.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

import grpc

from tokenwire_service.config import Tls


class Certificates:
    """Reads what `tls` names. Raises OSError or ssl.SSLError if it cannot be used at first.
    `problem`: why the files, as the last new connection found them, are not in force; empty where
    they are."""

    def __init__(self, tls: Tls, logger: logging.Logger) -> None:
        self.problem = ""
        self._tls = tls
        self._logger = logger
        self._read = self._contents()
        self._refused: tuple[bytes, ...] | None = None
        self._check()

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._renewed,  # type: ignore[arg-type]  # None is what it says for no change
            require_client_authentication=self._tls.client_authorities is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC before each handshake, in a thread of its own; None for no change."""
        try:
            contents = self._contents()
            if contents == self._read:
                self.problem = ""
                return None
            if contents == self._refused:
                return None
            before, self._read = self._read, contents
            try:
                self._check()
            except (OSError, ValueError):
                self._read, self._refused = before, contents
                raise
        except (OSError, ValueError) as error:
            why = str(error)
            if why != self.problem:  # whoever connects could fill the log
                fields = {"kept": "the last good ones", "why": why}
                self._logger.warning("certificates", extra={"fields": fields})
            self.problem = why
            return None
        self.problem = ""
        self._logger.info("certificates", extra={"fields": {"renewed": self._tls.certificate}})
        return self._configuration()

    def _contents(self) -> tuple[bytes, ...]:
        names = (self._tls.key, self._tls.certificate, self._tls.client_authorities)
        return tuple(Path(name).read_bytes() for name in names if name)

    def _check(self) -> None:
        """That OpenSSL takes them: gRPC would take anything, and then refuse every connection."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._tls.certificate, self._tls.key, password="")
        if self._tls.client_authorities:
            context.load_verify_locations(self._tls.client_authorities)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, *authorities = self._read
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=authorities[0] if authorities else None
        )
