"""Where ``w2v-export`` and ``export_bundle`` write, and what they never touch: real exports, kills and full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from commands import wait_for
from w2v_models import Bundle, CheckpointError, OutputError
from w2v_models.bundle import sha256

pytest.importorskip("torch")

from w2v_export import export_bundle
from w2v_export.refusals import refuse_early

MAIN = "from w2v_export.cli import main; main()"


def start(*arguments: object, before: str = "", **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def export(*arguments: object, before: str = "", **environment: str) -> tuple[int, str, str]:
    """Run the command to its end: its exit code, standard output and standard error."""
    process = start(*arguments, before=before, **environment)
    output, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    return process.returncode, output, errors


def contents(folder: Path) -> dict[str, str | None]:
    """Every path below a folder, with the hash of what is in it."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else sha256(path) for path in found}


def test_one_of_two_exports_writes_and_what_a_killed_one_left_is_swept(checkpoints, tmp_path):
    """After kill -9 in the middle, another export to that place: a third beside it is refused, it completes alone."""
    home = tmp_path / "no" / "home"
    arguments = ("--model", checkpoints("base"))
    staging = home / ".tiny-base.w2v-new"
    killed = start(*arguments, W2V_HOME=str(home))
    wait_for((staging / "onnx" / "model.onnx").exists, killed)
    killed.kill()
    killed.communicate(timeout=60)
    assert not (home / "tiny-base").exists()

    first = start(*arguments, W2V_HOME=str(home))
    wait_for(lambda: (staging / ".unfinished").exists() and not (staging / "onnx").exists(), first)
    first.send_signal(signal.SIGSTOP)
    code, output, errors = export(*arguments, W2V_HOME=str(home))
    first.send_signal(signal.SIGCONT)
    assert (code, output) == (2, "")
    assert f"tiny-base is being written by process {first.pid} " in errors
    assert len(errors.splitlines()) == 1
    output, errors = first.communicate(timeout=120)
    assert (first.returncode, output) == (0, f"{home}/tiny-base\n"), errors
    assert os.listdir(home) == ["tiny-base"]
    bundle = Bundle.open(home / "tiny-base")
    for record in bundle.manifest.files:
        bundle.check(record, remembered=False)


@pytest.mark.parametrize("relation", ["parent", "itself", "below", "link to it", "through a link"])
def test_the_checkpoint_is_never_an_output(checkpoints, bundles, tmp_path, relation):
    """Not its folder, not one around it, not one in it, whatever links lead there; even where a bundle is around it."""
    around = Path(shutil.copytree(bundles("large"), tmp_path / "around"))
    checkpoint = Path(shutil.copytree(checkpoints("base"), around / "checkpoint"))
    (tmp_path / "link").symlink_to(checkpoint)
    (tmp_path / "detour").symlink_to(around)
    output = {
        "parent": around,
        "itself": checkpoint,
        "below": checkpoint / "bundle",
        "link to it": tmp_path / "link",
        "through a link": tmp_path / "detour",
    }[relation]
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="the checkpoint"):
            export_bundle(tmp_path / "link", output, overwrite=overwrite)
    code, _, errors = export("--model", checkpoint, "--output", output, "--overwrite")
    assert code == 2
    assert "the checkpoint" in errors
    assert "loading" not in errors
    assert contents(tmp_path) == before


def test_only_a_bundle_is_replaced(checkpoints, bundles, tmp_path):
    """By the command as by the function: exit 2 with the first file that is not a bundle's, and all of it stays."""
    mine = Path(shutil.copytree(bundles("base"), tmp_path / "mine"))
    (mine / "app" / "src").mkdir(parents=True)
    (mine / "app" / "src" / "thesis.txt").write_text("precious")
    before = contents(mine)
    code, output, errors = export("--model", checkpoints("base"), "--output", mine, "--overwrite")
    assert (code, output) == (2, "")
    assert f"{mine} holds app/src/thesis.txt, which is no file of its bundle, so it is not replaced" in errors
    assert "loading" not in errors
    with pytest.raises(OutputError, match=r"holds app/src/thesis\.txt"):
        export_bundle(checkpoints("base"), mine, overwrite=True)
    assert contents(mine) == before


