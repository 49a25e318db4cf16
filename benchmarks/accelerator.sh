#!/usr/bin/env bash
# Runs benchmarks/accelerator.py on a machine with a GPU that may have no network.
#
#   benchmarks/accelerator.sh fetch         where there is a network: puts what to carry along into .accelerator/
#   benchmarks/accelerator.sh [OPTION...]   on that machine, with the options of benchmarks/accelerator.py
#
# The machine needs Python with jax and its CUDA plugin, flax, optax, orbax-checkpoint and safetensors, and torch
# for the PyTorch code. Git ignores .accelerator/, which holds
#
#   reference   the PyTorch code; fetch clones it from $REFERENCE
#   wheels      what the training run and the input pipeline need, for Python $PYTHON_VERSION (3.12) on x86-64; in
#               addition the machine needs attrs, pillow, psutil, pyarrow, requests, rich, scikit-learn and wrapt
#
# PYTHON is the interpreter (python3). On a GPU the command takes 8 minutes, or as many as --minutes says.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
carried=.accelerator
packages=(ml-collections tensorflow-datasets tensorflow-metadata grain array-record google-crc32c dm-tree immutabledict
    simple-parsing docstring-parser termcolor toml portpicker importlib_resources googleapis-common-protos
    six cloudpickle)

fetch() {
    mkdir -p $carried/wheels
    [ -d $carried/reference ] ||
        git clone --depth 1 "${REFERENCE:-https://github.com/Phuoc-Hoan-Le/BinaryViT}" $carried/reference
    local platforms=()
    for glibc in 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
    for package in "${packages[@]}"; do
        "$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
            --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 \
            --dest $carried/wheels "$package"
    done
    "$python" -m pip wheel --quiet --no-deps --wheel-dir $carried/wheels promise  # pure Python, without a wheel
    du -sh $carried
}

if [ "${1:-}" = fetch ]; then
    fetch
    exit
fi

export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if compgen -G "$carried/wheels/*.whl" >/dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    if "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" $carried/wheels/*.whl; then
        export PYTHONPATH=$PYTHONPATH:$site
    else
        echo "the wheels in $carried are not used, nor what needs them" >&2
    fi
fi
command -v nvidia-smi >/dev/null && nvidia-smi -L
reference=()
if [ -f $carried/reference/models.py ]; then reference=(--reference $carried/reference); fi
"$python" benchmarks/accelerator.py "${reference[@]}" "$@"
