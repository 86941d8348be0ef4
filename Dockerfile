# vLLM with this project's patches and kernels, on vLLM's own image. GPU (default) and CPU: docker-bake.hcl.
ARG BASE_IMAGE=vllm/vllm-openai:v0.32.0

# The package as a wheel. No network: the base image has what builds it.
FROM ${BASE_IMAGE} AS wheel
ARG SOURCE_DATE_EPOCH=0
COPY kernels/ /src/
# The wheel keeps the modes of data files, and the image its hash: a clone's umask must not show.
RUN set -eux; \
    chmod -R u=rwX,go=rX /src; \
    python3 -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --no-index --wheel-dir /wheel /src; \
    ls -l /wheel

# Kernels compiled ahead of time, without a GPU, one folder for each of KERNEL_ARCHITECTURES (sm_90a,sm_100a,…, or none).
FROM ${BASE_IMAGE} AS compiled
ARG KERNEL_ARCHITECTURES=none
COPY kernels/ /src/
COPY devtools/kernels/ /src/devtools/kernels/
RUN set -eux; \
    mkdir /compiled; \
    IFS=,; for arch in ${KERNEL_ARCHITECTURES}; do \
        [ "${arch}" = none ] || PYTHONPATH=/src python3 -B /src/devtools/kernels/compile.py "/compiled/${arch}" --arch "${arch}"; \
    done; \
    ls -l /compiled

FROM ${BASE_IMAGE}
# with it, the byte code that apply_patches writes is checked by hash: equal in every build
ARG SOURCE_DATE_EPOCH=0

# --chmod: what any user can read, and one image, whatever the umask of the clone
COPY --chmod=755 patches/ /opt/cutedsl_nvfp4/patches/
COPY --chmod=755 devtools/patches/apply.py devtools/patches/series.py /opt/cutedsl_nvfp4/devtools/patches/
COPY --chmod=755 devtools/image/register_kernels.py devtools/image/import_patched.py devtools/image/check_labels.py \
     /opt/cutedsl_nvfp4/devtools/image/
RUN set -eux; \
    python3 -B /opt/cutedsl_nvfp4/devtools/patches/apply.py; \
    python3 -B /opt/cutedsl_nvfp4/devtools/patches/apply.py --check

RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    set -eux; \
    PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore python3 -B -m pip install \
        --quiet --no-cache-dir --no-compile --no-deps --no-index /wheel/*.whl; \
    python3 -B -c 'import cutedsl_nvfp4 as c; print(c.__version__, c.__path__[0])'
COPY --from=compiled /compiled/ /opt/cutedsl_nvfp4/compiled/

# Caches, of models and of kernels compiled at run time: writable for whichever user the container runs as.
RUN mkdir -p /cache/models /cache/jit; chmod 1777 /cache/models /cache/jit; ls -ld /cache/*

# Proof: every patched module imports, our kernels stand first, the labels tell the truth.
# What importing leaves behind is not kept.
ARG VLLM_VERSION=unknown
ARG PATCHES_SHA256=unknown
ARG KERNEL_ARCHITECTURES=none
RUN set -eux; \
    export HOME=/tmp/home PYTHONDONTWRITEBYTECODE=1; \
    python3 /opt/cutedsl_nvfp4/devtools/image/import_patched.py; \
    python3 /opt/cutedsl_nvfp4/devtools/image/register_kernels.py; \
    python3 -c 'import os, sys; built = os.listdir(sys.argv[1]) or ["none"]; assert sorted(sys.argv[2].split(",")) == sorted(built), built' \
        /opt/cutedsl_nvfp4/compiled "${KERNEL_ARCHITECTURES}"; \
    python3 /opt/cutedsl_nvfp4/devtools/image/check_labels.py "${VLLM_VERSION}" "${PATCHES_SHA256}"; \
    find /tmp -mindepth 1 -delete; \
    ls -A /tmp

# What a user runs: the smoke test, which needs Python alone (`docker compose run --rm smoke`), and the tools that make
# checkpoints (docs/convert.md). Names without .py forward to those with it, for one release.
COPY --chmod=755 scripts/smoke_test.py scripts/smoke_test scripts/convert_checkpoint.py scripts/convert_checkpoint \
     scripts/calibrate_checkpoint.py scripts/calibrate_checkpoint scripts/compare_checkpoints.py \
     scripts/compare_checkpoints scripts/inspect_checkpoint.py scripts/inspect_checkpoint scripts/plan_memory.py \
     scripts/plan_memory scripts/apply_patches /opt/cutedsl_nvfp4/scripts/
COPY --chmod=755 scripts/smoke/ /opt/cutedsl_nvfp4/scripts/smoke/

# vLLM adds a plugin's HTTP routes (GET /kernels) only if the plugin is named. Kernels come from this image alone.
ENV VLLM_PLUGINS=cutedsl_nvfp4 \
    CUTEDSL_NVFP4_KERNELS=/opt/cutedsl_nvfp4/compiled \
    CUTEDSL_NVFP4_FORBID_JIT=1

ARG GIT_REVISION=unknown
LABEL org.opencontainers.image.title="vLLM with CuTe DSL NVFP4 kernels" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${GIT_REVISION}" \
      cutedsl_nvfp4.vllm.version="${VLLM_VERSION}" \
      cutedsl_nvfp4.patches.sha256="${PATCHES_SHA256}" \
      cutedsl_nvfp4.kernels.architectures="${KERNEL_ARCHITECTURES}"
