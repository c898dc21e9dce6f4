#!/usr/bin/env bash
# Trains on one machine with several GPUs, all of them driven by one process.
#
#   WORKDIR=runs/pixart CONFIG=configs/pixart_gad.py DEVICES=8 bash launch/gpu_node.sh \
#       [--dry-run] --config.teacher=PATH --config.data.embeddings=DIR
#
# WORKDIR   where the run lives; run again to resume
# CONFIG    FILE[:variant]
# DEVICES   how many GPUs there have to be
# LOGS      folder of the log (WORKDIR.logs)
# XLA_PYTHON_CLIENT_MEM_FRACTION (0.9), JAX_COMPILATION_CACHE_DIR (compiled, beside WORKDIR),
# CUDA_VISIBLE_DEVICES, NCCL_* and XLA_FLAGS reach the run.
#
# TERM, INT (Ctrl-C) or USR1 to this script: save and leave. Exit code: the run's.
# Tested: the command, the checks, signals and exit codes, with programs that stand in for
# nvidia-smi and gadjax. Needs hardware: everything that a GPU does.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
read_arguments "$@"
need WORKDIR CONFIG DEVICES
whole DEVICES
local_folders
gpu_environment
train_arguments "$WORKDIR" "$DEVICES"
need_tool gadjax "pip install -e ."
need_tool nvidia-smi "the driver of the cards brings it"

count_cards() {
    local names
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        IFS=, read -ra names <<< "$CUDA_VISIBLE_DEVICES"
    else
        mapfile -t names < <(nvidia-smi --query-gpu=name --format=csv,noheader)
    fi
    devices=${#names[@]}
    agree_on_devices "this machine (${names[*]:-nvidia-smi names none})"
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
has_cuda || fail "jax: found no CUDA plugin beside it; expected pip install 'jax[cuda13]'"
exec "${command[@]}"
