"""Write the tests' tiny bundles into a folder, for running the tests where there is no PyTorch.

python tests/make_bundles.py FOLDER
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from conftest import save_checkpoint
from w2v_export import export_bundle


def main(folder: Path) -> None:
    """Save, export and prove one tiny checkpoint of each kind."""
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        for kind in ("base", "large", "emotion"):
            export_bundle(save_checkpoint(Path(temporary) / f"tiny-{kind}", kind), folder / kind)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
