"""Ask a session of ONNX Runtime on CUDA which operators it leaves to the processor.

Every node that CUDA has no kernel for runs on the processor, with a copy of its inputs and outputs, and ONNX Runtime
says nothing of it. It also leaves the arithmetic of shapes there on purpose, which costs nothing.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from w2v_runtime.engines.base import CUDA_PROVIDER

#: The entry of a session's options that lets it tell: ONNX Runtime 1.24 and newer.
RECORD: Final = {"session.record_ep_graph_assignment_info": "1"}
#: What shapes are computed with. Not ``Cast`` and ``Transpose``: an old release was seen to leave these, with whole
#: batches; and it left ``Reshape`` only where it left one of these.
_SHAPES: Final = frozenset(
    (
        *("Add", "Concat", "Div", "Equal", "Gather", "Max", "Min", "Mod", "Mul", "Neg", "Range", "Reshape", "Shape"),
        *("Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
    )
)


def on_processor(session: Any) -> Counter[str]:
    """The operators of a session on CUDA that run on the processor, with how often: all of them."""
    left: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name != CUDA_PROVIDER:
            left.update(node.op_type for node in part.get_nodes())
    return left


def misplaced(session: Any) -> Counter[str]:
    """Those of them that work on more than shapes; each costs two copies of a batch."""
    return Counter({operator: count for operator, count in on_processor(session).items() if operator not in _SHAPES})
