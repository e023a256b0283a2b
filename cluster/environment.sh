# shellcheck shell=bash
# What Ray needs on every node; the cluster files read it (`.`) before `ray start`.
studytool_home="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PATH="$studytool_home/.venv/bin:$PATH"
export RAY_AUTH_MODE=token               # nobody without ~/.ray/auth_token can run anything on the cluster
export RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV=0   # the nodes have the project; nothing is shipped with a job
export RAY_memory_monitor_refresh_ms=0   # Ray would end the whole study where one trial runs out of memory
export MLFLOW_DISABLE_TELEMETRY=true
ulimit -n 65536 2>/dev/null || ulimit -n "$(ulimit -Hn)"
