# Twofold in a container; the project folder is mounted at /work.
#
#   docker build -t twofold .                                   # CPU
#   docker build -t twofold:cuda --build-arg VARIANT=cuda .     # CUDA; run with --gpus all
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" twofold run
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG VARIANT=cpu
WORKDIR /opt/twofold
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY converter converter
COPY passes passes
# PyPI's torch for Linux brings the CUDA libraries along, which onnxruntime-gpu uses as well. The two
# onnxruntimes write to one folder, so the one for GPUs takes the other's place.
RUN set -eu; \
    case "$VARIANT" in \
      cpu) pip install --no-cache-dir --constraint constraints.txt \
             --extra-index-url https://download.pytorch.org/whl/cpu . ;; \
      cuda) pip install --no-cache-dir --constraint constraints.txt . \
            && pip uninstall --yes onnxruntime \
            && pip install --no-cache-dir onnxruntime-gpu ;; \
      *) echo "VARIANT is $VARIANT, and cpu or cuda is wanted" >&2; exit 2 ;; \
    esac; \
    rm -rf build ./*.egg-info

# measured milliseconds stay with the project
ENV TWOFOLD_CACHE=/work/.twofold-cache
WORKDIR /work
ENTRYPOINT ["twofold"]
CMD ["--help"]
