"""What a run says, and where: terminals, pipes, homes that are missing."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from commands import MAIN, embed, results, write_corpus
from w2v_models.catalogue import CATALOGUE
from w2v_runtime.commands.tables import Table, pairs

WIDE, NARROW = 400, 80


def said(command: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command's ``main`` with pipes for its output."""
    variables = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        [sys.executable, "-c", f"from {command} import main; main()", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=variables | environment,
        timeout=60,
        check=False,
    )


def shown_on(columns: int, *arguments: object, **environment: str) -> list[str]:
    """The lines that ``w2v-models`` writes to a terminal of so many columns."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", "from w2v_runtime.commands.models import main; main()", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=end,
        env={name: value for name, value in os.environ.items() if name != "COLUMNS"} | environment,
    )
    os.close(end)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux says that the other end was closed
        pass
    assert process.wait(timeout=60) == 0
    return shown.decode().splitlines()


def on_terminal(*arguments: object, before: str = "", **environment: str) -> tuple[int, str]:
    """Run the command, after the code ``before``, with a terminal for its standard error: exit code and what it got."""
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", before + MAIN, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=end,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "140"} | environment,
    )
    os.close(end)
    limit = threading.Timer(60, process.kill)
    limit.start()
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # how Linux says that the other end was closed
        pass
    output, _ = process.communicate(timeout=60)
    limit.cancel()
    assert output == b""
    return process.returncode, shown.decode()


def test_a_terminal_shows_files_and_time_left(bundles, recordings, tmp_path):
    """Files done of all, hours, speed and time left while it runs; the summary at the end."""
    code, shown = on_terminal(
        recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", "--batch-seconds", "1", COLORTERM="truecolor"
    )
    assert code == 0, shown
    assert "5/5" in shown
    assert re.search(r"files · 0\.00 h · [\d.]+ × real time", shown)
    assert re.search(r"\d:\d\d:\d\d", shown)
    assert "5 files embedded" in shown.splitlines()[-1]
    assert re.search(r"\x1b\[[\d;]*3[0-8]", shown)


def test_no_color_is_honoured(bundles, recordings, tmp_path):
    """With NO_COLOR the progress has no colours."""
    code, shown = on_terminal(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", NO_COLOR="1")
    assert code == 0
    assert not re.search(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7])[;m]", shown)


@pytest.mark.parametrize("choice", ["--quiet", "--no-progress"])
def test_a_terminal_can_be_spared(bundles, recordings, tmp_path, choice):
    """--quiet says nothing at all, --no-progress only the summary."""
    code, shown = on_terminal(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", choice)
    assert code == 0
    assert len(shown.splitlines()) == (0 if choice == "--quiet" else 1)
    assert "\x1b" not in shown


def test_a_list_from_a_pipe_is_read_once(bundles, tmp_path):
    """The progress does not count a list that can be read only once, and every input of it is embedded."""
    corpus = write_corpus(tmp_path / "corpus", 40, median=0.3)
    os.mkfifo(tmp_path / "list")
    names = "".join(f"{corpus}/{index:03}.wav\n" for index in range(40))
    writer = threading.Thread(target=(tmp_path / "list").write_text, args=(names,), daemon=True)
    writer.start()
    code, shown = on_terminal("--files-from", tmp_path / "list", "-m", bundles("base"), "-o", tmp_path / "out.npz")
    assert code == 0, shown[-300:]
    writer.join()
    assert results(tmp_path / "out.npz")[0] == [f"{index:03}.wav" for index in range(40)]


def test_a_pipe_gets_one_line(bundles, recordings, tmp_path):
    """Without a terminal there is the summary and no progress, and with --quiet nothing."""
    code, errors = embed(recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", FORCE_COLOR=None)
    assert code == 0
    assert len(errors.splitlines()) == 1
    assert "\x1b" not in errors
    assert "\r" not in errors
    assert embed(recordings, "-m", bundles("base"), "-o", tmp_path / "quiet.npz", "--quiet") == (0, "")


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_a_home_is_not_needed(bundles, recordings, tmp_path, home):
    """A missing, unusable or unset HOME is no matter where the model is named."""
    code, errors = embed(
        recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", HOME=home, XDG_CACHE_HOME=None, W2V_HOME=None
    )
    assert code == 0, errors


def test_a_table_is_aligned_or_told_in_paragraphs():
    """Columns stand below each other; where they do not fit, each row is a paragraph whose words are whole."""
    table = Table("Known", ("model", "layers", "about"), [("a/b", "2", "short"), ("a/longer-name", "12", "")], {1})
    assert list(table.lines(None)) == [
        "Known",
        "model          layers  about",
        "a/b                 2  short",
        "a/longer-name      12",
    ]
    assert list(table.lines(28)) == list(table.lines(None))
    assert list(table.lines(27)) == [
        "Known",
        "a/b",
        "    layers: 2, about: short",
        "a/longer-name",
        "    layers: 12",
    ]
    assert list(pairs("Bundle", {"id": "a-b-c", "hash": "x" * 30, "none": ""}, 12)) == [
        "Bundle",
        "id    a-b-c",
        f"hash  {'x' * 30}",
        "none",
    ]
    assert list(pairs("", {"made": "with one, and two three"}, 26)) == ["", "made  with one, and two", "      three"]


def test_a_list_of_models_is_plain_where_it_is_piped(bundles, tmp_path):
    """A line a model that begins with its id, without lines drawn, trailing spaces or a width of its own."""
    shutil.copytree(bundles("base"), tmp_path / "org--base")
    done = said("w2v_runtime.commands.models", "list", W2V_HOME=str(tmp_path))
    lines = done.stdout.splitlines()
    assert done.stdout.isascii()
    assert all(line == line.rstrip() for line in lines)
    assert [line.split()[0] for line in lines[2 : 2 + len(CATALOGUE)]] == [variant.id for variant in CATALOGUE]
    assert lines[-1].split()[1:] == ["checkpoint", "fp32", lines[-1].split()[3], "here", "org--base"]
    described = said("w2v_runtime.commands.models", "show", tmp_path / "org--base").stdout.splitlines()
    assert all(line == line.rstrip() for line in described)
    assert [line.split()[-1] for line in described if line.startswith("sample rate")] == ["Hz"]
    assert sum(line.endswith("  ok") for line in described) > 10


@pytest.mark.parametrize("source", ["terminal", "COLUMNS"])
def test_a_list_of_models_fits_80_columns(bundles, tmp_path, source):
    """On a narrow terminal, and in a pipe with COLUMNS, no line is longer and every id and hash is whole."""
    shutil.copytree(bundles("base"), tmp_path / "org--base")
    listed: list[list[str]] = []
    for words in (["list"], ["show", tmp_path / "org--base"]):
        if source == "terminal":
            listed.append(shown_on(NARROW, *words, W2V_HOME=str(tmp_path)))
        else:
            done = said("w2v_runtime.commands.models", *words, W2V_HOME=str(tmp_path), COLUMNS=str(NARROW))
            listed.append(done.stdout.splitlines())
    models, bundle = listed
    assert max(len(line) for line in models[1:] if not line.startswith("Exported to")) <= NARROW
    assert max(map(len, bundle[1:])) <= NARROW
    assert {variant.id for variant in CATALOGUE} <= set(models)
    assert any(re.fullmatch(r"bundle hash +[0-9a-f]{64}", line) for line in bundle)


def test_a_wide_terminal_shows_a_line_a_model(tmp_path):
    """Where there is room, a terminal shows what a pipe gets."""
    piped = said("w2v_runtime.commands.models", "list", W2V_HOME=str(tmp_path)).stdout.splitlines()
    assert shown_on(WIDE, "list", W2V_HOME=str(tmp_path)) == piped


def test_a_reader_that_leaves_is_no_fault(tmp_path):
    """``w2v-models list | head -1`` says nothing on standard error."""
    command = f"{sys.executable} -c 'from w2v_runtime.commands.models import main; main()' list | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("w2v-embed", "w2v_runtime.commands.embed"),
        ("w2v-models", "w2v_runtime.commands.models"),
        ("w2v-export", "w2v_export.cli"),
    ],
)
def test_commands_tell_their_version(name, command):
    """``--version`` prints the command's name and the installed version, whatever else is missing, and exits 0."""
    done = said(command, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{name} {importlib.metadata.version('w2v-onnx')}\n", "")


def test_the_help_shows_that_inputs_repeat():
    """One ellipsis behind INPUT."""
    usage = said("w2v_runtime.commands.embed", "--help").stdout.splitlines()[0]
    assert usage.split(maxsplit=1)[1] == "w2v-embed [OPTIONS] [INPUT]..."


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "org/name", "--output", "there"], "there exists already; replace it with --overwrite"),
        (["--model", "org/name", "--output", "there", "--overwrite"], "not empty and not a bundle"),
        (["--model", "org/name", "--random-weights"], "w2v-models list"),
        (["--model", "./nowhere"], "is not a folder"),
        (["--model", "org/name", "--offline"], "org/name is not in the hub's cache"),
        (["--model", "org/name", "--offline", "--revision", "v2"], "revision v2 of org/name is not in"),
        (["--model", "org/name", "--check", "nothing.wav"], "nothing.wav"),
    ],
)
def test_an_export_refuses_before_it_begins(tmp_path, monkeypatch, arguments, says):
    """Exit 2 with the reason, no stage announced, and PyTorch not even imported."""
    if "--offline" in arguments:
        pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there", "thesis.tex").touch()
    done = said("w2v_export.cli", *arguments, HF_HOME=str(tmp_path / "hub"), W2V_HOME=str(tmp_path / "home"))
    assert done.returncode == 2
    assert says in done.stderr
    assert "loading" not in done.stderr
    code = f"import sys; sys.argv = ['w2v-export', *{arguments!r}]\nfrom w2v_export.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "False\n"


