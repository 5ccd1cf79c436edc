# mimir-fast with CUDA, DALI and xformers. A driver for CUDA 13 and the NVIDIA container toolkit are the host's part.
#
#   docker build -t mimir-fast .
#   mkdir -p runs
#   docker run --gpus all --ipc host --user $(id -u):$(id -g) -v /data:/data -v $PWD/runs:/work/runs mimir-fast \
#       torchrun --nproc_per_node 8 -m mimir_fast.pretrain --recipe imagenet/mimir_vit_base --data.root /data/imagenet
FROM python:3.12-slim-bookworm AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY csrc csrc
COPY kernels kernels
COPY mimir_fast mimir_fast
# A missing compiler would be an error here, not a fallback.
RUN MIMIR_FAST_REQUIRE=native pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# torch's wheels bring the CUDA libraries; Triton needs a C compiler at run time to build its launchers.
FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgomp1 && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[all,xformers]" && rm -rf /wheels
# Any user may be given, so that what is written to a mount is the owner's of the mount: a home that all may write to, and
# a name, which torch asks for and a number without an entry in /etc/passwd has not.
# No compiled graphs (TORCHINDUCTOR_CACHE_DIR) in the image: one processor's may compute wrong numbers on another.
RUN useradd --create-home --uid 1000 mimir && mkdir /work && chown mimir /work && chmod 1777 /home/mimir /work
ENV HOME=/home/mimir USER=mimir LOGNAME=mimir
USER 1000
WORKDIR /work
CMD ["mimir-fast", "info"]
