#!/usr/bin/env bash
# Collect the wheels that a machine without network lacks, into a folder to take there.
#
#   bash launch/wheels.sh DIR [--dry-run]
#
# That machine: Linux on x86_64 with Python 3.12, JAX 0.11, flax, optax, orbax-checkpoint,
# transformers 5, numpy 2, and torch where PyTorch is to be compared with. On it:
#
#   python -m pip install --no-index --no-deps DIR/*.whl
#   python tests/benchmarks/run.py gpu --json gpu.json     # in a clone
#
# gadjax is among them, for its metadata; in a clone the clone's own code runs.
#
# PYTHON    interpreter whose pip downloads and builds (default python3), 3.11 or later
# Wheels that lie in DIR already stay. Fails if there are more than 60 MB in the end.
set -euo pipefail
source "$(dirname "$0")/lib.sh"
caller=$OLDPWD # DIR is relative to it
read_arguments "$@"
[ ${#extra[@]} -eq 1 ] || fail "DIR: found ${extra[*]:-nothing}; expected one folder (see --help)"
dir=${extra[0]}
[[ $dir != -* ]] || fail "DIR: found $dir; expected a folder (see --help)"
[[ $dir == /* ]] || dir=$caller/$dir
MAX_BYTES=60000000

# The packages of requirements.txt that such a machine lacks, and what those need in turn.
names=(diffusers clu grain ml_collections)
packages=(array_record cloudpickle etils importlib_resources more_itertools portpicker)
while read -r requirement _; do
    for name in "${names[@]}"; do
        [[ $requirement != "$name"[\<\>=]* ]] || packages+=("$requirement")
    done
done < requirements.txt

platforms=() # glibc 2.17 is of 2014, 2.28 of 2018
for glibc in {17..28}; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
run "${PYTHON:-python3}" -m pip download --quiet --dest "$dir" --no-deps --only-binary=:all: \
    --implementation cp --python-version 3.12 --platform manylinux2014_x86_64 "${platforms[@]}" \
    "${packages[@]}"
run "${PYTHON:-python3}" -m pip wheel --quiet --wheel-dir "$dir" --no-deps .
[ -z "$dry" ] || exit 0

bytes=0
for wheel in "$dir"/*.whl; do
    bytes=$((bytes + $(stat -c %s "$wheel")))
done
[ "$bytes" -le "$MAX_BYTES" ] ||
    fail "DIR: found $bytes bytes of wheels in $dir; expected at most $MAX_BYTES"
echo "$dir: $((bytes / 1000000)) MB of wheels; on the other machine:"
echo "python -m pip install --no-index --no-deps ${dir##*/}/*.whl"
