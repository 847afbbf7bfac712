"""The tables, the picture, the section of docs/speed.md and the README's table from results/cpu.json.

Without measuring again: ``python benchmarks/cpu_report.py``.
"""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ceilings import CEILINGS
from peers import BASELINE, PEERS
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README, SPEED = HERE.parent / "README.md", HERE.parent / "docs" / "speed.md"
BEGIN, END = "<!-- benchmarks/cpu.py writes this section -->", "<!-- end of the section -->"
ROWS = {"10s": "10 s of audio, warm", "1s": "1 s of audio, warm", "corpus": "a corpus", "file": "one file"}
#: What the README's table shows of that of the first model, and what it leaves out.
SHOWN_PEERS = (BASELINE, "w2v-onnx cpu fp32", "w2v-onnx cpu int8", "w2v-onnx openvino bf16")
HIDDEN_COLUMN = "1 s, warm"
COMPILES = "not run: compiling costs more than it saves"
MIB, GIGA = 2**20, 1e9


def ratios(seconds: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """How many times as fast as the baseline a peer was, in each round."""
    return [theirs / own for theirs, own in zip(seconds[BASELINE], seconds[name], strict=True)]


def times_as_fast(seconds: Mapping[str, Sequence[float]], name: str) -> str:
    """The median of the rounds' ratios, and their range where there are several."""
    found = ratios(seconds, name)
    middle = f"{statistics.median(found):.2f}"
    return middle if name == BASELINE or len(found) == 1 else f"{middle} ({min(found):.2f}–{max(found):.2f})"


def rate(operations: float, seconds: Sequence[float]) -> float:
    """GFLOP/s at the median time."""
    return operations / statistics.median(seconds) / GIGA


def ceiling(row: Mapping[str, Any], precision: str) -> float | None:
    """GFLOP/s of the engine that multiplies the model's matrices fastest in a precision."""
    rates = [
        rate(row["product_operations"], times)
        for name, times in row["ceilings"].items()
        if CEILINGS[name].precision == precision
    ]
    return max(rates, default=None)


def forward_table(result: Mapping[str, Any], name: str) -> list[str]:
    """Rows of Markdown for a forward pass in a warm process."""
    row = result["forwards"]["rows"][name]
    lines = [
        "| | seconds | times as fast | GFLOP/s | of the ceiling | min frame cosine | pooled cosine | max abs Δ |",
        "|---" * 8 + "|",
    ]
    for peer, definition in PEERS.items():
        if (times := row["seconds"].get(peer)) is None:
            lines.append(f"| {peer} | {missing(result, peer)} | | | | | | |")
            continue
        speed, most, near = rate(row["operations"], times), ceiling(row, definition.precision), accuracy(result, peer)
        lines.append(
            f"| {peer} | {statistics.median(times):.3f} | {times_as_fast(row['seconds'], peer)} | {speed:.0f} "
            f"| {f'{speed / most:.0%}' if most else ''} | {' | '.join(near)} |"
        )
    return lines


def accuracy(result: Mapping[str, Any], peer: str) -> tuple[str, str, str]:
    """Smallest frame cosine, pooled cosine and largest difference, as the tables have them."""
    near = result["forwards"]["accuracy"][peer]
    return f"{near['frame_cosine']:.6f}", f"{near['pooled_cosine']:.6f}", f"{near['difference']:.1e}"


def process_table(result: Mapping[str, Any], name: str) -> list[str]:
    """Rows of Markdown for whole processes."""
    row = result["processes"][name]
    lines = ["| | seconds | times as fast | × real time | peak memory | min pooled cosine |", "|---" * 6 + "|"]
    for peer, definition in PEERS.items():
        if (times := row["seconds"].get(peer)) is None:
            lines.append(f"| {peer} | {COMPILES if definition.compiled else missing(result, peer)} | | | | |")
            continue
        middle = statistics.median(times)
        lines.append(
            f"| {peer} | {middle:.2f} | {times_as_fast(row['seconds'], peer)} | {row['audio_seconds'] / middle:.1f} "
            f"| {row['peak'][peer] / MIB:.0f} MiB | {row['pooled_cosine'][peer]:.6f} |"
        )
    return lines


def missing(result: Mapping[str, Any], peer: str) -> str:
    """Why a peer has no figure."""
    return f"not run: {result['skipped'].get(peer, '')}"


def ceiling_table(result: Mapping[str, Any]) -> list[str]:
    """Rows of Markdown: what the engines reach on the model's matrix products alone."""
    rows = result["forwards"]["rows"]
    lines = [f"| | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for name in CEILINGS:
        rates = [
            f"{rate(row['product_operations'], row['ceilings'][name]):.0f}" if name in row["ceilings"] else "not run"
            for row in rows.values()
        ]
        lines.append(f"| {name} | {' | '.join(rates)} |")
    return lines


def sections(results: Mapping[str, Any]) -> list[str]:
    """The tables of every model, each under its title."""
    lines = []
    for short, result in results["models"].items():
        lines += [f"## {short}: {result['model']}", ""]
        forwards = result["forwards"].get("rows", {})
        for name, row in forwards.items():
            lines += [f"### {ROWS[name]} ({row['operations'] / GIGA:.0f} GFLOP)", "", *forward_table(result, name), ""]
        for name, row in result["processes"].items():
            what = f"{results['files']} files" if name == "corpus" else ROWS[name]
            lines += [f"### {what}, {row['audio_seconds']:.0f} s in all, whole process", ""]
            lines += [*process_table(result, name), ""]
        if forwards:
            lines += ["### Matrix products alone, GFLOP/s", "", *ceiling_table(result), ""]
    return lines


def header(results: Mapping[str, Any]) -> list[str]:
    """What stands over the tables: command, machine, and how the figures are to be read."""
    rounds = ", ".join(f"{ROWS[name]} {count}" for name, count in results["rounds"].items())
    return [
        "# Everything that embeds speech on a processor",
        "",
        f"Made by `{results['command']}` on {results['date']}. The same seeded weights, audio and threads for all.",
        "",
        *(f"- {name}: {value}" for name, value in results["machine"].items()),
        "",
        *wrapped(
            f"Medians of rounds in which every peer has one turn ({rounds}). *Times as fast* compares with {BASELINE} "
            "(feature extractor, model in inference mode with SDPA, mean over time) within each round; in brackets the "
            "range over the rounds. *Of the ceiling*: GFLOP/s against what the fastest engine reaches in that "
            "precision on the model's matrix products alone. Cosines and differences are against the baseline: frames "
            "and pooled vector of the 10 s, pooled vectors of the files. Signals are speech-like, with pauses. Whole "
            "processes start with Python, end with vectors on the disk, and find their files in the system's cache."
        ),
        "",
    ]


def wrapped(text: str) -> list[str]:
    """Lines as wide as the README's, without breaking a link or a command."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def speed_section(results: Mapping[str, Any]) -> list[str]:
    """The section of docs/speed.md: the picture, and a table a model."""
    machine = results["machine"]
    lines = [
        "## On a processor",
        "",
        "![how many times as fast as PyTorch, by engine and precision](../benchmarks/results/cpu.svg)",
        "",
        *wrapped(
            "How many times as fast as the PyTorch recipe (transformers, fp32, SDPA; one file at a time), on the same "
            f"{machine['processor']} and {machine['threads']} threads ({machine['instructions']}), with the same "
            "weights and audio; the recipe's own row has its seconds. Warm: one utterance in a process that runs "
            "already. Files: whole processes, from the "
            "first import to the stored vectors. Peak memory is that of the 3 s file, the cosine that of 10 s against "
            "PyTorch fp32. [Seconds, spread, ceilings and versions](../benchmarks/results/cpu.md), by "
            f"`{results['command']}`."
        ),
        "",
    ]
    for short, result in results["models"].items():
        lines += [*summary_table(short, result, results["files"]), ""]
    details = "[First figures, and what is open](../benchmarks/README.md#on-a-gpu); `make bench-gpu` measures it all."
    return [*lines, "## On a GPU", "", *wrapped(f"{ON_GPU} {details}")]


def readme_table(results: Mapping[str, Any]) -> list[str]:
    """The README's table: a few rows and columns of the first model, and the sentence on GPUs."""
    machine, (short, result) = results["machine"], next(iter(results["models"].items()))
    columns, *rows = summary(short, result, results["files"])
    shown = [place for place, name in enumerate(columns) if name != HIDDEN_COLUMN]
    lines = [[line[place] for place in shown] for line in (columns, *(row for row in rows if row[0] in SHOWN_PEERS))]
    return [
        *wrapped(
            f"How many times as fast as the PyTorch recipe, whose own row has its seconds; {machine['processor']}. "
            f"{ON_GPU}"
        ),
        "",
        *markdown(lines),
    ]


def markdown(lines: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown, whose first line names its columns."""
    columns, *rows = lines
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def summary_table(short: str, result: Mapping[str, Any], files: int) -> list[str]:
    """The summary in Markdown."""
    return markdown(summary(short, result, files))


def summary(short: str, result: Mapping[str, Any], files: int) -> list[list[str]]:
    """The names of the columns, then a row a peer, over all that was measured of a model."""
    titles = {"10s": "10 s, warm", "1s": "1 s, warm", "corpus": f"{files} files", "file": "one 3 s file"}
    measured = {**result["forwards"].get("rows", {}), **result["processes"]}
    rows = {name: measured[name] for name in titles if name in measured}
    lines = [[short, *(titles[name] for name in rows), "peak MiB", "min frame cosine"]]
    for peer in PEERS:
        cells = [short_cell(row["seconds"], peer) for row in rows.values()]
        if not any(cells):
            continue
        peak = result["processes"].get("file", {}).get("peak", {}).get(peer)
        near = result["forwards"].get("accuracy", {}).get(peer)
        cells += [f"{peak / MIB:.0f}" if peak else "", f"{near['frame_cosine']:.5f}" if near else ""]
        lines.append([peer, *cells])
    return lines


def short_cell(seconds: Mapping[str, Sequence[float]], peer: str) -> str:
    """Times as fast, and the seconds of the baseline."""
    if peer not in seconds:
        return ""
    if peer == BASELINE:
        return f"{statistics.median(seconds[peer]):.2f} s"
    return f"{statistics.median(ratios(seconds, peer)):.1f} ×"


ON_GPU = (
    "On one H200, base in fp16 had 3.2 × the speed of transformers fp32 with one utterance of 10 s and 4.1 × with "
    "eight, 2.1 × and 1.6 × that of transformers at its fastest (tf32), at a smallest frame cosine of 0.999996."
)


def write(folder: Path) -> None:
    """Write cpu.md and cpu.svg beside cpu.json; where that is the published one, the pages too."""
    import cpu_plot

    results = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    lines = [*header(results), *sections(results), "![times as fast](cpu.svg)"]
    (folder / "cpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    cpu_plot.draw(results, folder / "cpu.svg")
    if folder == RESULTS:
        write_pages(results)
    for short, result in results["models"].items():
        show(summary(short, result, results["files"]))


def show(lines: Sequence[Sequence[str]]) -> None:
    """Print a table whose first line names its columns."""
    columns, *rows = lines
    table = Table(*("\n".join(name.rsplit(" ", 1)) for name in columns), box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def write_pages(results: Mapping[str, Any]) -> None:
    """Put the section into docs/speed.md and the table into the README."""
    write_section(SPEED, speed_section(results))
    write_section(README, readme_table(results))


def write_section(path: Path, section: Sequence[str]) -> None:
    """Put a section between its two marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{path} lacks the marks {BEGIN} and {END}; put them where the section belongs.")
    path.write_text("\n".join([before + BEGIN, "", *section, "", END + after]), encoding="utf-8")


if __name__ == "__main__":
    write(RESULTS)
