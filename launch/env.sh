# Sourced by the other scripts: changes to the project's root, makes .venv per requirements.txt.
# PYTHON chooses the interpreter (3.11 or later).
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make_environment() {
    local python=${PYTHON:-python3} checksum
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "PYTHON: found $("$python" --version 2>&1 || true); expected Python 3.11 or later" >&2
        exit 2
    fi
    checksum=$(cat requirements.txt pyproject.toml | cksum)
    if [ "$(cat .venv/installed 2>/dev/null || true)" != "$checksum" ]; then
        echo "installing into .venv (once; some minutes)"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # torch first: then no package that depends on it installs another build.
        .venv/bin/python -m pip install --quiet "$(grep '^torch==' requirements.txt)"
        .venv/bin/python -m pip install --quiet -r requirements.txt
        .venv/bin/python -m pip install --quiet --no-deps --editable .
        echo "$checksum" > .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
}
