#!/usr/bin/env bash
# Makes a virtual environment with MLServer and this package, for tests/test_real_oip.py.
#
#   tests/servers/mlserver.sh [DIR]      default: .servers/mlserver in the repository
#   BBPROMPT_MLSERVER=DIR pytest tests/test_real_oip.py
#
# MLServer wants older versions of FastAPI than `bbprompt serve` does: hence an environment of its own.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
target="${1:-$root/.servers/mlserver}"
"${PYTHON:-python3}" -m venv "$target"
chosen='^(torch|transformers|tokenizers|huggingface_hub|safetensors|cma|botorch|gpytorch|linear_operator|numpy|scipy)=='
grep -E "$chosen" "$root/.ci/constraints.txt" > "$target/constraints.txt"
pip=("$target/bin/python" -m pip --disable-pip-version-check install --quiet)
"${pip[@]}" "torch==2.13.0" --index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
"${pip[@]}" --constraint "$target/constraints.txt" "mlserver==1.7.1" --editable "$root"
"$target/bin/python" -m pip check
echo "ready: BBPROMPT_MLSERVER=$target"
