#!/usr/bin/env bash
# Makes .venv and runs the tests: bash launch/test.sh [--all] [pytest's own arguments]
# --all adds the slow tier.
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
