#!/usr/bin/env bash
# Serve the site, rebuilt as its sources change: bash launch/docs.sh [arguments of mkdocs serve]
# ADDRESS chooses where (127.0.0.1:8000).
set -euo pipefail
source "$(dirname "$0")/env.sh"
make_environment
export NO_MKDOCS_2_WARNING=1
exec python -m mkdocs serve --dev-addr "${ADDRESS:-127.0.0.1:8000}" "$@"
