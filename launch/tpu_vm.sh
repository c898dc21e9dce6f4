#!/usr/bin/env bash
# Trains on TPU VMs that are asked for as a queued resource: v4, v5e, v5p and v6e. Google keeps this
# API as it is and gives it no later TPUs: those, and a lab that has GKE, use launch/tpu_gke.sh.
#
#   export PROJECT=lab ZONE=us-east5-b NAME=pixart-1 TPU_TYPE=v6e-16 NUM_SLICES=1
#   export MOUNT=/mnt/share WORKDIR=/mnt/share/runs/pixart CONFIG=configs/pixart_gad.py
#   bash launch/tpu_vm.sh create --spot       # further arguments are gcloud's
#   bash launch/tpu_vm.sh install             # this checkout, and what it needs, on all hosts
#   bash launch/tpu_vm.sh train --config.teacher=/mnt/share/PixArt-XL-2-512x512 ...
#   bash launch/tpu_vm.sh status
#   bash launch/tpu_vm.sh stop                # TERM: the run saves and leaves
#   bash launch/tpu_vm.sh delete              # the VMs too
#
# PROJECT ZONE NAME     where, and the name of the queued resource and of its nodes
# TPU_TYPE, NUM_SLICES  what, and how many of it (1)
# RUNTIME               software of the VMs (by TPU_TYPE)
# WORKDIR               gs://BUCKET/DIR, or a folder below MOUNT
# MOUNT                 what all hosts have mounted, by you (/gcs): Filestore, or a bucket
# CONFIG                FILE[:variant]
# LOGS                  folder here for what gcloud and the hosts say (runs/NAME.logs)
# GRACE                 seconds that stop waits for the run to save (180)
#
# --dry-run prints the commands. A run goes on when this machine does not; each host keeps its logs
# in WORKDIR.logs, by its name (of a bucket: in its own ~/gadjax.logs), and its exit code for
# status. A spot TPU that was taken away: delete, create, install, train; the run resumes.
# Tested: the commands and their quoting, refusals, what a host does with train, status and stop.
# Needs hardware: gcloud, TPUs, install.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
state=$HOME/.gadjax # of a host: pid and code

# alive: whether the process that was recorded is there, and still is ours.
alive() {
    [ -r "$state/pid" ] && pid=$(< "$state/pid") && [ -r "/proc/$pid/cmdline" ] &&
        [[ $(tr '\0' ' ' < "/proc/$pid/cmdline") == *"tpu_vm.sh host watch"* ]]
}

# host install: into .venv, with a Python that is new enough (the VMs' own is 3.10).
host_install() {
    python3 -m pip install --quiet --user uv
    local uv=$HOME/.local/bin/uv
    "$uv" venv --quiet --allow-existing --python 3.11 .venv
    "$uv" pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
    echo "$HOSTNAME: installed"
}

