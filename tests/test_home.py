"""The folder of bundles: missing, unreadable, or nowhere. Every command says what is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MAINS = {
    "w2v-models": "w2v_runtime.commands.models",
    "w2v-embed": "w2v_runtime.commands.embed",
    "w2v-export": "w2v_export.cli",
    "w2v-doctor": "w2v_runtime.commands.doctor",
}
#: A user of whom nothing is known, as in a container that runs under any number.
NOBODY = """
import pwd
def unknown(key):
    raise KeyError(key)
pwd.getpwuid = pwd.getpwnam = unknown
"""
USES = [
    ("w2v-models", ["list"]),
    ("w2v-embed", ["x.wav"]),
    ("w2v-export", ["--model", "facebook/wav2vec2-base-960h", "--random-weights"]),
]


def said(command: str, *words: str, before: str = "", **environment: str | None) -> tuple[int, str, str]:
    variables = os.environ | {"W2V_MODEL": None, "XDG_CACHE_HOME": None, "W2V_HOME": None} | environment
    done = subprocess.run(
        [sys.executable, "-c", f"{before}from {MAINS[command]} import main; main()", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={name: value for name, value in variables.items() if value is not None},
    )
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_missing_home_holds_no_bundles(tmp_path):
    """It is no fault: nothing is exported yet, which is said, and nothing is made."""
    home = str(tmp_path / "not" / "yet")
    assert said("w2v-models", "list", W2V_HOME=home)[1].splitlines()[-1] == f"Nothing is exported to {home} yet."
    code, _, errors = said("w2v-embed", "x.wav", W2V_HOME=home)
    assert (code, errors.split(". ")[0]) == (2, f"w2v-embed: error: No model has been exported to {home} yet")
    assert said("w2v-models", "show", "org/name", W2V_HOME=home)[2].startswith(
        "w2v-models: error: org/name has not been exported yet."
    )
    checks = {check["name"]: check for check in json.loads(said("w2v-doctor", "--json", W2V_HOME=home)[1])}
    assert (checks["home"]["state"], checks["home"]["detail"]) == ("ok", f"{home} can be written")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "words"), USES)
def test_a_home_that_is_no_folder_is_named(tmp_path, command, words):
    """A file where the folder should be: exit 2 with its name, and not "no model has been exported"."""
    (tmp_path / "file").write_text("precious")
    code, output, errors = said(command, *words, W2V_HOME=str(tmp_path / "file"))
    assert (code, output, len(errors.splitlines())) == (2, "", 1)
    assert f"{tmp_path}/file" in errors
    assert "cannot be read: Not a directory" in errors or "is not a folder" in errors
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(("command", "words"), USES)
@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        (None, "There is no home folder (HOME is not set), so name one for bundles: export W2V_HOME=/a/folder"),
        ("~nobody-at-all/bundles", "W2V_HOME is ~nobody-at-all/bundles, and there is no such user's home folder."),
    ],
)
def test_a_user_without_a_home_is_told_to_name_one(command, words, chosen, says):
    """Exit 2 with the variable that mends it."""
    code, output, errors = said(command, *words, before=NOBODY, HOME=None, W2V_HOME=chosen)
    assert (code, output, errors) == (2, "", f"{command}: error: {says}\n")


def test_a_user_without_a_home_still_has_bundles_by_path(bundles, tmp_path):
    """Only ids need the home; what is not there is told as it is."""
    folder = str(bundles("base"))
    code, output, _ = said("w2v-models", "show", folder, before=NOBODY, HOME=None)
    assert (code, output.splitlines()[0]) == (0, folder)
    code, _, errors = said("w2v-models", "show", str(tmp_path), before=NOBODY, HOME=None)
    assert (code, errors.split(",")[0]) == (2, f"w2v-models: error: {tmp_path} holds no manifest.json")
    checks = json.loads(said("w2v-doctor", "--json", before=NOBODY, HOME=None)[1])
    homes = [check for check in checks if check["name"] in ("home", "bundle")]
    assert [check["state"] for check in homes] == ["problem", "problem"]
    assert all("HOME is not set" in check["detail"] for check in homes)


def test_a_home_that_may_not_be_read_is_named(tmp_path):
    """It is not taken for an empty one."""
    Path(tmp_path / "home").mkdir(mode=0o300)
    if os.access(tmp_path / "home", os.R_OK):
        pytest.skip("this user may read everything")
    code, _, errors = said("w2v-models", "list", W2V_HOME=str(tmp_path / "home"))
    assert code == 2
    assert f"{tmp_path}/home, the folder of bundles, cannot be read: Permission denied" in errors
