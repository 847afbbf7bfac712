"""The ONNX Runtime engine, on the processor or on CUDA: the only module that knows its providers and options."""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError, OutOfMemoryError, W2VError
from w2v_runtime.engines import assignment
from w2v_runtime.engines import cuda as cuda_libraries
from w2v_runtime.engines.base import CPU, CUDA, CUDA_PROVIDER, Array, Stopwatch, option, stored_precision
from w2v_runtime.engines.host_memory import Buffers, page_locked, pageable
from w2v_runtime.engines.installed import first_line
from w2v_runtime.engines.saturation import saturates
from w2v_runtime.graphs.flash import with_flash_attention
from w2v_runtime.graphs.sessions import Graph, GraphFile, Sessions
from w2v_runtime.threads import forks
from w2v_runtime.threads.stop import Stop

_CUDA_OPTIONS: Final = {
    # For the convolutions of the fp32 graph; the fp16 graph has none. EXHAUSTIVE, the default, searches again for every
    # new length; more workspace lets the heuristic take faster algorithms, as does a second axis before the samples.
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    "cudnn_conv1d_pad_to_nc1d": "1",
    # Input lengths vary: with the default, powers of two, the memory arena would grow to twice what is in use.
    "arena_extend_strategy": "kSameAsRequested",
    # Layer norms that are fused with the residual sum before them add up in float32, in the fp16 graph too.
    "enable_skip_layer_norm_strict_mode": "1",
}
#: Runs that may be in progress at once. On CUDA, one computes while the data of the other are copied.
_CONCURRENCY: Final = {CPU: 1, CUDA: 2}
#: Sessions that stay open beside the one that the engine was opened for. On the processor they share its memory-mapped
#: weights; a GPU holds the weights of each session.
_RECENT: Final = {CPU: 4, CUDA: 2}
#: The largest run, in samples with padding, after which such a session keeps its memory arena; else it is shrunk.
_KEPT_SAMPLES: Final = 16 * 16_000
#: The graph that sees many frames at once.
_ENCODER: Final = "encoder"
#: Severity levels of ONNX Runtime's log.
_ERRORS, _FATAL = 3, 4
#: How ONNX Runtime's arena, CUDA and its libraries say that memory is short.
_OUT_OF_MEMORY: Final = re.compile(r"Failed to allocate memory|out of memory|bad_alloc|_ALLOC_FAILED", re.IGNORECASE)


def providers(device: str, precision: str = "fp32") -> list[tuple[str, dict[str, str]]]:
    """The execution providers of a device, with their options, in order of preference.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: the precision of the computation.

    Raises:
        EngineError: this build of ONNX Runtime has no CUDA.
    """
    import onnxruntime

    kind, _, index = device.partition(":")
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if kind == CPU:
        return [cpu]
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise EngineError(
            "This build of ONNX Runtime has no CUDA: pip uninstall -y onnxruntime && pip install 'w2v-onnx[gpu]'"
        )
    chosen = {"device_id": index or "0", "use_tf32": "1" if precision == "tf32" else "0"}
    return [(CUDA_PROVIDER, _CUDA_OPTIONS | chosen), cpu]


@dataclass(frozen=True)
class _Session:
    """An open session, the inputs of its graph, and whether its memory arena is shrunk after a large run."""

    session: Any
    inputs: frozenset[str]
    gives_back: bool


