"""ONNX Runtime, on the processor or on CUDA. The one place that knows its providers and their options."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError, OutOfMemoryError, W2VError
from w2v_runtime.engines import cuda as cuda_libraries
from w2v_runtime.engines.base import CPU, CUDA, Array, Stopwatch, option, stored_precision
from w2v_runtime.engines.host_memory import Buffers, page_locked, pageable
from w2v_runtime.engines.installed import first_line
from w2v_runtime.engines.saturation import saturates
from w2v_runtime.graphs.sessions import Graph, GraphFile, Sessions
from w2v_runtime.threads import forks
from w2v_runtime.threads.stop import Stop

_CUDA_PROVIDER: Final = "CUDAExecutionProvider"
_CUDA_OPTIONS: Final = {
    # The convolutions of the fp32 graph; that of fp16 has none. EXHAUSTIVE, the default, searches again for every new
    # length; more workspace lets the heuristic take faster algorithms, as does a second axis before the samples.
    "cudnn_conv_algo_search": "HEURISTIC",
    "cudnn_conv_use_max_workspace": "1",
    "cudnn_conv1d_pad_to_nc1d": "1",
    # Lengths differ all the time: in powers of two, the default, the arena would grow to twice what is in use.
    "arena_extend_strategy": "kSameAsRequested",
    # Norms that took in the sum before them add up in float32, in fp16 too.
    "enable_skip_layer_norm_strict_mode": "1",
}
#: Runs that may be in progress at once. On CUDA, one computes while the other's data travel.
_CONCURRENCY: Final = {CPU: 1, CUDA: 2}
#: Graphs that stay open beside the one that the engine was opened for. On the processor they share its mapped weights;
#: a GPU holds those of each.
_RECENT: Final = {CPU: 4, CUDA: 2}
#: Samples of a run, padding included, whose memory such a graph keeps for the next; a larger run's is given back.
_KEPT_SAMPLES: Final = 16 * 16_000
#: Levels of ONNX Runtime's log.
_ERRORS, _FATAL = 3, 4
#: How ONNX Runtime's arena, CUDA and its libraries say that memory is short.
_OUT_OF_MEMORY: Final = re.compile(r"Failed to allocate memory|out of memory|bad_alloc|_ALLOC_FAILED", re.IGNORECASE)


def providers(device: str, precision: str = "fp32") -> list[tuple[str, dict[str, str]]]:
    """The providers to ask for, best first.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        precision: of the computation.

    Raises:
        EngineError: this build does not have the device.
    """
    import onnxruntime

    kind, _, index = device.partition(":")
    cpu: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if kind == CPU:
        return [cpu]
    if _CUDA_PROVIDER not in onnxruntime.get_available_providers():
        raise EngineError(
            "This build of ONNX Runtime has no CUDA: pip uninstall -y onnxruntime && pip install 'w2v-onnx[gpu]'"
        )
    chosen = {"device_id": index or "0", "use_tf32": "1" if precision == "tf32" else "0"}
    return [(_CUDA_PROVIDER, _CUDA_OPTIONS | chosen), cpu]


@dataclass(frozen=True)
class _Session:
    """An open session, the inputs of its graph, and whether the memory of a large run is given back behind it."""

    session: Any
    inputs: frozenset[str]
    gives_back: bool


class OnnxRuntimeEngine:
    """Sessions of ONNX Runtime.

    Args:
        bundle: the model.
        precision: one that the device computes.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads of a run on the processor.
        prepack: whether weights are rearranged for the processor when the first graph is opened. It takes most of the
            opening and copies them, so no other graph does it; results differ in their last bits from those without.

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
            # For each session it warns that the CUDA of its own build is no plugin, which nobody asked for.
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
        options.log_severity_level = _FATAL  # errors come as exceptions, and need not be printed as well
        options.enable_mem_pattern = False  # patterns are planned for one shape; ours all differ
        # Packed weights are held beside the mapped ones. In windows, long inputs hide the packing, and make the arena
        # hold a third more than is in use.
        prepack, options.enable_cpu_mem_arena = self._prepack and graph.main, graph.name != "windows"
        entries = {
            "session.model_external_initializers_file_folder_path": str(graph.path.parent),
            "session.disable_prepacking": "0" if prepack else "1",
            "session.x64quantprecision": "1" if self._stored == "int8" and saturates() else "0",
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        content = graph.content.cut(graph.outputs)
        try:
            with forks.held_off():
                session = onnxruntime.InferenceSession(content, options, providers=self._providers)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            raise BundleError(f"{graph.path} cannot be opened by ONNX Runtime: {first_line(error)}") from None
        if self.device == CUDA and _CUDA_PROVIDER not in session.get_providers():
            reasons = [f"{obstacle.what} ({obstacle.fix})" for obstacle in cuda_libraries.obstacles()]
            raise EngineError(
                "CUDA was asked for but does not load: "
                f"{'; '.join(reasons) or 'ONNX Runtime fell back to the CPU (w2v-doctor may say why)'}. "
                f"Without it: {option('device', CPU)}."
            )
        inputs = frozenset(value.name for value in session.get_inputs())
        return _Session(session, inputs, self.device == CPU and options.enable_cpu_mem_arena and not graph.main)

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
    """The process that was the first to use CUDA, here or in one that this was forked from."""
    return os.getpid()


def _run_bound(
    session: Any, buffers: Buffers, feeds: Mapping[str, Array], outputs: Sequence[str], run: Any
) -> list[Array]:
    """Run a session from memory that its device reads itself; of what it computes, only ``outputs`` come back."""
    binding = session.io_binding()
    with buffers.borrowed() as buffer:
        for name, value in buffer.filled(feeds).items():
            binding.bind_cpu_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding, run)
        results: list[Array] = binding.copy_outputs_to_cpu()
    return results