# host train MOUNT WORKDIR train ...: starts it and returns.
host_train() {
    local logs=$2.logs/$HOSTNAME
    [[ $2 != gs://* ]] || logs=$HOME/gadjax.logs/$HOSTNAME # a log is added to, which no bucket can
    ! alive || fail "$HOSTNAME: found a run that goes on (process $pid); expected none (stop it)"
    need_tool gadjax "tpu_vm.sh install"
    on_share "$1" "$2"
    mkdir -p "$state" "$logs"
    rm -f "$state/code"
    setsid bash launch/tpu_vm.sh host watch gadjax launch --logs "$logs" -- "${@:3}" \
        > /dev/null 2>> "$logs/launch.log" < /dev/null & # what it prints is in its own log
    echo $! > "$state/pid"
    echo "$HOSTNAME: process $!, logs in $logs"
}

# host watch COMMAND ...: the recorded process.
host_watch() {
    local code=0
    watched "$@" || code=$?
    echo "$code" > "$state/code"
}

host_status() {
    if alive; then
        echo "$HOSTNAME: process $pid is there"
    elif [ -r "$state/code" ]; then
        echo "$HOSTNAME: ended with exit code $(< "$state/code")"
    else
        echo "$HOSTNAME: nothing was started, or the host was"
    fi
}

# host stop GRACE: TERM, and patience; never KILL, which would lose what was not saved.
host_stop() {
    local second
    if alive; then
        kill -TERM "$pid"
        for ((second = 0; second < $1; second++)); do
            alive || break
            sleep 1
        done
        if alive; then
            echo "$HOSTNAME: process $pid is still there after $1 s; stop again, or wait" >&2
            exit 3
        fi
    fi
    host_status
}

if [ "${1:-}" = host ]; then
    "host_$2" "${@:3}"
    exit
fi
read_arguments "$@"
step=${extra[0]:-}
extra=("${extra[@]:1}")
case $step in
    create) need PROJECT ZONE NAME TPU_TYPE ;;
    train) need PROJECT ZONE NAME TPU_TYPE WORKDIR CONFIG ;;
    status) need PROJECT ZONE NAME WORKDIR ;;
    install | stop | delete) need PROJECT ZONE NAME ;;
    *) fail "found '$step'; expected create, install, train, status, stop or delete" ;;
esac
MOUNT=${MOUNT:-/gcs} LOGS=${LOGS:-runs/$NAME.logs} GRACE=${GRACE:-180}
whole GRACE
need_tool gcloud "https://cloud.google.com/sdk"
place=(--project="$PROJECT" --zone="$ZONE")

# resources VERB ...: one command about the queued resource, its output in LOGS as well.
resources() {
    logged "$LOGS/$step.log" gcloud compute tpus queued-resources "$@" "${place[@]}"
}

# on_hosts COMMAND...: on every host of every slice at once; JAX waits until all have come.
on_hosts() {
    local command
    printf -v command '%q ' bash gadjax/launch/tpu_vm.sh host "$@"
    resources ssh "$NAME" --node=all --worker=all --command="${command% }"
}

# check_type: sets `runtime`.
check_type() {
    case $TPU_TYPE in
        v4-*) runtime=tpu-ubuntu2204-base ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        *) fail "TPU_TYPE: found $TPU_TYPE; expected v4-, v5litepod-, v5p- or v6e-, the only ones" \
            "that queued resources have (launch/tpu_gke.sh starts others)" ;;
    esac
    runtime=${RUNTIME:-$runtime}
    count_devices
}

case $step in
    create)
        check_type
        nodes=(--node-id="$NAME")
        [ "$NUM_SLICES" -eq 1 ] || nodes=(--node-count="$NUM_SLICES" --node-prefix="$NAME")
        resources create "$NAME" "${nodes[@]}" --accelerator-type="$TPU_TYPE" \
            --runtime-version="$runtime" "${extra[@]}"
        ;;
    install)
        [ -n "$dry" ] || mkdir -p "$LOGS"
        run tar --exclude-vcs --exclude=.venv --exclude=./runs --exclude='*.logs' \
            -czf "$LOGS/gadjax.tgz" .
        resources scp "$LOGS/gadjax.tgz" "$NAME:" --node=all --worker=all
        resources ssh "$NAME" --node=all --worker=all --command="mkdir -p gadjax && tar xzf \
gadjax.tgz -C gadjax && bash gadjax/launch/tpu_vm.sh host install"
        ;;
    train)
        check_type
        check_shared
        train_arguments "$WORKDIR" "$devices"
        on_hosts train "$MOUNT" "$WORKDIR" "${train[@]}"
        ;;
    status)
        check_shared
        resources describe "$NAME" --format='value(state.state)'
        on_hosts status
        resources ssh "$NAME" --node=0 --worker=0 \
            --command="gadjax/.venv/bin/gadjax status $(printf %q "$WORKDIR")"
        ;;
    stop) on_hosts stop "$GRACE" ;;
    delete) resources delete "$NAME" --force --quiet ;;
esac
