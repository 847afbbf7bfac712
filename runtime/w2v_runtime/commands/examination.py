"""The checks of ``w2v-doctor``: engine, devices, processors, folders, bundles and decoders of this machine.

Whatever can be tried is tried: a device works when it has computed a known answer.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from w2v_models.bundle import Bundle
from w2v_models.errors import BundleError, EngineError
from w2v_models.ownership import own_files
from w2v_runtime.bundles import library
from w2v_runtime.commands.terminal import DISTRIBUTION
from w2v_runtime.engines import probe

State = Literal["ok", "note", "problem"]

_REINSTALL: Final = "pip install --force-reinstall 'w2v-onnx[cpu]'"
_REINSTALL_GPU: Final = "pip install --force-reinstall 'w2v-onnx[gpu]'"
_REINSTALL_OPENVINO: Final = "pip install --force-reinstall 'w2v-onnx[openvino]'"
_CHOOSE_HOME: Final = "export W2V_HOME=/a/folder/that/you/may/write"
#: Values of environment variables that huggingface_hub takes for true.
_TRUE: Final = frozenset(("1", "ON", "YES", "TRUE"))


@dataclass(frozen=True)
class Check:
    """The result of a check: ``ok``, a ``note`` on something optional, or a ``problem``; ``fix`` says what to do."""

    name: str
    state: State
    detail: str
    fix: str = ""


def examine() -> list[Check]:
    """Run every check, in such an order that the first problem is the one to fix first. Never raises."""
    examinations: tuple[tuple[str, Callable[[], Iterator[Check]], str], ...] = (
        ("python", python, _REINSTALL),
        ("engine", engine, _REINSTALL),
        ("threads", threads, "w2v-embed --threads N"),
        ("audio", audio, "pip install --force-reinstall soundfile soxr"),
        ("home", home, _CHOOSE_HOME),
        ("bundle", bundles, _CHOOSE_HOME),
        ("hub", hub, "unset HF_HUB_OFFLINE"),
    )
    return [check for examination in examinations for check in _guarded(*examination)]


def _guarded(name: str, examination: Callable[[], Iterator[Check]], fix: str) -> Iterator[Check]:
    """Run an examination and yield its checks; if it raises, yield a problem with ``fix``."""
    try:
        yield from examination()
    except Exception as error:  # whatever a broken installation throws
        words = " ".join(str(error).split())
        yield Check(name, "problem", f"the check itself failed: {type(error).__name__}: {words}", fix)


def python() -> Iterator[Check]:
    """The interpreter, the platform and this package."""
    version = importlib.metadata.version(DISTRIBUTION)
    yield Check("python", "ok", f"Python {platform.python_version()}, {platform.platform()}, {DISTRIBUTION} {version}")


def engine() -> Iterator[Check]:
    """The installed engines, as every command checks them, and the devices on which they compute."""
    from w2v_runtime.engines.base import AUTO
    from w2v_runtime.engines.choice import choose_device
    from w2v_runtime.engines.installed import WHEELS, installed_version

    installed = {name: installed_version(name) for name in (*WHEELS, "openvino")}
    found = ", ".join(f"{name} {version}" for name, version in installed.items() if version) or "none"
    try:
        choose_device(AUTO, "fp32")
    except EngineError as error:
        yield Check("engine", "problem", f"installed: {found}", str(error))
    else:
        yield Check("engine", "ok", found)
        if importlib.util.find_spec("onnxruntime"):
            yield from _guarded("cpu", cpu, _REINSTALL)
            yield from _guarded("cuda", cuda, _REINSTALL_GPU)
    yield from _guarded("openvino", openvino, _REINSTALL_OPENVINO)


def cpu() -> Iterator[Check]:
    """Whether ONNX Runtime computes on the processor."""
    trial = probe.compute("cpu")
    if trial.is_right:
        yield Check("cpu", "ok", "computes the right answer")
    else:
        yield Check("cpu", "problem", trial.fault, _reinstall())


def cuda() -> Iterator[Check]:
    """Whether ONNX Runtime computes on an NVIDIA GPU; if a build with CUDA does not, what prevents it."""
    from w2v_runtime.engines import cuda as libraries
    from w2v_runtime.engines.base import CUDA_PROVIDER
    from w2v_runtime.engines.onnxruntime import providers

    try:
        providers("cuda")
    except EngineError as error:
        seen = "no NVIDIA GPU is seen"
        with contextlib.suppress(libraries.DriverError):
            seen = f"there is {', '.join(libraries.driver().devices) or 'no NVIDIA GPU'}"
        yield Check("cuda", "note", f"not in this build of ONNX Runtime; {seen}", str(error))
        return
    libraries.preload()
    trial = probe.compute("cuda")
    if trial.provider == CUDA_PROVIDER and trial.is_right:
        devices = ", ".join(libraries.driver().devices)
        yield Check("cuda", "ok", f"computes the right answer with CUDA {libraries.build()} on {devices}")
        return
    obstacles = libraries.obstacles()
    for obstacle in obstacles:
        yield Check("cuda", "problem", obstacle.what, obstacle.fix)
    if not obstacles:
        yield Check("cuda", "problem", trial.fault, _reinstall())


def openvino() -> Iterator[Check]:
    """Whether OpenVINO, where it is installed, computes on the processor."""
    if importlib.util.find_spec("openvino") is None:
        yield Check("openvino", "note", "not installed, and not needed beside ONNX Runtime")
        return
    from w2v_runtime.engines.openvino import PRECISION_HINTS, capabilities, load

    able = capabilities(load().Core())
    precisions = [name for name, hint in PRECISION_HINTS.items() if name == "fp32" or hint.upper() in able]
    for precision in precisions:
        trial = probe.compute("openvino", precision)
        if not trial.is_right:
            yield Check("openvino", "problem", f"in {precision} it {trial.fault}", _REINSTALL_OPENVINO)
            return
    without = "" if "bf16" in precisions else "; it has no bfloat16"
    detail = f"computes the right answer in {' and '.join(precisions)} on {trial.provider} ({', '.join(able)}){without}"
    yield Check("openvino", "ok", detail)


def threads() -> Iterator[Check]:
    """How many threads the engine gets without ``--threads``, and why."""
    from w2v_runtime.threads import processors

    quota = processors.cgroup_quota()
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    yield Check(
        "threads",
        "ok",
        f"{processors.available()}: the machine has {os.cpu_count()} processors, {processors.affinity()} by affinity, "
        f"{limit} by control group",
    )


def home() -> Iterator[Check]:
    """Whether the folder of exported bundles can be written."""
    folder = _home()
    if folder is None:
        yield Check("home", "problem", "the user has no home folder (HOME is not set)", _CHOOSE_HOME)
        return
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        detail = f"{folder} cannot be written: {error.strerror}"
        exported = list[Bundle]()
        with contextlib.suppress(BundleError):
            exported = library.exported()
        if exported:
            yield Check("home", "note", f"{detail}; its bundles can be used, but none can be exported to it")
        else:
            yield Check("home", "problem", detail, _CHOOSE_HOME)
    else:
        yield Check("home", "ok", f"{folder} can be written")


def bundles() -> Iterator[Check]:
    """The exported bundles, and whether each can be opened."""
    try:
        folders = library.folders()
    except BundleError as error:
        yield Check("bundle", "problem", str(error), _CHOOSE_HOME)
        return
    for folder in folders:
        try:
            bundle = Bundle.open(folder)
        except BundleError as error:
            yield Check("bundle", "problem", str(error), _export_again(folder))
        else:
            source = bundle.manifest.source
            weights = ", random weights" if source.random else ""
            yield Check("bundle", "ok", f"{source.model}: {', '.join(bundle.held)}{weights}")
    if not folders:
        yield Check("bundle", "note", "none is exported yet", "w2v-export --model facebook/wav2vec2-base-960h")
    if os.environ.get("W2V_MODEL"):
        try:
            library.find()
        except BundleError as error:
            yield Check("bundle", "problem", f"W2V_MODEL is {os.environ['W2V_MODEL']!r}", str(error))


def _export_again(folder: Path) -> str:
    """The command that replaces a bundle that cannot be opened."""
    place = shlex.quote(str(folder))
    try:
        own_files(folder)
    except BundleError:  # its files may be anybody's, so rm asks first
        return f"rm -rI {place} && w2v-export --model ID --output {place}"
    return f"w2v-export --model ID --output {place} --overwrite"


def hub() -> Iterator[Check]:
    """Whether the hub may be asked for checkpoints; nothing is asked here."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE:
        yield Check(
            "hub", "note", "HF_HUB_OFFLINE is set: only local checkpoints can be exported", "unset HF_HUB_OFFLINE"
        )
    else:
        yield Check("hub", "ok", "may be asked for checkpoints; whether it answers was not tried")


