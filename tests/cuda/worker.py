"""Open graphs on CUDA as the engine does, and print as JSON, a line a graph, what is left to the processor.

ONNX Runtime's warnings, on standard error, tell of copies, after a mark for each graph.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

import onnxruntime

from w2v_runtime.engines.assignment import RECORD, misplaced, on_processor
from w2v_runtime.engines.base import CUDA_PROVIDER
from w2v_runtime.engines.onnxruntime import providers
from w2v_runtime.graphs.flash import with_flash_attention
from w2v_runtime.graphs.onnx_file import OnnxFile

#: Stands on standard error before what ONNX Runtime says of each graph.
MARK: Final = "-- graph --"


def ask(path: Path) -> dict[str, object]:
    """How many nodes of shapes, and which others, a graph leaves to the processor."""
    file = OnnxFile.read(path)
    content = file.cut(file.outputs)
    if path.name.startswith("encoder"):
        content = with_flash_attention(content)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    for key, value in {"session.model_external_initializers_file_folder_path": str(path.parent), **RECORD}.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(content, options, providers("cuda"))
    if session.get_providers()[0] != CUDA_PROVIDER:
        sys.exit("the CUDA provider did not load")
    left, wrong = on_processor(session), misplaced(session)
    return {"shapes": (left - wrong).total(), "misplaced": wrong}


if __name__ == "__main__":
    for graph in sys.argv[1:]:
        print(MARK, file=sys.stderr, flush=True)
        print(json.dumps(ask(Path(graph))))
