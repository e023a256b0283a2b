#!/usr/bin/env bash
# Starts MLflow's server on this machine's own address 127.0.0.1, unless it runs already; reach it by an SSH tunnel.
# Its store is a file in the home folder. It is a view: a study that goes on fills an empty store again.
set -euo pipefail
port="${STUDYTOOL_MLFLOW_PORT:-5000}"
# shellcheck source=cluster/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
folder="$HOME/mlflow"
mkdir -p "$folder" && chmod 700 "$folder"
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
# The lock is held by the server itself and goes with it.
setsid nohup flock --nonblock "$folder/lock" \
    mlflow server --host 127.0.0.1 --port "$port" --workers 1 --allowed-hosts "localhost:*,127.0.0.1:*" \
    --backend-store-uri "sqlite:///$folder/mlflow.db" --artifacts-destination "$folder/artifacts" \
    >> "$folder/server.log" 2>&1 < /dev/null &
