#!/usr/bin/env bash
# Installs the project that lies around this file, with the versions its pyproject.toml pins, into .venv beside it.
# Run on every node by the cluster files; stops at the first thing that fails, and says which node and command it was.
set -euo pipefail
trap 'echo "studytool: install.sh: line $LINENO failed on $(hostname): $BASH_COMMAND" >&2' ERR
cd "$(dirname "${BASH_SOURCE[0]}")/.."

uv_version=0.13.9      # with it every node gets the same Python
python=(--managed-python --python 3.11)
# Where nothing can be downloaded from GitHub: a Python of the machine's own, the same on every node.
[ -z "${STUDYTOOL_PYTHON:-}" ] || python=(--python "$STUDYTOOL_PYTHON")

export PATH="$HOME/.local/bin:$PATH"
if ! command -v uv >/dev/null; then
    curl -LsSf --retry 5 "https://astral.sh/uv/$uv_version/install.sh" | sh
fi

# `uv pip install` reads the pinned versions ([tool.uv] constraint-dependencies) of the project it is started in.
[ -x .venv/bin/python ] || uv venv --quiet "${python[@]}"
uv pip install --quiet --python .venv/bin/python --editable ".[cluster]"

# Two nodes that print the same line here have the same packages.
echo "studytool: $(hostname): $(.venv/bin/python --version), packages $(uv pip freeze --python .venv/bin/python |
    grep -v '^-e ' | sha256sum | cut -c 1-12)"

# So that `ray exec`, `ray attach` and `ray down`, which use a login shell, find Ray. It stands last on the path:
# whatever else the account has goes first.
line="export PATH=\"\$PATH:$PWD/.venv/bin\" RAY_AUTH_MODE=token"
grep -qxF "$line" ~/.bashrc 2>/dev/null || echo "$line" >> ~/.bashrc
