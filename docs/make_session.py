"""The picture in the README: a terminal in which the two commands ran, as docs/session.svg.

    python docs/make_session.py     # two minutes on two cores, 3 GB of memory, 400 MB of disk while it runs

It runs them, with the base model's architecture and random weights, so that no network is needed, and draws what they
wrote. Nothing is made up; the long table is cut where the picture says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
import tomllib
from pathlib import Path
from typing import Any, Final

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

REPOSITORY: Final = Path(__file__).resolve().parent.parent
WIDTH: Final = 100
#: The two commands, and what is typed into Python afterwards.
HOME: Final = "bundles"
COMMANDS: Final = (
    "w2v-export --model facebook/wav2vec2-base-960h --random-weights",
    "w2v-embed demo/recordings -o embeddings.npz",
)
LINES: Final = (
    "import numpy as np",
    'output = np.load("embeddings.npz")',
    'output["paths"]',
    'output["embeddings"].shape',
)
#: Rows of the table of comparisons that are shown before and after the cut.
SHOWN: Final = 3
PROMPT: Final = "\x1b[1;32m$\x1b[0m "
#: What rich writes to redraw its bars: to the line above, erase the line, colours, cursor off and on.
_SEQUENCE: Final = re.compile(r"\x1b\[(\?25[lh]|\d*[A-Za-z]|[\d;]*m)")
#: Readable on a white page and on a black one: the picture brings its own background.
THEME: Final = TerminalTheme(
    (24, 28, 36),
    (220, 224, 232),
    [
        *((60, 66, 78), (240, 113, 120), (152, 195, 121), (229, 192, 123)),
        *((97, 175, 239), (198, 120, 221), (86, 182, 194), (220, 224, 232)),
    ],
    [
        *((110, 118, 132), (255, 135, 141), (172, 215, 141), (249, 212, 143)),
        *((125, 195, 255), (218, 146, 240), (110, 205, 216), (255, 255, 255)),
    ],
)
FONTS: Final = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"


def run(command: str, folder: Path) -> list[str]:
    """Run a command of this package in a terminal of its own: the lines that stand there at the end, with colours."""
    name, *arguments = shlex.split(command)
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    module, _, function = scripts[name].partition(":")
    code = f"from {module} import {function}; {function}()"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, WIDTH, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "W2V_MODEL")}
    environment |= {"TERM": "xterm-256color", "W2V_HOME": HOME}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=folder, env=environment, stdin=slave, stdout=slave, stderr=slave
    )
    os.close(slave)
    written = bytearray()
    with contextlib.suppress(OSError):  # the other end is closed
        while block := os.read(master, 1 << 16):
            written += block
    os.close(master)
    lines = shown(written.decode())
    if process.wait():
        raise SystemExit("\n".join([f"{command} failed:", *lines]))
    return lines


def shown(written: str) -> list[str]:
    """What stands on a terminal after all that was written to it; only what rich uses is understood."""
    lines, row, position = [""], 0, 0
    while position < len(written):
        if found := _SEQUENCE.match(written, position):
            sequence, position = found[1], found.end()
            if sequence.endswith("A"):
                row -= int(sequence[:-1] or 1)
            elif sequence.endswith("K"):
                lines[row] = ""
            elif sequence.endswith("m"):
                lines[row] += found[0]
            continue
        character, position = written[position], position + 1
        if character == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif character != "\r":  # rich erases a line before it writes it anew
            lines[row] += character
    return lines if lines[-1] else lines[:-1]


def cut(lines: list[str]) -> list[str]:
    """The same without the middle of the table of comparisons."""
    rows = [number for number, line in enumerate(lines) if re.search(r" ok$", line)]
    left_out = rows[SHOWN:-SHOWN]
    note = f"\x1b[2m… {len(left_out)} more comparisons, all ok …\x1b[0m"
    return [*lines[: left_out[0]], note, *lines[left_out[-1] + 1 :]]


def typed(folder: Path) -> list[str]:
    """What Python answers to LINES, typed in the folder."""
    names: dict[str, Any] = {}
    lines = []
    with contextlib.chdir(folder):
        for line in LINES:
            answer = io.StringIO()
            with contextlib.redirect_stdout(answer):
                exec(compile(line, "<stdin>", "single"), names)
            lines += [f"\x1b[1;34m>>>\x1b[0m {line}", *answer.getvalue().splitlines()]
    return lines


def draw(lines: list[str], path: Path) -> None:
    """The lines as a picture that needs no font of the network."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), soft_wrap=False)
    form = re.sub(r"@font-face \{\{.*?\}\}\n?", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    form = form.replace("Fira Code, monospace", FONTS)
    picture = console.export_svg(title="w2v-onnx", theme=THEME, code_format=form, unique_id="session")
    path.write_text("\n".join(line.rstrip() for line in picture.splitlines()) + "\n", encoding="utf-8")


def main() -> None:
    """Run, and draw."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "demo").symlink_to(REPOSITORY / "demo")
        lines = [f"{PROMPT}export W2V_HOME={HOME}"]
        for number, command in enumerate(COMMANDS):
            answer = run(command, folder)
            lines += [f"{PROMPT}{command}", *(answer if number else cut(answer))]
        lines += [f"{PROMPT}python -q", *typed(folder)]
    draw(lines, REPOSITORY / "docs" / "session.svg")


if __name__ == "__main__":
    main()
