# Two targets: `operator` (no torch) and `trainer`. Any base with Python >= 3.11 serves:
#   docker build --target operator -t qlora-operator .
ARG BASE=python:3.12-slim-bookworm

FROM ${BASE} AS packages
# uv is needed while building only: it never reaches the final layers.
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv==0.13.9 && python3 -m venv --without-pip /opt/qlora
ENV VIRTUAL_ENV=/opt/qlora UV_NO_CACHE=1 UV_COMPILE_BYTECODE=1 UV_LINK_MODE=copy UV_PYTHON_DOWNLOADS=never

FROM packages AS operator-packages
COPY requirements/operator.txt /tmp/requirements.txt
RUN /opt/uv/bin/uv pip install --quiet --require-hashes -r /tmp/requirements.txt

FROM packages AS trainer-packages
COPY requirements/trainer.txt /tmp/requirements.txt
RUN /opt/uv/bin/uv pip install --quiet --require-hashes -r /tmp/requirements.txt

FROM ${BASE} AS operator
COPY --from=operator-packages /opt/qlora /opt/qlora
COPY operator/qlora_api /opt/qlora-operator/qlora_api
COPY operator/qlora_operator /opt/qlora-operator/qlora_operator
ENV PATH=/opt/qlora/bin:$PATH PYTHONPATH=/opt/qlora-operator PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["python3", "-m", "qlora_operator"]

FROM ${BASE} AS trainer
COPY --from=trainer-packages /opt/qlora /opt/qlora
COPY operator/qlora_api /opt/qlora-operator/qlora_api
COPY trainer_image/qlora_trainer /opt/qlora-operator/qlora_trainer
# Writable paths are the pod's: a training pod has a read-only root and an emptyDir at /work.
ENV PATH=/opt/qlora/bin:$PATH PYTHONPATH=/opt/qlora-operator PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
USER 65532:65532
ENTRYPOINT ["python3", "-m", "qlora_trainer"]
