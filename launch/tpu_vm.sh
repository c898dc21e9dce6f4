#!/usr/bin/env bash
# Train on TPU VMs of a queued resource: v4, v5e, v5p and v6e. Google adds no later TPUs to this
# API: for those, and for a lab that has GKE, use launch/tpu_gke.sh.
#
#   export PROJECT=lab ZONE=us-east5-b NAME=pixart-1 TPU_TYPE=v6e-16 NUM_SLICES=1
#   export MOUNT=/mnt/share WORKDIR=/mnt/share/runs/pixart CONFIG=configs/pixart_gad.py
#   bash launch/tpu_vm.sh create --spot       # further arguments go to gcloud
#   bash launch/tpu_vm.sh install             # this checkout and its packages, on all hosts
#   bash launch/tpu_vm.sh train --config.teacher=/mnt/share/PixArt-XL-2-512x512 ...
#   bash launch/tpu_vm.sh status
#   bash launch/tpu_vm.sh stop                # TERM: the run saves and exits
#   bash launch/tpu_vm.sh delete              # the VMs as well
#
# PROJECT ZONE NAME     where, and the name of the queued resource and of its nodes
# TPU_TYPE, NUM_SLICES  type and number of slices (1)
# RUNTIME               runtime version of the VMs (default by TPU_TYPE)
# WORKDIR               gs://BUCKET/DIR, or a folder below MOUNT
# MOUNT                 mount point of all hosts, set up by you (/gcs): Filestore, or a bucket
# CONFIG                FILE[:variant], or NAME[:variant] of a bundled config
# LOGS                  local folder for the output of gcloud and the hosts (runs/NAME.logs)
# GRACE                 seconds that stop waits for the run to save (180)
#
# --dry-run prints the commands. A run continues without this machine; each host keeps its logs in
# WORKDIR.logs, by its name (with a bucket: in its own ~/gadjax.logs), and its exit code for status.
# After preemption of a spot TPU: delete, create, install, train; the run resumes.
# Tested: the commands and their quoting, refusals, train, status and stop on a host.
# Needs hardware: gcloud, TPUs, install.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
state=$HOME/.gadjax # of a host: pid and code

# alive: succeeds if the recorded process exists and is this script's; sets `pid`.
alive() {
    [ -r "$state/pid" ] && pid=$(< "$state/pid") && [ -r "/proc/$pid/cmdline" ] &&
        [[ $(tr '\0' ' ' < "/proc/$pid/cmdline") == *"tpu_vm.sh host watch"* ]]
}

# host install: installs into .venv, with a newer Python than the VMs' 3.10.
host_install() {
    python3 -m pip install --quiet --user uv
    local uv=$HOME/.local/bin/uv
    "$uv" venv --quiet --allow-existing --python 3.11 .venv
    "$uv" pip install --quiet --python .venv/bin/python --editable '.[tpu,gcs]'
    echo "$HOSTNAME: installed"
}

# host train MOUNT WORKDIR train ...: starts the run in the background and returns.
host_train() {
    local logs=$2.logs/$HOSTNAME
    [[ $2 != gs://* ]] || logs=$HOME/gadjax.logs/$HOSTNAME # buckets do not append
    ! alive || fail "$HOSTNAME: found a run in progress (process $pid); expected none (stop it)"
    require_tool gadjax "tpu_vm.sh install"
    set_up_share "$1" "$2"
    mkdir -p "$state" "$logs"
    rm -f "$state/code"
    setsid bash launch/tpu_vm.sh host watch gadjax launch --logs "$logs" -- "${@:3}" \
        > /dev/null 2>> "$logs/launch.log" < /dev/null & # its output is in its own log
    echo $! > "$state/pid"
    echo "$HOSTNAME: process $!, logs in $logs"
}

# host watch COMMAND ...: runs it as the recorded process, and records its exit code.
host_watch() {
    local code=0
    run_forwarding_term "$@" || code=$?
    echo "$code" > "$state/code"
}

host_status() {
    if alive; then
        echo "$HOSTNAME: process $pid is running"
    elif [ -r "$state/code" ]; then
        echo "$HOSTNAME: ended with exit code $(< "$state/code")"
    else
        echo "$HOSTNAME: no run was started, or the host was restarted"
    fi
}

# host stop GRACE: sends TERM and waits; never KILL, which would lose unsaved steps.
host_stop() {
    local second
    if alive; then
        kill -TERM "$pid"
        for ((second = 0; second < $1; second++)); do
            alive || break
            sleep 1
        done
        if alive; then
            echo "$HOSTNAME: process $pid is still running after $1 s; stop again, or wait" >&2
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
    create) require PROJECT ZONE NAME TPU_TYPE ;;
    train) require PROJECT ZONE NAME TPU_TYPE WORKDIR CONFIG ;;
    status) require PROJECT ZONE NAME WORKDIR ;;
    install | stop | delete) require PROJECT ZONE NAME ;;
    *) fail "found '$step'; expected create, install, train, status, stop or delete" ;;
esac
MOUNT=${MOUNT:-/gcs} LOGS=${LOGS:-runs/$NAME.logs} GRACE=${GRACE:-180}
check_positive GRACE
require_tool gcloud "https://cloud.google.com/sdk"
place=(--project="$PROJECT" --zone="$ZONE")

# resources VERB ...: runs a gcloud command on the queued resource, and logs its output in LOGS.
resources() {
    run_logged "$LOGS/$step.log" gcloud compute tpus queued-resources "$@" "${place[@]}"
}

# on_hosts COMMAND...: runs it on every host of every slice at once; JAX waits for all of them.
on_hosts() {
    local command
    printf -v command '%q ' bash gadjax/launch/tpu_vm.sh host "$@"
    resources ssh "$NAME" --node=all --worker=all --command="${command% }"
}

# check_type: sets `runtime` and `devices`.
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
        check_shared_workdir
        train_arguments "$WORKDIR" "$devices"
        on_hosts train "$MOUNT" "$WORKDIR" "${train[@]}"
        ;;
    status)
        check_shared_workdir
        resources describe "$NAME" --format='value(state.state)'
        on_hosts status
        resources ssh "$NAME" --node=0 --worker=0 \
            --command="gadjax/.venv/bin/gadjax status $(printf %q "$WORKDIR")"
        ;;
    stop) on_hosts stop "$GRACE" ;;
    delete) resources delete "$NAME" --force --quiet ;;
esac
