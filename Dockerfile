# The gateway as an image: `docker build -t tokenwire .`
#
# It is made from nothing: Python, the gateway and the shared libraries that they load. There is no
# shell in it, no package manager and no other program. docs/kubernetes.md tells more.
#
# The base only builds. It is an argument, so that it can be one's own: any image with CPython 3.11 or
# newer, pip and glibc. The digest is that of all platforms, of 19 September 2026, as the Docker
# Official Images record it (docker-library/repo-info, repos/python/remote/3.11-slim-bookworm.md).
ARG BASE=python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS build
WORKDIR /build
COPY service/requirements.txt ./
RUN python -m venv /app \
 && /app/bin/python -m pip install --no-cache-dir --no-compile --require-hashes --no-deps -r requirements.txt
# Both packages are pure Python and need no build.
COPY clients/python/src/tokenwire packages/tokenwire
COPY service/tokenwire_service packages/tokenwire_service
COPY deploy/image/assemble.py ./
# What every file is dated, in seconds since 1970, so that the same sources give the same layer.
ARG SOURCE_DATE_EPOCH=0
RUN PYTHONHASHSEED=0 python assemble.py --packages packages --root /root-of-image --date "${SOURCE_DATE_EPOCH}"

FROM scratch
COPY --from=build /root-of-image /
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=""
LABEL org.opencontainers.image.title="tokenwire" \
      org.opencontainers.image.description="A gRPC gateway for LLM chat" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE}"
USER 65532:65532
# The linter takes the first half of the name for a token.
# hadolint ignore=DL3064
ENV PATH=/app/bin \
    LANG=C.UTF-8 \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENWIRE_LISTEN=0.0.0.0:50051
EXPOSE 50051
STOPSIGNAL SIGTERM
ENTRYPOINT ["tokenwire"]
CMD ["serve"]
