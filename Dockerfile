# generate in a container: nothing is fetched when it runs, and nobody in it is root.
#
#   docker build -t duotok .                             for CPUs
#   docker build -t duotok --build-arg DEVICE=cu128 .    for NVIDIA cards; run with --gpus all
#   docker build --target test .                         runs the tests
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/songs" duotok --vocal song.wav --out out
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS checkout
ARG DEVICE=cpu
ENV PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/${DEVICE} PIP_NO_CACHE_DIR=1
RUN useradd --create-home band && install -d -o band /opt/duotok
USER band
WORKDIR /opt/duotok
COPY --chown=band . .
RUN python3 -m venv .venv && .venv/bin/pip install -q . && .venv/bin/generate --vocal examples/vocal.wav --out out

FROM checkout AS test
RUN python3 -m venv .venv-test && .venv-test/bin/pip install -q -e '.[test]' && .venv-test/bin/python -m pytest

FROM python:${PYTHON}-slim
RUN useradd --create-home band
COPY --from=checkout /opt/duotok/.venv /opt/duotok/.venv
# Whoever --user names has a place for caches.
ENV PATH=/opt/duotok/.venv/bin:$PATH HOME=/tmp
USER band
WORKDIR /songs
ENTRYPOINT ["generate"]
CMD ["--help"]
