#!/usr/bin/env bash
# Run launch/test.sh on every Python that is new enough (python3.N on PATH, and pyenv's), each in a
# clone of the last commit, and print a table. Clones, environments and logs stay in runs/matrix.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."

declare -A pythons # version, such as 3.12, to interpreter
for python in $(compgen -c python3 | grep -xE 'python3(\.[0-9]+)?' | sort -u) \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3; do
    # Skips what is not a Python, and virtual environments.
    version=$("$python" -c 'import sys
assert sys.version_info >= (3, 11) and sys.prefix == sys.base_prefix
print("%d.%d" % sys.version_info[:2])' 2> /dev/null) || continue
    pythons[$version]=${pythons[$version]:-$python}
done

# versions PYTHON: prints the versions of Python, JAX and flax.
versions() {
    "$1" -c 'import platform
from importlib.metadata import version
print(platform.python_version(), version("jax"), version("flax"))' 2> /dev/null || echo "- - -"
}

# last PATTERN FILE: prints the number before the last match.
last() {
    grep -oE "[0-9.]+$1" "$2" | tail -1 | grep -oE '^[0-9]+' || echo 0
}

# row NAME PYTHON JAX FLAX PASSED FAILED SECONDS
row() {
    printf '%-6s %-8s %-10s %-10s %7s %8s %8s\n' "$@"
}

failed=0 table=$(row name python jax flax passed failed seconds)
for version in $(printf '%s\n' "${!pythons[@]}" | sort -V); do
    clone=runs/matrix/$version log=runs/matrix/$version.log
    [ -d "$clone" ] || git clone --quiet . "$clone"
    git -C "$clone" fetch --quiet origin HEAD
    git -C "$clone" checkout --quiet --force --detach FETCH_HEAD
    echo "$version: ${pythons[$version]}, log in $log"
    start=$SECONDS code=0
    PYTHON=${pythons[$version]} bash "$clone/launch/test.sh" "$@" > "$log" 2>&1 || code=$?
    bad=$(($(last ' failed' "$log") + $(last ' errors?' "$log")))
    if [ "$code" -ne 0 ]; then
        failed=1
        [ "$bad" -ne 0 ] || bad="code=$code" # not a failed test: the end of the log has the error
    fi
    read -r python jax flax <<< "$(versions "$clone/.venv/bin/python")"
    table+=$'\n'$(row "$version" "$python" "$jax" "$flax" "$(last ' passed' "$log")" "$bad" \
        $((SECONDS - start)))
done
echo "$table"
exit $failed
