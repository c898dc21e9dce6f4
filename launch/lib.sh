# shellcheck shell=bash
# Sourced by the scripts for other machines: arguments, checks, signals, restart decisions.
# Changes to the project's root, as env.sh does: paths are relative to it.
script=$(realpath "$0")
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PATH="$PATH:$PWD/.venv/bin" # of launch/test.sh or launch/quickstart.sh

dry=""   # not empty: commands are printed and not executed
extra=() # arguments that are passed on to train, or to gcloud

# read_arguments "$@": sets `dry` and `extra`; arguments after -- go to `extra` as they are.
read_arguments() {
    while [ $# -gt 0 ]; do
        case $1 in
            --help | -h) show_help && exit 0 ;;
            --dry-run) dry=1 ;;
            --) extra+=("${@:2}") && return ;;
            *) extra+=("$1") ;;
        esac
        shift
    done
}

# show_help: prints the comment at the head of the script.
show_help() {
    local line
    while IFS= read -r line && [[ $line == '#'* ]]; do
        line=${line#\#}
        [[ $line == '!'* || $line == SBATCH* ]] || printf '%s\n' "${line# }"
    done < "$script"
}

fail() {
    printf '%s: %s\n' "${script##*/}" "$*" >&2
    exit 2
}

# require VARIABLE...: checks that all of them are set.
require() {
    local key missing=()
    for key; do
        [ -n "${!key:-}" ] || missing+=("$key")
    done
    [ ${#missing[@]} -eq 0 ] || fail "${missing[*]}: found nothing; expected a value (see --help)"
}

# check_positive VARIABLE...: checks that they are whole numbers from 1.
check_positive() {
    local key
    for key; do
        [[ ${!key} =~ ^[1-9][0-9]*$ ]] ||
            fail "$key: found '${!key}'; expected a whole number from 1"
    done
}

# require_tool NAME SOURCE: checks that a program is on PATH; a dry run does not need it.
require_tool() {
    [ -n "$dry" ] || command -v "$1" > /dev/null ||
        fail "$1: found nothing of this name on PATH; expected it ($2)"
}

# run COMMAND...: runs it; a dry run prints it, quoted for a shell.
run() {
    if [ -n "$dry" ]; then
        printf '%q' "$1"
        [ $# -eq 1 ] || printf ' %q' "${@:2}"
        printf '\n'
    else
        "$@"
    fi
}

# run_forwarding_term COMMAND...: runs it, forwards TERM to it, and returns its exit code.
run_forwarding_term() {
    local child again=1 code
    "$@" &
    child=$!
    trap 'again=1; kill -TERM "$child" 2> /dev/null || true' TERM
    while [ -n "$again" ]; do # a signal ends `wait` early
        again="" code=0
        wait "$child" || code=$?
    done
    trap - TERM
    return "$code"
}

# run_logged LOG COMMAND...: runs it, copies its output to LOG, and returns its exit code.
run_logged() {
    if [ -n "$dry" ]; then
        run "${@:2}"
        return
    fi
    mkdir -p "$(dirname "$1")"
    local codes=(0)
    "${@:2}" 2>&1 | tee -a "$1" || codes=("${PIPESTATUS[@]}")
    return "${codes[0]}"
}

# slice_devices TYPE: prints the number of JAX devices in one TPU slice of this type. A name counts
# TensorCores for v4 and v5p (two make a device), JAX devices for the others; a shape counts chips.
slice_devices() {
    [[ $1 =~ ^(v4|v5litepod|v5p|v6e|tpu7x)-([1-9][0-9]*(x[1-9][0-9]*){0,2})$ ]] || return 1
    local family=${BASH_REMATCH[1]} size=${BASH_REMATCH[2]} chip=1
    case $family:$size in
        tpu7x:*x*) chip=2 ;;
        v4:*x* | v5p:*x*) ;;
        v4:* | v5p:*)
            [ $((size % 2)) -eq 0 ] || return 1
            size=$((size / 2))
            ;;
    esac
    echo $((${size//x/*} * chip))
}

# count_devices: sets `devices` for NUM_SLICES slices of TPU_TYPE; DEVICES, if set, must agree.
count_devices() {
    NUM_SLICES=${NUM_SLICES:-1}
    check_positive NUM_SLICES
    if devices=$(slice_devices "$TPU_TYPE"); then
        devices=$((devices * NUM_SLICES))
        check_devices "$NUM_SLICES x $TPU_TYPE"
    else
        [ -n "${DEVICES:-}" ] || fail "TPU_TYPE: found $TPU_TYPE, of an unknown number of" \
            "devices; expected DEVICES as well, or a name such as v5litepod-16"
        check_positive DEVICES
        devices=$DEVICES
    fi
}

# check_devices SOURCE: checks that DEVICES, if set, is `devices`, which was counted in SOURCE.
check_devices() {
    [ "${DEVICES:-$devices}" = "$devices" ] ||
        fail "DEVICES: found $DEVICES; expected $devices, as many as $1 has"
}

# check_shared_workdir: checks that all hosts share WORKDIR: a bucket, or a folder below MOUNT.
check_shared_workdir() {
    WORKDIR=${WORKDIR%/}
    case $WORKDIR in
        gs://*/?* | "$MOUNT"/?*) ;;
        *) fail "WORKDIR: found $WORKDIR; expected gs://BUCKET/DIR, or a folder below $MOUNT" ;;
    esac
}

# set_up_share MOUNT WORKDIR: checks this host's access and sets JAX_COMPILATION_CACHE_DIR.
set_up_share() {
    if [[ $2 == gs://* ]]; then
        python -c 'import gcsfs' 2> /dev/null || fail "gcsfs: found nothing of this name on" \
            "$HOSTNAME; expected it, for $2 (pip install 'gadjax[gcs]')"
    else
        require_mount "$1"
    fi
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-${2%/*}/compiled}
}

# require_mount FOLDER: checks that it is a mount point, and not a folder of the host's own disk.
require_mount() {
    local at
    while read -r _ at _; do
        [ "$at" != "$1" ] || return 0
    done < /proc/mounts
    fail "MOUNT: found nothing mounted at $1 on $HOSTNAME; expected storage that all hosts share"
}

# train_arguments WORKDIR DEVICES: sets `train`, the arguments of gadjax.
train_arguments() {
    # shellcheck disable=SC2034 # read by the scripts that call this
    train=(train --config "$CONFIG" --workdir "$1" --devices "$2" "${extra[@]}")
}

# local_folders: makes WORKDIR absolute, with LOGS next to it (a new workdir has to be empty).
local_folders() {
    [[ $WORKDIR == /* ]] || WORKDIR=$PWD/$WORKDIR
    WORKDIR=${WORKDIR%/}
    LOGS=${LOGS:-$WORKDIR.logs}
}

# gpu_environment: sets defaults; variables that are set, such as NCCL_* and XLA_FLAGS, stay.
gpu_environment() {
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-${WORKDIR%/*}/compiled}
}

# read_status WORKDIR: prints its status.json, if there is one.
read_status() {
    if [[ $1 == gs://* ]]; then
        python -c 'import sys; from gadjax.io.storage import as_path
path = as_path(sys.argv[1]) / "status.json"
print(path.read_text() if path.exists() else "", end="")' "$1"
    elif [ -r "$1/status.json" ]; then
        cat "$1/status.json"
    fi
}

# status_word STATUS.JSON: prints running, done, preempted or stopped.
status_word() {
    [[ ! $1 =~ \"status\":\ *\"([a-z]+)\" ]] || echo "${BASH_REMATCH[1]}"
}

# should_restart CODE BEFORE AFTER: succeeds if a run that ended with CODE should be restarted.
# BEFORE and AFTER are its status.json from before its start and now. A run that failed without
# writing a status would fail again, and the status of an earlier start is no reason to restart.
should_restart() {
    [ "$1" -ne 2 ] || return 1
    case $(status_word "$3") in
        preempted) [ "$1" -eq 0 ] || [ "$3" != "$2" ] ;;
        running) [ "$1" -ne 0 ] && [ "$3" != "$2" ] ;;
        *) return 1 ;;
    esac
}

# run_exit_code CODE AFTER: prints the exit code of the run itself: 3 if its status is "stopped", as
# a launcher that killed the other processes returns their codes.
run_exit_code() {
    if [ "$1" -gt 3 ] && [ "$(status_word "$2")" = stopped ]; then echo 3; else echo "$1"; fi
}
