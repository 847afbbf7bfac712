"""Bundles made by an attacker, against the real commands: refused in one sentence, at once, reading nothing outside."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import soundfile

from conftest import speech

pytest.importorskip("onnx")

from make_attack_bundles import ATTACKS, MADE_HUGE, OUTSIDE, make

#: Seconds for one command, most of them for starting Python on a busy machine.
LIMIT = 60
#: Bytes of address space: less than what the large tensors would take.
MEMORY = 8 << 30

#: Runs commands one after the other, each in a process of its own that needs no start. The arguments are a JSON list
#: of [name, module, arguments, folder]; in the folder go what the command wrote and how it ended.
DRIVER = f"""if True:
    import importlib, json, os, resource, signal, sys
    import onnxruntime
    import w2v_runtime.commands.embed, w2v_runtime.commands.models
    import w2v_runtime.embedder, w2v_runtime.embedding.parity, w2v_runtime.runs.run
    for name, module, arguments, folder in json.load(sys.stdin):
        child = os.fork()
        if not child:
            signal.alarm({LIMIT})
            resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
            for number, stream in ((1, "out"), (2, "err")):
                os.dup2(os.open(os.path.join(folder, name + "." + stream), os.O_CREAT | os.O_WRONLY), number)
            sys.argv = [module, *arguments]
            importlib.import_module("w2v_runtime.commands." + module).main()
        status = os.waitpid(child, 0)[1]
        with open(os.path.join(folder, name + ".code"), "w") as file:
            file.write(str(os.waitstatus_to_exitcode(status)))
"""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, below 0 the signal that killed it, and what it wrote."""

    code: int
    output: str
    errors: str


@dataclass(frozen=True)
class Outcomes:
    """Every command on every attack, by ``COMMAND-ATTACK``, and the names of all files that they opened."""

    of: dict[str, Outcome]
    opened: str | None


@pytest.fixture(scope="module")
def outcomes(bundles, tmp_path_factory) -> Outcomes:
    """Every command run on every attack; under strace, where that is installed."""
    folder = tmp_path_factory.mktemp("attacks")
    attacks, results = folder / "bundles", folder / "results"
    make(bundles("base"), attacks)
    shutil.copytree(bundles("base"), attacks / "whole")
    results.mkdir()
    soundfile.write(folder / "a.wav", speech(1.0), 16000)
    jobs = [["list-all", "models", ["list"], str(results)]]
    for name in (*ATTACKS, "whole"):
        embed = [str(folder / "a.wav"), "-m", str(attacks / name), "-o", str(results / f"{name}.npz")]
        jobs.append([f"embed-{name}", "embed", embed, str(results)])
        jobs += [[f"{verb}-{name}", "models", [verb, str(attacks / name)], str(results)] for verb in ("verify", "show")]
    log = folder / "opened"
    traced = (
        ["strace", "--seccomp-bpf", "-f", "-qq", "-e", "trace=open,openat,openat2", "-o", str(log)]
        if shutil.which("strace")
        else []
    )
    environment = os.environ | {"W2V_HOME": str(attacks), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [*traced, sys.executable, "-c", DRIVER]
    subprocess.run(command, input=json.dumps(jobs), text=True, env=environment, check=True)
    found = {}
    for name, *_ in jobs:
        code, output, errors = ((results / f"{name}.{kind}").read_text() for kind in ("code", "out", "err"))
        found[name] = Outcome(int(code), output, errors)
    return Outcomes(found, log.read_text(errors="replace") if traced else None)


@pytest.mark.parametrize("command", ["embed", "verify", "show"])
def test_the_bundle_they_are_made_from_is_whole(outcomes, command):
    """Without an attack every command succeeds."""
    assert outcomes.of[f"{command}-whole"].code == 0, outcomes.of[f"{command}-whole"].errors


REFUSALS = [(command, name) for name, attack in ATTACKS.items() for command in sorted(attack.refused_by)]


@pytest.mark.parametrize(("command", "name"), REFUSALS)
def test_an_attack_is_refused_in_one_sentence(outcomes, command, name):
    """Exit 2 and one line that names the place and what was expected; no traceback, nothing written."""
    outcome = outcomes.of[f"{command}-{name}"]
    assert outcome.code == 2, outcome
    *notes, message = outcome.errors.splitlines()
    assert all("note:" in note for note in notes), outcome.errors
    assert re.search(ATTACKS[name].says, message), message
    assert f"/bundles/{name}" in message
    assert len(message) < 1500


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if "show" not in attack.refused_by])
def test_showing_a_manifest_opens_no_graph(outcomes, name):
    """``show`` reads the manifest alone, so whatever the graphs are, it ends well or refuses."""
    assert outcomes.of[f"show-{name}"].code in (0, 2)
    assert "Traceback" not in outcomes.of[f"show-{name}"].errors


def test_a_tensor_that_is_too_large_to_make_fails_the_inputs(outcomes):
    """A graph may compute what it likes, so it is opened; each input fails alone with the engine's reason."""
    outcome = outcomes.of[f"embed-{MADE_HUGE}"]
    assert outcome.code == 3, outcome
    assert "Failed to allocate memory" in outcome.errors
    assert "Traceback" not in outcome.errors


def test_attacks_are_not_in_the_way_of_the_list(outcomes):
    """``list`` shows the bundles whose manifests are valid and passes over the others."""
    listed = outcomes.of["list-all"]
    assert listed.code == 0, listed.errors
    assert re.search(r"\bwhole\b", listed.output)
    assert "manifest-" not in listed.output


def test_nothing_outside_a_bundle_is_opened(outcomes):
    """No command opened what links, locations and paths in the attacks lead to."""
    if outcomes.opened is None:
        pytest.skip("strace is not installed")
    assert "/bundles/graph-halved/onnx/model.onnx" in outcomes.opened
    assert f"/{OUTSIDE}/" not in outcomes.opened
    assert "/bundles/data-hard-link/onnx/model.onnx_data" not in outcomes.opened
    opened = {line.split('"')[1] for line in outcomes.opened.splitlines() if '"' in line}
    assert "/etc/passwd" not in opened


def test_a_pickle_that_would_run_code_is_refused_by_the_export(checkpoints, tmp_path):
    """A checkpoint of pickled objects is not unpickled: exit 2, its path named, no bundle."""
    pytest.importorskip("torch")
    folder = shutil.copytree(checkpoints("base"), tmp_path / "checkpoint")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Harmful(str(tmp_path / "harmed"))}))
    script = "from w2v_export.cli import main; main()"
    command = [sys.executable, "-c", script, "--model", str(folder), "--output", str(tmp_path / "bundle"), "--offline"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done
    assert "pytorch_model.bin" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)
