"""What Ray reads from the environment when it is imported; whoever imports Ray imports this before."""

from __future__ import annotations

import os

# No telemetry, no folder change under a trial, no loggers of Ray's own, no shipping of the working folder.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Workers started before they are asked for do not fit Ray Tune's, and cost two seconds of a core.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
# Nothing of Ray's own processes comes to our terminal: the observers say what happened, once.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
