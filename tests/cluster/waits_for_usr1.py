"""A worker that ends well only if USR1 reaches it. Its first argument is a folder: it says there what happened."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

me = Path(sys.argv[1]) / os.environ.get("RANK", "0")
heard = []
signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
me.with_suffix(".ready").touch()
deadline = time.monotonic() + 100
while not heard and time.monotonic() < deadline:
    time.sleep(0.1)
time.sleep(1)  # a launcher that USR1 had killed would take this process with it
me.with_suffix(".heard" if heard else ".silence").touch()
sys.exit(0 if heard else 3)
