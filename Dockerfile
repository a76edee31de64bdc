# CPU:  docker build -t llmva .
# CUDA: docker build -t llmva --build-arg BASE=nvidia/cuda:12.6.3-runtime-ubuntu24.04 .
# Use:  docker run --rm -v "$PWD:/runs" llmva demo          (with a GPU: --gpus all)
# PIP takes options of pip, such as an index that has the build of torch for your driver, or for CPUs alone.
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG PIP=
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/llmva/bin:$PATH HF_HOME=/runs/.cache/huggingface LLMVA_CACHE=/runs/.cache/llmva
COPY . /source
RUN python3 -m venv /opt/llmva \
    && pip install --no-cache-dir ${PIP} /source \
    && rm -rf /source
WORKDIR /runs
ENTRYPOINT ["llmva"]
