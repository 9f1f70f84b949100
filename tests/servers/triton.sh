#!/usr/bin/env bash
# Unpacks NVIDIA Triton from the wheel of nvidia-pytriton, for tests/test_real_oip.py; run it with the environment of the
# tests active or named by PYTHON.
#
#   PYTHON=.venv/bin/python tests/servers/triton.sh [DIR]      default: .servers/triton in the repository
#
# Nothing is installed: the server and the stub of its Python backend are taken out of the wheel (55 MB). The stub embeds
# the system's Python of the same version as that of the tests, so its shared library must be there
# (Debian 12: libpython3.11).
set -euo pipefail
root="$(cd "$(dirname "$0")/../.." && pwd)"
target="${1:-$root/.servers/triton}"
python="${PYTHON:-python3}"
version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
rm -rf "$target.new" && mkdir -p "$target.new/backends"
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary :all: \
  --dest "$target.new" "nvidia-pytriton==0.7.0"
"$python" -m zipfile -e "$target.new"/nvidia_pytriton-*.whl "$target.new/wheel"
inside="$target.new/wheel/pytriton/tritonserver"
cp -r "$inside/backends/python" "$target.new/backends/python"
cp "$inside/python_backend_stubs/$version/triton_python_backend_stub" "$target.new/backends/python/"
mv "$inside/bin/tritonserver" "$target.new/wheel/nvidia_pytriton.libs" "$target.new/"
rm -rf "$target.new/wheel" "$target.new"/*.whl
chmod +x "$target.new/tritonserver" "$target.new/backends/python/triton_python_backend_stub"
export LD_LIBRARY_PATH="$target.new/nvidia_pytriton.libs"
if ldd "$target.new/backends/python/triton_python_backend_stub" | grep "not found"; then
  echo "install the shared library of Python $version (apt-get install libpython$version)" >&2
  exit 1
fi
rm -rf "$target" && mv "$target.new" "$target"
echo "Triton is ready in $target"
