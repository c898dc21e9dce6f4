#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, through xpk.
#
#   PROJECT=lab ZONE=us-east5-b CLUSTER=pods TPU_TYPE=v5litepod-16 NUM_SLICES=2 NAME=pixart-1 \
#   IMAGE=REGISTRY/gadjax@sha256:... WORKDIR=gs://BUCKET/runs/pixart CONFIG=configs/pixart_gad.py \
#       bash launch/tpu_gke.sh [--dry-run] --config.teacher=/gcs/PixArt-XL-2-512x512 \
#       --config.data.embeddings=/gcs/prompts
#
# PROJECT ZONE CLUSTER  where; CLUSTER was made by xpk
# TPU_TYPE, NUM_SLICES  what, and how many of it (1); --devices follows from them
# DEVICES               devices of JAX in all slices, where the name TPU_TYPE does not say
# NAME                  of the workload: a to z, 0 to 9 and -, at most 40
# IMAGE                 has the project as its working directory, and gadjax[tpu,gcs] installed
# WORKDIR               gs://BUCKET/DIR, or a folder below MOUNT
# MOUNT                 what the pods mount (/gcs; xpk storage attach): Filestore, or a bucket
# CONFIG                FILE[:variant], in the image
# MAX_RESTARTS          how often the workload starts again (20)
# GRACE                 seconds that a pod has to save when it has to go (180)
#
# Teacher and prompts are files, below MOUNT or in the image. A pod that does not reach WORKDIR
# refuses to start.
# In each pod `tpu_gke.sh pod` watches `gadjax launch`. A run that was preempted or crashed leaves
# with 143, upon which xpk starts the workload again; 2 and 3 end it. Logs: kubectl logs, by pod.
# Tested: the command and its quoting, refusals, what a pod returns. Needs hardware: xpk, GKE, TPUs.
set -euo pipefail
source "$(dirname "$0")/lib.sh"

# in_pod MOUNT WORKDIR train ...: what runs in each pod.
in_pod() {
    local mount=$1 workdir=$2 before after code=0
    need_tool gadjax "the image should have it"
    on_share "$mount" "$workdir"
    before=$(said "$workdir")
    watched gadjax launch --logs "${TMPDIR:-/tmp}/gadjax" -- "${@:3}" || code=$?
    after=$(said "$workdir")
    echo "training ended with exit code $code; $workdir: $(word "$after")"
    if start_again "$code" "$before" "$after"; then
        exit 143
    fi
    exit "$(true_code "$code" "$after")"
}

if [ "${1:-}" = pod ]; then
    in_pod "${@:2}"
fi
read_arguments "$@"
need PROJECT ZONE CLUSTER TPU_TYPE IMAGE NAME WORKDIR CONFIG
MOUNT=${MOUNT:-/gcs} MAX_RESTARTS=${MAX_RESTARTS:-20} GRACE=${GRACE:-180}
whole MAX_RESTARTS GRACE
[[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    fail "NAME: found $NAME; expected a to z, 0 to 9 and -, a letter first, at most 40 in all"
count_devices
check_shared
train_arguments "$WORKDIR" "$devices"
need_tool xpk "pip install xpk"
need_tool kubectl "xpk needs it"
# exec: the shell that xpk puts around it passes TERM on to its own child only.
printf -v command '%q ' exec bash launch/tpu_gke.sh pod "$MOUNT" "$WORKDIR" "${train[@]}"
run xpk workload create --workload="$NAME" --project="$PROJECT" --zone="$ZONE" \
    --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
    --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" \
    --termination-grace-period-seconds="$GRACE" --command="${command% }"
