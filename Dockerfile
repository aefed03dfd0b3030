# `make demo` on a CUDA base:
#   docker build -t dtrain .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/runs:/dtrain/runs" dtrain
# Without GPUs leave out --gpus: the demo then trains on two CPU ranks. Any other command goes after the image's name:
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -w /work dtrain dtrain doctor
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# devel: DeepSpeed compiles some of its operators when they are first used. gcc and Python's headers are for them too.
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        build-essential git python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /dtrain
# The packages first: a change of the code does not install them again.
COPY pyproject.toml constraints.txt README.md LICENSE Makefile ./
COPY dtrain/__init__.py dtrain/__init__.py
RUN make setup

COPY . .
RUN touch .venv/ready
ENV PATH=/dtrain/.venv/bin:$PATH
CMD ["make", "demo"]
