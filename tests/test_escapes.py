"""What files say never steers a terminal: every command shows as escapes what a terminal would obey or not show."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import soundfile

from conftest import speech
from w2v_runtime.commands.terminal import printable

#: A title for the window, a bell, red in 7 and in 8 bits, a line over the last one, a second line, text from right to
#: left, a character without width, and a line separator.
NASTY = "\x1b]0;t\x07\x1b[31m\x9b31m\r\nx\u202ey\u2066z\u200b\u2028"
SHOWN = r"\x1b]0;t\x07\x1b[31m\x9b31m\r\nx\u202ey\u2066z\u200b\u2028"
COMMANDS = {
    "w2v-embed": "w2v_runtime.commands.embed",
    "w2v-merge": "w2v_runtime.commands.merge",
    "w2v-models": "w2v_runtime.commands.models",
    "w2v-doctor": "w2v_runtime.commands.doctor",
    "w2v-export": "w2v_export.cli",
}


@pytest.fixture(scope="module")
def home(bundles, tmp_path_factory) -> Path:
    """Two bundles whose manifests and folders say nasty things wherever a string may stand, and one that is none."""
    home = tmp_path_factory.mktemp("escapes") / NASTY
    for name in ("a", NASTY):
        shutil.copytree(bundles("emotion"), home / name)
        file = home / name / "manifest.json"
        data = json.loads(file.read_text())
        data["source"] |= {"model": f"org/{NASTY}", "licence": NASTY, "revision": NASTY}
        data["architecture"]["model_type"] = NASTY
        data["head"] |= {"kind": NASTY, "labels": [NASTY, "b", "c"]}
        data["created"], data["packages"] = NASTY, {NASTY: NASTY}
        data["precisions"]["fp32"]["parity"][0]["case"] = NASTY
        file.write_text(json.dumps(data))
    (home / f"broken{NASTY}").mkdir()
    (home / f"broken{NASTY}" / "manifest.json").write_text(json.dumps({"format_version": NASTY, NASTY: 1}))
    return home


def said(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command with pipes for its output."""
    return subprocess.run(
        [sys.executable, "-c", f"from {COMMANDS[command]} import main; main()", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={name: value for name, value in os.environ.items() if name != "W2V_MODEL"} | environment,
        timeout=120,
        check=False,
    )


def on_terminal(code: str, *arguments: object, **environment: str) -> bytes:
    """What a process writes to a terminal."""
    terminal, end = pty.openpty()
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=end, stderr=end, env=os.environ | {"COLUMNS": "500"} | environment
    )
    os.close(end)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux says that the other end was closed
        pass
    process.wait(timeout=60)
    return shown


def assert_plain(written: bytes) -> None:
    """Nothing but lines of what can be seen."""
    kinds = {c: unicodedata.name(c, repr(c)) for c in written.decode() if not (c.isprintable() or c == "\n")}
    assert not kinds


@pytest.mark.parametrize(
    ("command", "arguments", "code", "shows"),
    [
        ("w2v-models", ["list"], 0, [rf"org/{SHOWN}", f"Exported to /.*/{SHOWN}"]),
        ("w2v-models", ["show", "{home}/a"], 0, [f"licence +{SHOWN}", f"head +{SHOWN}: {SHOWN}, b, c"]),
        ("w2v-models", ["show", f"{{home}}/{NASTY}"], 0, [f"^/.*/{SHOWN}/{SHOWN}$"]),
        ("w2v-models", ["show", f"{{home}}/broken{NASTY}"], 2, [f"broken{SHOWN}/manifest.json is not a valid"]),
        ("w2v-models", ["verify", f"{{home}}/{NASTY}"], 0, [f"/{SHOWN} equals its reference"]),
        ("w2v-models", ["show", f"other{NASTY}"], 2, [f"other{SHOWN} has not been exported yet"]),
        ("w2v-models", ["show", "a", NASTY], 2, [r"unexpected extra argument.*\\x9b31m"]),
        ("w2v-models", [NASTY], 2, [r"No such command.*\\x9b31m"]),
        ("w2v-doctor", [], 1, [f"ok +bundle +org/{SHOWN}", f"broken{SHOWN}"]),
        ("w2v-doctor", [f"--{NASTY}"], 2, [r"No such option.*\\x9b31m"]),
        ("w2v-embed", ["x.wav"], 2, [rf"Several models are exported \(.*/{SHOWN}, .*/{SHOWN}/a\)"]),
        ("w2v-embed", ["x.wav", "-m", "{home}/a", "-o", f"{NASTY}.xyz"], 2, [SHOWN]),
        ("w2v-merge", [f"{NASTY}.npz", "-o", "out.npz"], 2, [rf"{SHOWN}.npz does not exist"]),
        ("w2v-export", ["--model", f"./{NASTY}"], 2, [rf"{SHOWN} is not a folder"]),
        ("w2v-export", ["--model", "x", "--check", NASTY], 2, [r"\\x9b31m"]),
        ("w2v-export", ["--model", "x", "--output", f"{{home}}/{NASTY}"], 2, [f"/{SHOWN} exists already"]),
    ],
)  # fmt: skip
def test_nothing_that_a_terminal_obeys_is_shown(home, tmp_path, monkeypatch, command, arguments, code, shows):
    """Manifests, names of files and words of the command line, on both streams; they can still be recognised."""
    monkeypatch.chdir(tmp_path)
    done = said(command, *(word.format(home=home) for word in arguments), W2V_HOME=str(home))
    assert done.returncode == code, done.stderr
    assert_plain(done.stdout)
    assert_plain(done.stderr)
    text = (done.stdout + done.stderr).decode()
    for pattern in shows:
        assert re.search(pattern.replace(SHOWN, re.escape(SHOWN)), text, re.MULTILINE), text


