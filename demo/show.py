"""Show what an embeddings file holds: a row a recording.

python demo/show.py embeddings.npz
"""

from __future__ import annotations

import json
import sys

import numpy as np
from rich.console import Console
from rich.table import Table


def main(path: str) -> None:
    """Print the recordings, the first numbers of their embeddings, and how alike they are."""
    with np.load(path) as output:
        embeddings, metadata = output["embeddings"], json.loads(str(output["metadata"]))
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        title = f"{metadata['model']}: {len(embeddings)} embeddings of {embeddings.shape[1]} numbers"
        table = Table("recording", "seconds", "embedding", "cosine with the first", title=title)
        for file, seconds, row, cosine in zip(
            output["paths"], output["durations"], embeddings, unit @ unit[0], strict=True
        ):
            numbers = " ".join(f"{value:+.3f}" for value in row[:4])
            table.add_row(str(file), f"{seconds:.2f}", f"{numbers} …", f"{cosine:.4f}")
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(table)
    if metadata["random_weights"]:
        console.print("These are seeded random weights: shapes and speed are real, the embeddings mean nothing.")
    print(f"Read them with: numpy.load({path!r})['embeddings']")


if __name__ == "__main__":
    main(sys.argv[1])
