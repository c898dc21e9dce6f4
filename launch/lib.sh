# shellcheck shell=bash
# Sourced by the scripts that start runs on clusters: arguments, checks, signals, and when a run is
# to be started again. Goes to the project's root, as env.sh does: paths are relative to it.
script=$(realpath "$0")
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
PATH="$PATH:$PWD/.venv/bin" # where launch/test.sh or launch/quickstart.sh made one

dry=""   # not empty: commands are printed, and none is executed
extra=() # arguments that are not the script's own

# read_arguments "$@": fills `dry` and `extra`; what follows -- is not looked at.
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

# The comment at the head of the script.
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

# need VARIABLE...: all of them have values.
need() {
    local key missing=()
    for key; do
        [ -n "${!key:-}" ] || missing+=("$key")
    done
    [ ${#missing[@]} -eq 0 ] || fail "${missing[*]}: found nothing; expected a value (see --help)"
}

# whole VARIABLE...: they are whole numbers from 1.
whole() {
    local key
    for key; do
        [[ ${!key} =~ ^[1-9][0-9]*$ ]] ||
            fail "$key: found '${!key}'; expected a whole number from 1"
    done
}

# need_tool NAME WHERE-FROM: a dry run does without.
need_tool() {
    [ -n "$dry" ] || command -v "$1" > /dev/null ||
        fail "$1: found nothing of this name on PATH; expected it ($2)"
}

# run COMMAND...: a dry run prints it, quoted so that a shell reads it back.
run() {
    if [ -n "$dry" ]; then
        printf '%q' "$1"
        [ $# -eq 1 ] || printf ' %q' "${@:2}"
        printf '\n'
    else
        "$@"
    fi
}

# watched COMMAND...: runs it, hands TERM on to it, and returns its exit code.
watched() {
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

# logged LOG COMMAND...: runs it, what it says going here and to LOG; its exit code comes out.
logged() {
    if [ -n "$dry" ]; then
        run "${@:2}"
        return
    fi
    mkdir -p "$(dirname "$1")"
    local codes=(0)
    "${@:2}" 2>&1 | tee -a "$1" || codes=("${PIPESTATUS[@]}")
    return "${codes[0]}"
}

# devices_in TYPE: how many devices JAX sees in one TPU slice of this name. v4 and v5p count
# TensorCores, of which two make a device; the others count what JAX sees; sides count chips.
devices_in() {
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

# count_devices: sets `devices` to those of NUM_SLICES slices of TPU_TYPE, and DEVICES must agree.
count_devices() {
    NUM_SLICES=${NUM_SLICES:-1}
    whole NUM_SLICES
    if devices=$(devices_in "$TPU_TYPE"); then
        devices=$((devices * NUM_SLICES))
        agree_on_devices "$NUM_SLICES x $TPU_TYPE"
    else
        [ -n "${DEVICES:-}" ] || fail "TPU_TYPE: found $TPU_TYPE, which does not say how many" \
            "devices it has; expected DEVICES beside it, or a name such as v5litepod-16"
        whole DEVICES
        devices=$DEVICES
    fi
}

# agree_on_devices WHAT: DEVICES, where it is set, is what `devices` has counted in WHAT.
agree_on_devices() {
    [ "${DEVICES:-$devices}" = "$devices" ] ||
        fail "DEVICES: found $DEVICES; expected $devices, as many as $1 has"
}

# check_shared: WORKDIR is one that all hosts reach: a bucket, or a folder below MOUNT.
check_shared() {
    WORKDIR=${WORKDIR%/}
    case $WORKDIR in
        gs://*/?* | "$MOUNT"/?*) ;;
        *) fail "WORKDIR: found $WORKDIR; expected gs://BUCKET/DIR, or a folder below $MOUNT" ;;
    esac
}

# on_share MOUNT WORKDIR: this host reaches it, and keeps what it compiles beside it.
on_share() {
    if [[ $2 == gs://* ]]; then
        python -c 'import gcsfs' 2> /dev/null || fail "gcsfs: found nothing of this name on" \
            "$HOSTNAME; expected it, for $2 (pip install 'gadjax[gcs]')"
    else
        need_mount "$1"
    fi
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-${2%/*}/compiled}
}

# need_mount FOLDER: it is one that this host shares, and not its own disk.
need_mount() {
    local at
    while read -r _ at _; do
        [ "$at" != "$1" ] || return 0
    done < /proc/mounts
    fail "MOUNT: found nothing mounted at $1 on $HOSTNAME; expected what all hosts share"
}

# train_arguments WORKDIR DEVICES: sets `train`.
train_arguments() {
    train=(train --config "$CONFIG" --workdir "$1" --devices "$2" "${extra[@]}")
}

# local_folders: WORKDIR as a full path, and LOGS beside it (a new workdir has to be empty).
local_folders() {
    [[ $WORKDIR == /* ]] || WORKDIR=$PWD/$WORKDIR
    WORKDIR=${WORKDIR%/}
    LOGS=${LOGS:-$WORKDIR.logs}
}

# gpu_environment: what was set by hand stays; NCCL_* and XLA_FLAGS pass through as they are.
gpu_environment() {
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}
    export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR-${WORKDIR%/*}/compiled}
}

# said WORKDIR: its status.json, if there is one.
said() {
    if [[ $1 == gs://* ]]; then
        python -c 'import sys; from gadjax.io.storage import as_path
path = as_path(sys.argv[1]) / "status.json"
print(path.read_text() if path.exists() else "", end="")' "$1"
    elif [ -r "$1/status.json" ]; then
        cat "$1/status.json"
    fi
}

# word STATUS.JSON: running, done, preempted or stopped.
word() {
    [[ ! $1 =~ \"status\":\ *\"([a-z]+)\" ]] || echo "${BASH_REMATCH[1]}"
}

# start_again CODE BEFORE AFTER: whether a run that ended so should be started again; BEFORE and
# AFTER are its status.json from before it began and now. A run that failed without a word of its
# own would fail again, and what an earlier one said is no reason.
start_again() {
    [ "$1" -ne 2 ] || return 1
    case $(word "$3") in
        preempted) [ "$1" -eq 0 ] || [ "$3" != "$2" ] ;;
        running) [ "$1" -ne 0 ] && [ "$3" != "$2" ] ;;
        *) return 1 ;;
    esac
}

# true_code CODE AFTER: what the run itself returned: 3 where its last word is that it stopped, and
# a launcher that killed the other processes returns their codes.
true_code() {
    if [ "$1" -gt 3 ] && [ "$(word "$2")" = stopped ]; then echo 3; else echo "$1"; fi
}