def test_an_embed_run_tells_names_plainly(home, tmp_path):
    """A failed input, the list of failures, the output and the note on it; the results keep the name as it is."""
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    bad, good = (f"{kind}{NASTY.replace('/', '')}.wav" for kind in ("bad", "good"))
    (recordings / bad).write_bytes(b"RIFF")
    soundfile.write(recordings / "good.wav", speech(0.5), 16000)
    (recordings / "good.wav").rename(recordings / good)
    output = tmp_path / f"{NASTY}.jsonl"
    done = said("w2v-embed", recordings, "-m", home / "a", "-o", output)
    assert done.returncode == 3, done.stderr
    assert_plain(done.stderr)
    text = done.stderr.decode()
    assert f"failed: {recordings}/bad{SHOWN}.wav: " in text
    assert f"→ {tmp_path}/{SHOWN}.jsonl" in text
    (line,) = (json.loads(line) for line in output.read_text().split("\n") if line)
    assert line["file"] == str(recordings / good)


@pytest.mark.parametrize(("command", "arguments"), [("w2v-models", ["list", "--json"]), ("w2v-doctor", ["--json"])])
def test_json_stays_json(home, command, arguments):
    """For scripts nothing is escaped but by JSON's own rules, in ASCII throughout."""
    done = said(command, *arguments, W2V_HOME=str(home))
    assert done.stdout.isascii()
    assert_plain(done.stdout)
    data = json.loads(done.stdout)
    if command == "w2v-models":
        assert {entry["folder"] for entry in data["exported"]} == {str(home / "a"), str(home / NASTY)}
        assert {entry["model"] for entry in data["exported"]} == {f"org/{NASTY}"}
    else:
        assert any(check["detail"].startswith(f"org/{NASTY}: fp32") for check in data)


def test_an_export_tells_names_plainly_and_prints_the_path_in_its_bytes(checkpoints, tmp_path):
    """Checkpoint, recording and output of nasty names: plain lines for people, the very path for scripts."""
    checkpoint = Path(shutil.copytree(checkpoints("base"), tmp_path / f"ck{NASTY}"))
    recording = tmp_path / f"rec{NASTY.replace('/', '')}.wav"
    soundfile.write(tmp_path / "a.wav", speech(0.4), 16000)
    (tmp_path / "a.wav").rename(recording)
    output = tmp_path / f"out{NASTY}"
    done = said("w2v-export", "--model", checkpoint, "--output", output, "--check", recording)
    assert done.returncode == 0, done.stderr
    assert done.stdout == os.fsencode(output) + b"\n"
    assert_plain(done.stderr)
    assert f"rec{SHOWN}.wav" in done.stderr.decode()
    assert (output / "manifest.json").is_file()
    shown = on_terminal(
        "from w2v_runtime.commands.terminal import show_path; import sys; show_path(sys.argv[1])", output
    )
    assert shown.decode() == f"{tmp_path}/out{SHOWN}\r\n"


def test_terminals_get_no_more_than_pipes(home):
    """On a terminal rich paints the doctor's table, and nothing of a manifest gets through to it."""
    for command, words in (("w2v-models", ["list"]), ("w2v-models", ["show", home / "a"]), ("w2v-doctor", [])):
        code = f"from {COMMANDS[command]} import main; main()"
        shown = on_terminal(code, *words, W2V_HOME=str(home), TERM="xterm-256color").decode()
        assert SHOWN in shown
        painted = re.sub(r"\x1b\[[\d;]*m", "", shown)
        assert "\x1b[31m" not in shown
        assert_plain(painted.replace("\r\n", "\n").encode())


def test_a_locale_without_letters_shows_escapes(bundles, tmp_path):
    """In the C locale, where most of what a name may hold cannot be written, and for a name that is no text at all."""
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "模型"
    shutil.copytree(bundles("base"), folder)
    done = said("w2v-models", "show", folder, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stdout.decode().startswith(f"{tmp_path}/caf\\udce9/\\udce6")


def test_what_can_be_shown_is_left_as_it_is():
    """Letters of any script, signs put together, spaces of any width, emoji; of the rest the escape."""
    for text in (
        "",
        "plain",
        "Grüße, naïve",
        "日本語　スペース",
        "עברית",
        "العربية",
        "e\u0301",
        "a\xa0b",
        "🎙",
        "→ × · Σ",
    ):
        assert printable(text) == text
    assert printable("a\nb\tc\x7f\x85\ufeff\U000e0041") == r"a\nb\tc\x7f\x85\ufeff\U000e0041"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\udce9"
    assert printable(NASTY) == SHOWN