def audio() -> Iterator[Check]:
    """The decoder and the resampler, and the compressed formats that the decoder knows."""
    import soundfile
    import soxr

    held = soundfile.available_formats()
    known = {name: name in held for name in ("FLAC", "MP3")}
    known |= {name: name.upper() in soundfile.available_subtypes("OGG") for name in ("Vorbis", "Opus")}
    decodes = ", ".join(name for name, is_known in known.items() if is_known)
    yield Check(
        "audio",
        "ok",
        f"soundfile {soundfile.__version__}, libsndfile {soundfile.__libsndfile_version__} (decodes WAV, {decodes}), "
        f"soxr {soxr.__version__}",
    )
    if missing := [name for name, is_known in known.items() if not is_known]:
        fix = "pip install --force-reinstall soundfile (its wheels bring a libsndfile that does)"
        yield Check("audio", "note", f"this libsndfile does not decode {', '.join(missing)}", fix)


def _home() -> Path | None:
    """The folder of exported bundles, None for a user without a home folder."""
    try:
        return library.home()
    except BundleError:
        return None


def _reinstall() -> str:
    """The command that reinstalls the installed engine."""
    from w2v_runtime.engines.installed import installed_version

    return _REINSTALL_GPU if installed_version("onnxruntime-gpu") else _REINSTALL