#: Code that lets a line of progress stand for every tenth of a second, and makes each stage of a run last longer.
LOGGED = """
import time
from w2v_runtime.commands import progress
from w2v_runtime.runs import run
from w2v_runtime.embedder import Embedder
from w2v_runtime.runs.spool import Spool
progress._LOG_SECONDS = 0.1
def slowed(function):
    def slow(*arguments, **options):
        time.sleep(0.12)
        return function(*arguments, **options)
    return slow
Embedder.embed_batch, Spool.recall, run._write = map(slowed, (Embedder.embed_batch, Spool.recall, run._write))
"""


def test_a_run_without_a_terminal_writes_a_log(bundles, recordings, tmp_path):
    """Every few minutes a line of what is done and how fast, in each stage; none with --no-progress."""
    arguments = (recordings, "-m", bundles("base"), "-o", tmp_path / "out.npz", "--batch-seconds", "1")
    code, errors = embed(*arguments, before=LOGGED)
    assert code == 0
    *lines, _ = errors.splitlines()
    assert any(re.fullmatch(r"w2v-embed: [1-5] of 5 files · 0\.00 h · [\d.]+ × real time", line) for line in lines), (
        errors
    )
    assert any(re.fullmatch(r"w2v-embed: [1-5] of 5 files · writing", line) for line in lines), errors
    os.utime(recordings / "a.wav", ns=(0, 0))
    code, errors = embed(*arguments, "--resume", before=LOGGED)
    assert code == 0
    assert any(re.fullmatch(r"w2v-embed: [1-5] of 5 files · checking", line) for line in errors.splitlines()), errors
    code, errors = embed(*arguments, "--overwrite", "--no-progress", before=LOGGED)
    assert code == 0
    assert len(errors.splitlines()) == 1


def test_a_terminal_shows_each_stage(bundles, recordings, tmp_path):
    """While --resume looks at what is finished, and while the output is written, the count is that of the stage."""
    arguments = (recordings, "-m", bundles("base"), "-o", tmp_path / "out.csv")
    assert embed(*arguments)[0] == 0
    os.utime(recordings / "a.wav", ns=(0, 0))
    code, shown = on_terminal(*arguments, "--resume", before=LOGGED)
    assert code == 0
    assert re.search(r"[2-5]/5 files · checking", shown)
    assert re.search(r"[2-5]/5 files · writing", shown)
