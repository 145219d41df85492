# The gateway as an image: `docker build -t tokenwire .`
# The base is an argument, so that it can be pinned by digest or replaced by one's own.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
COPY service/requirements.txt .
RUN python -m venv /app \
 && /app/bin/pip install --no-cache-dir --require-hashes --no-deps -r requirements.txt
# Both packages are pure Python and need no build.
COPY clients/python/src/tokenwire /build/packages/tokenwire
COPY service/tokenwire_service /build/packages/tokenwire_service
RUN cp -r /build/packages/. "$(/app/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
 && /app/bin/python -m compileall -q /app/lib \
 && /app/bin/pip uninstall --yes --quiet pip setuptools

FROM ${BASE}
COPY --from=build /app /app
USER 65532:65532
ENV TOKENWIRE_LISTEN=0.0.0.0:50051
EXPOSE 50051
STOPSIGNAL SIGTERM
ENTRYPOINT ["/app/bin/python", "-m", "tokenwire_service"]
CMD ["serve"]
