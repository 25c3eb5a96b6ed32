# An image of the serving stack: for CUDA by default, for the processor with --build-arg BASE=python:3.11-slim.
ARG BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 LOGDIR=/tmp/llava
WORKDIR /app
# Where there is no GPU, answers are decoded by a C++ kernel, compiled for the processor it runs on at the first start.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY llava ./llava
# The versions that the tests run with, save for the torch that a base brings.
RUN if python -c "import torch"; then sed -i "/^torch/d" constraints.txt; fi \
    && pip install -c constraints.txt ".[serve,quant]" && useradd --create-home llava
USER llava
EXPOSE 10000 7860 40000
HEALTHCHECK --interval=30s --timeout=5s CMD python -c "import os, urllib.request as u; u.urlopen('http://127.0.0.1:%s/health' % os.environ.get('PORT', '10000'))"
ENTRYPOINT ["python", "-m"]
CMD ["llava.serve.controller", "--host", "0.0.0.0", "--port", "10000"]
