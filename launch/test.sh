#!/usr/bin/env bash
# Make .venv and run the tests: bash launch/test.sh [--all] [arguments of pytest]
# --all adds the slow tests.
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_environment
tier="not slow"
if [ "${1:-}" = "--all" ]; then
    tier="slow or not slow"
    shift
fi
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
exec python -m pytest -q -n 2 --dist loadfile -m "$tier" "$@"
