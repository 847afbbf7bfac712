"""``w2v-doctor``: what works is said to work because it was tried, what does not is named with what mends it."""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import REPOSITORY
from w2v_models.errors import EngineError
from w2v_runtime.commands import examination as doctor
from w2v_runtime.commands.examination import Check, examine
from w2v_runtime.engines import cuda, installed, probe, saturation
from w2v_runtime.engines import onnxruntime as onnxruntime_engine
from w2v_runtime.threads import processors

ort = pytest.importorskip("onnxruntime")
COMMAND = "from w2v_runtime.commands.doctor import main; main()"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No bundles, no home of the user's, no settings."""
    for name in ("W2V_MODEL", "HF_HUB_OFFLINE", "W2V_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("W2V_HOME", str(tmp_path / "home"))


def found(name: str) -> list[Check]:
    return [check for check in examine() if check.name == name]


def run(*arguments: str, flags: tuple[str, ...] = (), **environment: str) -> tuple[int, str, str]:
    """The command in a process of its own: exit code, standard output, standard error."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_without(tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Run the command where some of the installed packages are not; ``extra`` is made first among the others."""

    def run_there(*patterns: str, extra: Callable[[Path], None] = lambda folder: None) -> tuple[int, str, str]:
        folder = tmp_path / "packages"
        folder.mkdir()
        for path in Path(sysconfig.get_path("purelib")).iterdir():
            if not any(fnmatch(path.name, pattern) for pattern in patterns):
                (folder / path.name).symlink_to(path)
        extra(folder)
        rooms = (str(REPOSITORY / "models"), str(REPOSITORY / "runtime"))
        return run("--json", flags=("-S",), PYTHONPATH=os.pathsep.join((str(folder), *rooms)))

    return run_there


def by_name(output: str) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(output)}


def test_what_works_is_ok_and_what_is_not_asked_for_a_note():
    """With ONNX Runtime alone and no bundle: no problem, notes with the command that brings what is missing."""
    checks = {check.name: check for check in examine()}
    assert [checks[name].state for name in ("python", "engine", "cpu", "threads", "audio", "home", "hub")] == ["ok"] * 7
    assert f"{ort.__version__}" in checks["engine"].detail
    assert "libsndfile" in checks["audio"].detail
    assert "MP3" in checks["audio"].detail
    assert "Opus" in checks["audio"].detail
    assert checks["bundle"] == Check(
        "bundle", "note", "none is exported yet", "w2v-export --model facebook/wav2vec2-base-960h"
    )
    assert checks["threads"].detail.startswith(f"{processors.available()}: ")


def test_the_command_prints_a_table_and_for_scripts_json():
    """Both hold the same checks; options in square brackets survive; exit code 0; nothing on standard error."""
    code, text, errors = run()
    assert (code, errors) == (0, "")
    code, output, errors = run("--json")
    assert (code, errors) == (0, "")
    checks = json.loads(output)
    assert all(list(check) == ["name", "state", "detail", "fix"] for check in checks)
    for check in checks:
        assert any(line.split() == f"{check['state']} {check['name']} {check['detail']}".split()
                   for line in text.splitlines())  # fmt: skip
        assert check["fix"] in text
    assert "w2v-onnx[gpu]" in text or by_name(output)["cuda"]["state"] == "ok"


