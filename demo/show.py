"""Show what an embeddings file holds: a row a recording.

python demo/show.py embeddings.npz
"""

from __future__ import annotations

import json
import sys

import numpy as np

from w2v_runtime.commands.tables import Table, width_of


def main(path: str) -> None:
    """Print the recordings, the first numbers of their embeddings, and how alike they are."""
    with np.load(path) as output:
        embeddings, metadata = output["embeddings"], json.loads(str(output["metadata"]))
        unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        title = f"{metadata['model']}: {len(embeddings)} embeddings of {embeddings.shape[1]} numbers"
        header, rows = ("recording", "seconds", "embedding", "cosine with first"), []
        for file, seconds, row, cosine in zip(
            output["paths"], output["durations"], embeddings, unit @ unit[0], strict=True
        ):
            numbers = " ".join(f"{value:+.3f}" for value in row[:2])
            rows.append((str(file), f"{seconds:.2f}", f"{numbers} …", f"{cosine:.4f}"))
    for line in Table(title, header, rows, right=frozenset({1, 3})).lines(width_of(sys.stdout)):
        print(line)
    if metadata["random_weights"]:
        print("These are seeded random weights: shapes and speed are real, the embeddings mean nothing.")
    print(f"Read them with: numpy.load({path!r})['embeddings']")


if __name__ == "__main__":
    main(sys.argv[1])
