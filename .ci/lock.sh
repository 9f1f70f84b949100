#!/usr/bin/env bash
# Writes the locks anew: .ci/run.lock to run, .ci/serve.lock to serve, .ci/dev.lock to test. Each names every package
# by version and by the digests of its files, for all platforms, and takes no release younger than a week: most
# poisoned releases are found within days. Needs uv; afterwards run the tests, and `make audit`.
#
#   .ci/lock.sh              goes on from the versions that are locked
#   .ci/lock.sh --upgrade    takes the newest that pyproject.toml allows
set -euo pipefail
cd "$(dirname "$0")/.."
# Which build of torch is the choice of each machine (Makefile: TORCH, TORCH_ARGS), so torch and what only it needs
# stay outside.
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
never="$work/never" pins="$work/pins"
echo "torch; sys_platform == 'elsewhere'" > "$never"
lock() {
  uv pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes --exclude-newer "7 days" \
    --override "$never" --no-annotate --no-header --quiet --output-file ".ci/$1.lock" "${@:2}" > /dev/null
}
upgrade=("$@")
lock dev --group build --extra dev "${upgrade[@]}"
# The versions of the lock that is tested hold for the others.
grep -oE '^[a-z0-9._-]+==[^ ;]+' .ci/dev.lock > "$pins"
lock serve --group build --extra serve --constraint "$pins"
lock run --group build --constraint "$pins"