def test_an_output_that_appears_during_the_export_stays(checkpoints, tmp_path):
    """Without overwrite nothing that came to stand there is deleted, and no word of the bundle is left."""
    output = tmp_path / "place" / "bundle"

    def appear(stage: str, done: int, total: int) -> None:
        if stage.startswith("comparing") and not output.exists():
            output.mkdir()
            (output / "thesis.txt").write_text("precious")

    with pytest.raises(OutputError, match="bundle exists already"):
        export_bundle(checkpoints("base"), output, report=appear)
    assert contents(tmp_path / "place").keys() == {"bundle", "bundle/thesis.txt"}
    assert (output / "thesis.txt").read_text() == "precious"


def test_a_checkpoint_that_makes_no_bundle_replaces_none(checkpoints, bundles, tmp_path):
    """A sampling rate with a point, which no manifest takes, is refused before the work, and the good bundle stays."""
    checkpoint = Path(shutil.copytree(checkpoints("base"), tmp_path / "checkpoint"))
    extractor = json.loads((checkpoint / "preprocessor_config.json").read_text())
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(extractor | {"sampling_rate": 16000.0}))
    good = Path(shutil.copytree(bundles("large"), tmp_path / "place" / "good"))
    before, stages = contents(good), list[str]()
    with pytest.raises(CheckpointError, match=r"sampl\w+rate must be .*16000\.0"):
        export_bundle(checkpoint, good, overwrite=True, report=lambda stage, done, total: stages.append(stage))
    assert set(stages) <= {"loading the checkpoint"}
    assert contents(good) == before
    assert os.listdir(good.parent) == ["good"]


def test_a_model_without_a_name_is_refused(tmp_path, monkeypatch):
    """Its bundle would take the place of the folder of all bundles."""
    monkeypatch.setenv("W2V_HOME", str(tmp_path / "home"))
    with pytest.raises(CheckpointError, match="no model is named"):
        refuse_early("", None, ["fp32"], None, False, True, True)


def test_a_limit_of_file_sizes_stops_an_export(checkpoints, bundles, tmp_path):
    """As a full disk does: exit 1, the reason and the place, the earlier bundle whole, and nothing beside it."""
    good = Path(shutil.copytree(bundles("large"), tmp_path / "place" / "good"))
    before = contents(good)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    code, output, errors = export(
        "--model", checkpoints("base"), "--output", good, "--overwrite", before=limited, W2V_HOME=str(tmp_path)
    )
    assert (code, output) == (1, "")
    assert errors.splitlines()[-1] == (
        f"w2v-export: error: {good} cannot be written: File too large. Nothing was left behind."
    )
    assert contents(good) == before
    assert os.listdir(good.parent) == ["good"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_full_file_system_stops_an_export(checkpoints, tmp_path):
    """One that fills up in the middle of the weights: exit 1 with its own words, and the disk as empty as before."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting is not possible here")
    try:
        code, output, errors = export("--model", checkpoints("base"), "--output", place / "bundle")
        assert (code, output) == (1, "")
        assert errors.splitlines()[-1] == (
            f"w2v-export: error: {place}/bundle cannot be written: No space left on device. Nothing was left behind."
        )
        assert os.listdir(place) == []
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_home_that_cannot_be_written_is_refused_at_once(checkpoints, bundles, tmp_path):
    """A read-only disk takes no bundle, and those on it are found all the same."""
    place = tmp_path / "disk"
    shutil.copytree(bundles("base"), place / "bundle")
    if subprocess.run(["mount", "--bind", place, place], check=False).returncode:
        pytest.skip("mounting is not possible here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        for home in (place, place / "a" / "home"):
            code, _, errors = export("--model", checkpoints("base"), W2V_HOME=str(home))
            assert code == 2
            assert f"tiny-base cannot be written: no permission to write in {place}" in errors
            assert len(errors.splitlines()) == 1
        listed = subprocess.run(
            [sys.executable, "-c", "from w2v_runtime.commands.models import main; main()", "show", "bundle"],
            env=os.environ | {"W2V_HOME": str(place)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert listed.stdout.startswith(f"{place}/bundle\n")
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_stop_by_a_signal_leaves_the_earlier_bundle(checkpoints, bundles, tmp_path):
    """SIGTERM while the graphs are written: exit 130, the earlier bundle whole, nothing beside it."""
    good = Path(shutil.copytree(bundles("large"), tmp_path / "place" / "good"))
    before = contents(good)
    process = start("--model", checkpoints("base"), "--output", good, "--overwrite")
    wait_for((good.parent / ".good.w2v-new" / "onnx").exists, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "w2v-export: interrupted")
    assert contents(good) == before
    assert os.listdir(good.parent) == ["good"]
