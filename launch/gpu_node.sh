#!/usr/bin/env bash
# Train on one machine with several GPUs, all driven by one process.
#
#   WORKDIR=runs/pixart CONFIG=configs/pixart_gad.py DEVICES=8 bash launch/gpu_node.sh \
#       [--dry-run] --config.teacher=PATH --config.data.embeddings=DIR
#
# WORKDIR   folder of the run; run again to resume
# CONFIG    FILE[:variant], or NAME[:variant] of a bundled config
# DEVICES   expected number of GPUs
# LOGS      folder of the log (default WORKDIR.logs)
# XLA_PYTHON_CLIENT_MEM_FRACTION (0.9), JAX_COMPILATION_CACHE_DIR (compiled, next to WORKDIR),
# CUDA_VISIBLE_DEVICES, NCCL_* and XLA_FLAGS are passed to the run.
#
# TERM, INT (Ctrl-C) or USR1 to this script: the run saves and exits. Exit code: the run's.
# Tested: the command, the checks, signals and exit codes, with stand-ins for nvidia-smi and gadjax.
# Needs hardware: everything on a GPU.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
read_arguments "$@"
require WORKDIR CONFIG DEVICES
check_positive DEVICES
local_folders
gpu_environment
train_arguments "$WORKDIR" "$DEVICES"
require_tool gadjax "pip install -e ."
require_tool nvidia-smi "part of the GPU driver"

count_cards() {
    local names
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra names <<< "$CUDA_VISIBLE_DEVICES"
    else
        mapfile -t names < <(nvidia-smi --query-gpu=name --format=csv,noheader)
    fi
    devices=${#names[@]}
    check_devices "this machine (${names[*]:-nvidia-smi names none})"
}

has_cuda() {
    python -c 'import importlib.util as u, sys
sys.exit(not any(u.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)))'
}

command=(gadjax launch --processes 1 --logs "$LOGS" -- "${train[@]}")
if [ -n "$dry" ]; then
    run "${command[@]}"
    exit
fi
count_cards
has_cuda || fail "jax: found no CUDA plugin for it; expected pip install 'jax[cuda13]'"
exec "${command[@]}"
