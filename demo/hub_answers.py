"""Exit with 0 if a hub answers at all, whatever it says, else with 1."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

try:
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    urllib.request.urlopen(f"{address}/api/models?limit=1", timeout=5).close()
except urllib.error.HTTPError:
    pass  # an answer too
except OSError:
    sys.exit(1)
