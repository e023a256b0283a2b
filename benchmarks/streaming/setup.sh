#!/usr/bin/env bash
# setup.sh FOLDER: makes FOLDER/main and FOLDER/mds, the two environments of the peers. FOLDER has to be outside the
# repository: uv would apply the repository's version constraints to what is installed below it.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"
for name in main mds; do
    if command -v uv > /dev/null; then
        uv venv --quiet --allow-existing "$name"
        uv pip install --quiet --python "$name/bin/python" -r "$here/requirements-$name.txt"
    else
        python3 -m venv "$name"
        "$name/bin/pip" install --quiet -r "$here/requirements-$name.txt"
    fi
done
