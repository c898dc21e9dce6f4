#!/usr/bin/env bash
# Train on TPUs of a GKE cluster, through xpk.
#
#   PROJECT=lab ZONE=us-east5-b CLUSTER=pods TPU_TYPE=v5litepod-16 NUM_SLICES=2 NAME=pixart-1 \
#   IMAGE=REGISTRY/gadjax@sha256:... WORKDIR=gs://BUCKET/runs/pixart CONFIG=configs/pixart_gad.py \
#       bash launch/tpu_gke.sh [--dry-run] --config.teacher=/gcs/PixArt-XL-2-512x512 \
#       --config.data.embeddings=/gcs/prompts
#
# PROJECT ZONE CLUSTER  of the cluster, which xpk has created
# TPU_TYPE, NUM_SLICES  type and number of slices (1); --devices follows from them
# DEVICES               JAX devices of all slices, if the name TPU_TYPE does not determine them
# NAME                  of the workload: a to z, 0 to 9 and -, at most 40 characters
# IMAGE                 with the project as working directory, and gadjax[tpu,gcs] installed
# WORKDIR               gs://BUCKET/DIR, or a folder below MOUNT
# MOUNT                 mount point of the pods (/gcs; xpk storage attach): Filestore, or a bucket
# CONFIG                FILE[:variant] in the image, or NAME[:variant] of a bundled config
# MAX_RESTARTS          limit of restarts of the workload (20)
# GRACE                 seconds for a pod to save before it ends (180)
#
# Teacher and prompts are files, below MOUNT or in the image. A pod without access to WORKDIR does
# not start.
# In each pod `tpu_gke.sh pod` supervises `gadjax launch`. A run that was preempted or crashed exits
# with 143, and xpk restarts the workload; 2 and 3 end it. Logs: kubectl logs, by pod.
# Tested: the command and its quoting, refusals, exit codes of a pod.
# Needs hardware: xpk, GKE, TPUs.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

# in_pod MOUNT WORKDIR train ...: the command of each pod.
in_pod() {
    local mount=$1 workdir=$2 before after code=0
    require_tool gadjax "the image should have it"
    set_up_share "$mount" "$workdir"
    before=$(read_status "$workdir")
    run_forwarding_term gadjax launch --logs "${TMPDIR:-/tmp}/gadjax" -- "${@:3}" || code=$?
    after=$(read_status "$workdir")
    echo "training ended with exit code $code; $workdir: $(status_word "$after")"
    if should_restart "$code" "$before" "$after"; then
        exit 143
    fi
    exit "$(run_exit_code "$code" "$after")"
}

if [ "${1:-}" = pod ]; then
    in_pod "${@:2}"
fi
read_arguments "$@"
require PROJECT ZONE CLUSTER TPU_TYPE IMAGE NAME WORKDIR CONFIG
MOUNT=${MOUNT:-/gcs} MAX_RESTARTS=${MAX_RESTARTS:-20} GRACE=${GRACE:-180}
check_positive MAX_RESTARTS GRACE
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME: found $NAME; expected a to z, 0 to 9 and -, a letter first, at most 40 in all"
count_devices
check_shared_workdir
train_arguments "$WORKDIR" "$devices"
require_tool xpk "pip install xpk"
require_tool kubectl "xpk needs it"
# exec: the shell that xpk wraps around it forwards TERM to its direct child only.
printf -v command '%q ' exec bash launch/tpu_gke.sh pod "$MOUNT" "$WORKDIR" "${train[@]}"
run xpk workload create --workload="$NAME" --project="$PROJECT" --zone="$ZONE" \
    --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
    --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" \
    --termination-grace-period-seconds="$GRACE" --command="${command% }"