class OnnxRuntimeEngine:
    """Runs the graphs of a bundle in sessions of ONNX Runtime.

    Args:
        bundle: the model.
        precision: a precision that the device computes.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads of a run on the processor.
        prepack: whether the first session rearranges (prepacks) its weights for the processor. Prepacking copies the
            weights and takes most of the opening time, so no other session does it. It changes results in their last
            bits.

    Raises:
        BundleError: the bundle lacks the precision.
        EngineError: this build of ONNX Runtime does not have the device.
    """

    def __init__(self, bundle: Bundle, precision: str, device: str, threads: int, prepack: bool) -> None:
        import onnxruntime

        self._stored = stored_precision(precision)
        self.device = CUDA if device.startswith(CUDA) else CPU
        self._sessions = Sessions(bundle, self._stored, self._open, _RECENT[self.device])
        self._providers, self._threads, self._prepack = providers(device, precision), threads, prepack
        self.concurrency = _CONCURRENCY[self.device]
        self._buffers: Buffers | None = None
        if self.device == CUDA:
            # Silences a warning for each session that the built-in CUDA provider is no plugin.
            onnxruntime.set_default_logger_severity(_ERRORS)
            cuda_libraries.preload()
            cudart = cuda_libraries.runtime_library()
            number = int(device.partition(":")[2] or 0)
            self._buffers = Buffers(page_locked(cudart, number) if cudart else pageable)
        self._busy = Stopwatch()
        self._new_run = onnxruntime.RunOptions

    @property
    def busy_seconds(self) -> float:
        return self._busy.seconds

    def prepare(self, outputs: Sequence[str], graph: Graph = "graph") -> None:
        self._sessions.get(outputs, graph)

    def _open(self, graph: GraphFile) -> _Session:
        import onnxruntime

        if self.device == CUDA and _cuda_process() != os.getpid():
            raise EngineError(
                "CUDA cannot be used in a process that was forked from one that uses it; start processes anew: "
                "multiprocessing.get_context('spawn')."
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = _FATAL  # errors are raised as exceptions, so they need not be logged
        options.enable_mem_pattern = False  # a pattern is planned for one input shape; ours all differ
        if self._stored == "fp16" and self.device == CPU:
            # A processor only proves that graph. At the highest level ONNX Runtime 1.32 crashes while it opens the fp16
            # graph of a small conformer, on a processor without AVX-512.
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        # Prepacked weights take memory beside the memory-mapped ones.
        prepack = self._prepack and (graph.main or graph.name == _ENCODER)
        entries = {
            "session.model_external_initializers_file_folder_path": str(graph.path.parent),
            "session.disable_prepacking": "0" if prepack else "1",
            "session.x64quantprecision": "1" if self._stored == "int8" and saturates() else "0",
        }
        if self.device == CUDA:
            entries |= assignment.RECORD
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        content = graph.content.cut(graph.outputs)
        if graph.name == _ENCODER:
            content = with_flash_attention(content)
        try:
            with forks.held_off():
                session = onnxruntime.InferenceSession(content, options, providers=self._providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleError(f"{graph.path} cannot be opened by ONNX Runtime: {first_line(error)}") from None
        if self.device == CUDA and CUDA_PROVIDER not in session.get_providers():
            reasons = [f"{obstacle.what} ({obstacle.fix})" for obstacle in cuda_libraries.obstacles()]
            raise EngineError(
                "CUDA was asked for but does not load: "
                f"{'; '.join(reasons) or 'ONNX Runtime fell back to the CPU (w2v-doctor may say why)'}. "
                f"Without it: {option('device', CPU)}."
            )
        if self.device == CUDA and (left := assignment.misplaced(session)):
            operators = ", ".join(f"{count} {operator}" for operator, count in left.most_common())
            warnings.warn(
                f"CUDA leaves operators of {graph.path.name} to the processor, which makes it slow: {operators}. "
                "Another release of onnxruntime-gpu may take them.",
                RuntimeWarning,
                stacklevel=2,
            )
        inputs = frozenset(value.name for value in session.get_inputs())
        return _Session(session, inputs, gives_back=self.device == CPU and not graph.main)

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str], graph: Graph = "graph", stop: Stop | None = None
    ) -> list[Array]:
        opened = self._sessions.get(outputs, graph)
        needed = {name: value for name, value in feeds.items() if name in opened.inputs}
        run, stop = self._new_run(), stop or Stop()
        if opened.gives_back and max(value.size for value in needed.values()) > _KEPT_SAMPLES:
            run.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        try:
            with stop.ending(functools.partial(setattr, run, "terminate", True)), self._busy:
                if self._buffers is None:
                    results: list[Array] = opened.session.run(list(outputs), needed, run)
                    return results
                return _run_bound(opened.session, self._buffers, needed, outputs, run)
        except W2VError:
            raise
        except Exception as error:
            stop.check()
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feeds.items())
            short = _OUT_OF_MEMORY.search(str(error)) or isinstance(error, MemoryError)
            kind = OutOfMemoryError if short else W2VError
            raise kind(f"The engine failed on {shapes}: {first_line(error)}") from error


@functools.cache
def _cuda_process() -> int:
    """The id of the first process that used CUDA: this one, or the one that it was forked from."""
    return os.getpid()


def _run_bound(
    session: Any, buffers: Buffers, feeds: Mapping[str, Array], outputs: Sequence[str], run: Any
) -> list[Array]:
    """Run a session with inputs from page-locked memory (IO binding); only ``outputs`` are copied back to the host."""
    binding = session.io_binding()
    with buffers.borrowed() as buffer:
        for name, value in buffer.filled(feeds).items():
            binding.bind_cpu_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding, run)
        results: list[Array] = binding.copy_outputs_to_cpu()
    return results
