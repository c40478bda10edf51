# Two targets: `operator` (no torch) and `trainer`. Any base with Python >= 3.11 serves:
#   docker build --target operator -t qlora-operator .
# The tag follows Debian's security updates; a release looks up its digest and pins BASE by it, one for all its images.
# Write a digest here only if you looked it up: docker buildx imagetools inspect python:3.12-slim-bookworm
ARG BASE=python:3.12-slim-bookworm

# Packages in one layer, uv gone at its end: a second stage would only store 6 GB of them twice.
# Importing writes bytecode for what is used; all of the Kubernetes client's would add 50 MB.
# UV_NO_CACHE: uv's cache would stay in the layer beside what is installed from it; a build that mounts it says false.
FROM ${BASE} AS operator-packages
ARG UV_NO_CACHE=true
COPY requirements/build.txt /opt/build.txt
COPY requirements/operator.txt /opt/requirements.txt
RUN python3 -m venv --without-pip /opt/qlora \
 && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet --require-hashes -r /opt/build.txt \
 && UV_LINK_MODE=copy /opt/uv/bin/uv pip install --quiet --python /opt/qlora/bin/python3 \
      --require-hashes -r /opt/requirements.txt \
 && rm -rf /opt/uv \
 && /opt/qlora/bin/python3 -c "import aiohttp.web, kopf, kubernetes.aio.client, kubernetes.aio.dynamic, prometheus_client"

FROM ${BASE} AS trainer-packages
ARG UV_NO_CACHE=true
COPY requirements/build.txt /opt/build.txt
COPY requirements/trainer.txt /opt/requirements.txt
RUN python3 -m venv --without-pip /opt/qlora \
 && python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet --require-hashes -r /opt/build.txt \
 && UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1 /opt/uv/bin/uv pip install --quiet --python /opt/qlora/bin/python3 \
      --require-hashes -r /opt/requirements.txt \
 && rm -rf /opt/uv

FROM operator-packages AS operator
COPY operator/qlora_api /opt/qlora-operator/qlora_api
COPY operator/qlora_planner /opt/qlora-operator/qlora_planner
COPY operator/qlora_operator /opt/qlora-operator/qlora_operator
COPY requirements/sbom.py /opt/sbom.py
COPY LICENSE /opt/qlora-operator/LICENSE
RUN /opt/qlora/bin/python3 /opt/sbom.py qlora-operator > /opt/qlora-operator/sbom.cdx.json
# USER: kopf asks for a user's name, and an arbitrary uid has none in /etc/passwd.
ENV PATH=/opt/qlora/bin:$PATH PYTHONPATH=/opt/qlora-operator PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 USER=qlora
USER 65532:65532
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="qlora-operator" \
      org.opencontainers.image.description="Kubernetes operator that runs QLoRAJobs: it prepares, plans, trains, evaluates and publishes adapters." \
      org.opencontainers.image.authors="qlora-operator contributors" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENTRYPOINT ["python3", "-m", "qlora_operator"]

FROM trainer-packages AS trainer
COPY operator/qlora_api /opt/qlora-operator/qlora_api
COPY trainer_image/qlora_trainer /opt/qlora-operator/qlora_trainer
COPY requirements/sbom.py /opt/sbom.py
COPY LICENSE /opt/qlora-operator/LICENSE
RUN /opt/qlora/bin/python3 /opt/sbom.py qlora-trainer > /opt/qlora-operator/sbom.cdx.json
# Writable paths are the pod's: a training pod has a read-only root and an emptyDir at /work. USER: torch names its
# caches after the user, and an arbitrary uid has no name in /etc/passwd.
ENV PATH=/opt/qlora/bin:$PATH PYTHONPATH=/opt/qlora-operator PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    PYTHONNOUSERSITE=1 PYTHONSAFEPATH=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false USER=qlora
USER 65532:65532
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="qlora-trainer" \
      org.opencontainers.image.description="Prepares, trains, evaluates and publishes one QLoRA adapter; started by qlora-operator." \
      org.opencontainers.image.authors="qlora-operator contributors" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
ENTRYPOINT ["python3", "-m", "qlora_trainer"]
