#!/usr/bin/env bash
# Makes a virtual environment with MLServer, for tests/test_real_oip.py; run it with the environment of the tests active
# or named by PYTHON.
#
#   PYTHON=.venv/bin/python tests/servers/mlserver.sh [DIR]      default: .servers/mlserver in the repository
#
# MLServer wants older versions of FastAPI than `bbprompt serve` does: hence an environment of its own. What it does not
# bring (torch, transformers and the like) is taken from the environment of the tests, behind its own packages.
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
target="${1:-$root/.servers/mlserver}"
python="${PYTHON:-python3}"
home="$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
shared='^(numpy|pydantic|pydantic-core|pyyaml|typer|rich|httpx2|tenacity|tokenizers|huggingface-hub|tqdm|packaging)==[^ ]+'
"$python" -m venv "$target.new"
grep -oE "$shared" "$root/.ci/dev.lock" > "$target.new/constraints.txt"
"$target.new/bin/python" -m pip --disable-pip-version-check install --quiet \
  --constraint "$target.new/constraints.txt" "mlserver==1.7.1"
"$target.new/bin/python" -c "import pathlib, sysconfig, sys
pathlib.Path(sysconfig.get_paths()['purelib'], 'zz-tests.pth').write_text('\n'.join(sys.argv[1:]) + '\n')" "$home" "$root"
"$target.new/bin/python" -c "import mlserver, torch, transformers, safetensors, bbprompt"
rm -rf "$target" && mv "$target.new" "$target"
echo "MLServer is ready in $target"