def test_the_probe_is_what_onnx_writes():
    """The bytes are those of a Conv and a MatMul, and the answer is the one computed by hand."""
    onnx = pytest.importorskip("onnx")
    import numpy as np

    value, tensor = onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["c"]), onnx.helper.make_node("MatMul", ["c", "m"], ["y"])],
        "probe",
        [value("x", onnx.TensorProto.FLOAT, [1, 1, 4])],
        [value("y", onnx.TensorProto.FLOAT, [1, 1, 1])],
        [
            tensor(np.array([[[1, 2]]], np.float32), "w"),
            tensor(np.array([[1], [10], [100]], np.float32), "m"),
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    assert onnx.load_from_string(probe.PROBE) == model


def test_the_probe_of_bytes_is_what_onnx_writes():
    """Eight times the largest bytes each, which 16 bits do not hold two of."""
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    weight = numpy_helper.from_array(np.full((8, 16), 127, np.int8), "w")
    values = [
        helper.make_tensor_value_info(name, kind, [1, size])
        for name, kind, size in (("x", onnx.TensorProto.UINT8, 8), ("y", onnx.TensorProto.INT32, 16))
    ]
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "bytes", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    assert onnx.load_from_string(saturation.BYTES) == model
    assert sum((x + 2 * following) * m for x, following, m in ((1, 2, 1), (2, 3, 10), (3, 4, 100))) == probe.ANSWER


def test_no_engine_is_a_problem(run_without):
    """It is what every command says, with its command, and the other checks are made all the same."""
    code, output, errors = run_without("onnxruntime*", "openvino*")
    checks = by_name(output)
    assert (code, errors) == (1, "")
    assert (checks["engine"]["state"], checks["engine"]["detail"]) == ("problem", "installed: none")
    assert checks["engine"]["fix"].startswith("No inference engine is installed: pip install 'w2v-onnx[cpu]'")
    assert checks["audio"]["state"] == "ok"
    assert "cpu" not in checks


def test_two_wheels_on_top_of_each_other_are_a_problem(run_without):
    """Both are named with their versions, and the command that leaves one."""

    def second_wheel(folder: Path) -> None:
        (folder / "onnxruntime_gpu-1.31.1.dist-info").mkdir()
        metadata = "Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 1.31.1\n"
        (folder / "onnxruntime_gpu-1.31.1.dist-info" / "METADATA").write_text(metadata)

    code, output, _ = run_without("onnxruntime_gpu-*", "openvino*", extra=second_wheel)
    check = by_name(output)["engine"]
    assert (code, check["state"]) == (1, "problem")
    assert check["detail"] == f"installed: onnxruntime {ort.__version__}, onnxruntime-gpu 1.31.1"
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'w2v-onnx[gpu]'" in check["fix"]


@pytest.mark.parametrize("left", [None, "raise ImportError('libgone.so.1: cannot open shared object file')"])
def test_what_an_uninstalled_wheel_leaves_is_a_problem(run_without, left):
    """An empty folder in its place, or a module whose library is gone."""

    def leave(folder: Path) -> None:
        (folder / "onnxruntime").mkdir()
        if left:
            (folder / "onnxruntime" / "__init__.py").write_text(left)

    code, output, _ = run_without("onnxruntime*", "openvino*", extra=leave)
    check = by_name(output)["engine"]
    assert (code, check["state"]) == (1, "problem")
    assert check["fix"].startswith("ONNX Runtime is damaged (" + ("libgone" if left else "module"))
    assert check["fix"].endswith("pip install --force-reinstall 'w2v-onnx[cpu]'")


def test_an_engine_that_is_too_old_is_a_problem(monkeypatch):
    """Its version and the one that is needed."""
    monkeypatch.setattr(ort, "__version__", "1.24.1")
    (check,) = found("engine")
    assert check.state == "problem"
    assert "ONNX Runtime 1.24.1 computes padded batches wrongly; 1.25 is needed" in check.fix


def test_an_engine_whose_cuda_lacks_kernels_is_a_problem(monkeypatch):
    """A release of onnxruntime-gpu that leaves most nodes to the processor is refused by name."""
    monkeypatch.setattr(ort, "__version__", "1.26.0")
    assert found("engine")[0].state == "ok"
    monkeypatch.setattr(installed, "installed_version", {"onnxruntime-gpu": "1.26.0"}.get)
    (check,) = found("engine")
    assert check.state == "problem"
    assert "onnxruntime-gpu 1.26.0 leaves most of a model to the processor; 1.27 is needed" in check.fix


def test_a_wrong_answer_is_a_problem(monkeypatch):
    """A processor that computes something else than the known answer."""
    monkeypatch.setattr(probe, "ANSWER", 1.0)
    (check,) = found("cpu")
    assert (check.state, check.fix) == ("problem", "pip install --force-reinstall 'w2v-onnx[cpu]'")
    assert check.detail == "computes 1185.0 on CPUExecutionProvider, where 1.0 is right."


def test_what_native_code_says_is_caught(monkeypatch):
    """It becomes part of the fault, without colours, and standard error stays clean."""

    def broken(*arguments: Any, **options: Any) -> None:
        os.write(2, b"\x1b[1;31m[E:onnxruntime] Failed to load\n library\x1b[m\n")
        raise RuntimeError("no session")

    monkeypatch.setattr(ort, "InferenceSession", broken)
    fault = probe.compute("cpu").fault
    assert fault == "does not compute, where 1185.0 is right. no session [E:onnxruntime] Failed to load library"


def test_a_check_that_fails_is_a_problem(monkeypatch):
    """Whatever it throws is shown in one line, and the other checks are made."""
    imports = builtins.__import__

    def failing(name: str, *arguments: Any) -> Any:
        if name == "soundfile":
            raise OSError("sndfile library\nnot found")
        return imports(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", failing)
    checks = {check.name: check for check in examine()}
    assert checks["audio"].state == "problem"
    assert checks["audio"].detail == "the check itself failed: OSError: sndfile library not found"
    assert checks["audio"].fix == "pip install --force-reinstall soundfile soxr"
    assert checks["hub"].state == "ok"


def test_formats_that_libsndfile_lacks_are_noted(monkeypatch):
    """A libsndfile of before 1.1 decodes no MP3: files of other formats work, so it is no problem."""
    import soundfile

    formats = soundfile.available_formats()
    monkeypatch.setattr(soundfile, "available_formats", lambda: formats.keys() - {"MP3"})
    here, lacking = found("audio")
    assert "decodes WAV, FLAC, Vorbis, Opus)" in here.detail
    assert (lacking.state, lacking.detail) == ("note", "this libsndfile does not decode MP3")


def test_a_home_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    """A file in its way stops root, too; nothing is left behind by trying."""
    assert found("home") == [Check("home", "ok", f"{tmp_path / 'home'} can be written")]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("W2V_HOME", str(tmp_path / "file" / "home"))
    (check,) = found("home")
    assert check.state == "problem"
    assert check.detail == f"{tmp_path / 'file' / 'home'} cannot be written: Not a directory"
    assert check.fix.startswith("export W2V_HOME=")


def test_a_user_without_a_home_is_told_to_name_a_folder(monkeypatch):
    """Where ``~`` stands for nothing, bundles would go to a folder of that name below the current one."""
    monkeypatch.delenv("W2V_HOME")
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    (check,) = found("home")
    assert (check.state, check.detail) == ("problem", "the user has no home folder (HOME is not set)")


def test_bundles_are_opened(monkeypatch, tmp_path, bundles):
    """A good one with its precisions, a damaged one with the export that replaces it."""
    home = tmp_path / "home"
    (home / "my broken").mkdir(parents=True)
    (home / "my broken" / "manifest.json").write_text("{}")
    (home / "tiny").symlink_to(bundles("base"))
    broken, good = found("bundle")
    assert good.state == "ok"
    assert good.detail.endswith(": fp32")
    assert broken.state == "problem"
    assert f"{home}/my broken/manifest.json is not a valid manifest" in broken.detail
    place = f"'{home}/my broken'"
    assert broken.fix == f"rm -rI {place} && w2v-export --model ID --output {place}"

    def read_only(**options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    (check,) = found("home")
    assert check.state == "note"
    assert check.detail.endswith(
        "cannot be written: Read-only file system; its bundles can be used, but none can be exported to it"
    )


def test_a_model_that_is_named_and_not_there_is_a_problem(monkeypatch):
    """``$W2V_MODEL`` is what every command would use."""
    monkeypatch.setenv("W2V_MODEL", "org/none")
    problem = found("bundle")[-1]
    assert (problem.state, problem.detail) == ("problem", "W2V_MODEL is 'org/none'")
    assert problem.fix.endswith("Export it with: w2v-export --model org/none")


def test_offline_mode_is_noted(monkeypatch):
    """As the hub's client reads the variable: 0 is not offline."""
    for value, state in (("1", "note"), ("true", "note"), ("0", "ok"), ("", "ok")):
        monkeypatch.setenv("HF_HUB_OFFLINE", value)
        assert [check.state for check in found("hub")] == [state]


class FakeDriver:
    """``libcuda`` with a version and devices, or with an error of ``cuInit``."""

    def __init__(self, version: int = 13000, devices: tuple[bytes, ...] = (b"Some GPU",), fails: int = 0) -> None:
        self.version, self.devices, self.fails = version, devices, fails

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.fails

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = self.devices[device.value]
        return 0

    def cuGetErrorString(self, code: int, words: Any) -> int:  # noqa: N802
        words._obj.value = b"no CUDA-capable device is detected" if code == 100 else None
        return 0


ALL_OF_13 = {"libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10", "libcudnn.so.9"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine whose ONNX Runtime is built for CUDA 13, with a driver and libraries to choose."""
    chosen = SimpleNamespace(driver=FakeDriver(), libraries=set(ALL_OF_13))

    def load(name: str) -> Any:
        if name == "libcuda.so.1" and chosen.driver:
            return chosen.driver
        if name not in chosen.libraries:
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return None

    def nothing_installed(name: str) -> str:
        raise cuda.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cuda, "_load", load)
    monkeypatch.setattr(cuda, "build", lambda: "13.0")
    monkeypatch.setattr(cuda, "importlib", SimpleNamespace(metadata=SimpleNamespace(
        version=nothing_installed, PackageNotFoundError=cuda.importlib.metadata.PackageNotFoundError)))  # fmt: skip
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return chosen


def test_a_gpu_that_the_build_cannot_use_is_noted(machine):
    """With the wheel for the processor alone, the note names the device and the command that brings CUDA."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    (check,) = found("cuda")
    assert (check.state, check.detail) == ("note", "not in this build of ONNX Runtime; there is Some GPU")
    assert check.fix.endswith("pip uninstall -y onnxruntime && pip install 'w2v-onnx[gpu]'")
    machine.driver = None
    (check,) = found("cuda")
    assert (check.state, check.detail) == ("note", "not in this build of ONNX Runtime; no NVIDIA GPU is seen")


@pytest.mark.parametrize(
    ("driver", "taken", "added", "says"),
    [
        (None, set(), set(), ["NVIDIA's driver does not load (libcuda.so.1: cannot open shared object file"]),
        (FakeDriver(fails=100), set(), set(), ["cuInit returns 100, no CUDA-capable device is detected"]),
        (FakeDriver(fails=7), set(), set(), ["cuInit returns 7, unknown"]),
        (FakeDriver(devices=()), set(), set(), ["NVIDIA's driver shows no device"]),
        (FakeDriver(12040), set(), set(), ["serves CUDA up to 12.4, and this build of ONNX Runtime needs CUDA 13"]),
        (FakeDriver(), {"libcudnn.so.9"}, set(), ["libcudnn.so.9 cannot be loaded"]),
        (
            FakeDriver(),
            {"libcudart.so.13", "libcublas.so.13", "libcublasLt.so.13"},
            {"libcudart.so.12"},
            [
                "libcudart.so.13, libcublas.so.13, libcublasLt.so.13 cannot be loaded; CUDA 12 is here, "
                "and this build needs CUDA 13"
            ],
        ),
        (None, {"libcurand.so.10"}, set(), ["driver does not load", "libcurand.so.10 cannot be loaded"]),
        (FakeDriver(), set(), set(), []),
        (FakeDriver(13020), set(), set(), []),
    ],
)
def test_what_keeps_cuda_from_loading_is_named(machine, driver, taken, added, says):
    """The driver that is missing, failing or too old, and each library that is missing; nothing where all is there."""
    machine.driver = driver
    machine.libraries = ALL_OF_13 - taken | added
    obstacles = cuda.obstacles()
    assert len(obstacles) == len(says)
    for obstacle, words in zip(obstacles, says, strict=True):
        assert words in obstacle.what
        assert obstacle.fix


def test_hidden_devices_are_named(machine, monkeypatch):
    """The variable that hides them is often what is wrong."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.driver = FakeDriver(devices=())
    assert cuda.obstacles()[0].what == "NVIDIA's driver shows no device (CUDA_VISIBLE_DEVICES is '')"


def test_cuda_that_falls_back_to_the_processor_is_a_problem(machine, monkeypatch):
    """The right answer from another provider than the one asked for is not taken for CUDA."""
    monkeypatch.setattr(onnxruntime_engine, "providers", lambda device: [("CPUExecutionProvider", {})])
    machine.libraries -= {"libcudnn.so.9"}
    (check,) = found("cuda")
    assert check == Check("cuda", "problem", "libcudnn.so.9 cannot be loaded", "pip install -U 'w2v-onnx[gpu]'")
    machine.libraries = ALL_OF_13
    (check,) = found("cuda")
    assert check.state == "problem"
    assert check.detail == "computes 1185.0 on CPUExecutionProvider, where 1185.0 is right."


def test_what_preloading_prints_does_not_reach_standard_output(monkeypatch, capfd):
    """Results may go there."""
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("Failed to load libcublas"), raising=False)
    cuda.preload()
    assert capfd.readouterr().out == ""


def test_the_engine_names_the_same_reasons(machine, monkeypatch):
    """``providers`` refuses a device that the build does not have with the words that are shown here."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(EngineError) as caught:
        onnxruntime_engine.providers("cuda")
    assert found("cuda")[0].fix == str(caught.value)


def cgroup(root: Path, membership: str, **files: str) -> Path:
    """A ``proc`` and ``sys`` with these contents of quota files, their paths below the control groups' mount."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for name, content in files.items():
        path = root / "sys" / "fs" / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V1 = "5:devices:/\n1:cpu,cpuacct:/docker/ab\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "50000 0\n"}, None),
        ("0::/\n", {"cpu.max": "nonsense\n"}, None),
        ("0::/\n", {}, None),
        ("", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/a.slice/b.service\n", {"a.slice/cpu.max": "200000 100000", "a.slice/b.service/cpu.max": "max 100000"}, 2),
        ("0::/a.slice/b.service\n", {"a.slice/cpu.max": "200000 100000", "a.slice/b.service/cpu.max": "1 2"}, 0.5),
        ("0::/a.slice\n", {"other.slice/cpu.max": "100000 100000"}, None),
        ("0::/../../x\n", {"cpu.max": "300000 100000"}, 3),
        (V1, {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/docker/ab/cpu.cfs_quota_us": "100000\n", "cpu/docker/ab/cpu.cfs_period_us": "100000\n"}, 1),
        (V1, {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_the_smallest_quota_around_the_process_counts(tmp_path, membership, files, quota):
    """Both versions of control groups; groups around the process's own; mounts of the group itself."""
    assert processors.cgroup_quota(cgroup(tmp_path, membership, **files)) == quota


def test_threads_follow_affinity_and_quota(tmp_path, monkeypatch):
    """The smaller counts, a part of a processor is one, and there is always one."""
    monkeypatch.setattr(processors, "affinity", lambda: 4)
    for quota, count in (("50000", 1), ("150000", 2), ("200000", 2), ("900000", 4), ("max", 4)):
        root = cgroup(tmp_path / quota, "0::/\n", **{"cpu.max": f"{quota} 100000"})
        assert processors.available(root) == count
    assert processors.available(tmp_path / "nothing") == 4


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is set so on Linux alone")
def test_affinity_is_that_of_the_process():
    """A process bound to one processor uses one thread."""
    script = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    script += "from w2v_runtime.threads import processors; print(processors.affinity(), processors.available())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]
