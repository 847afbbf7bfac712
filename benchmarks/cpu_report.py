"""The page, the picture, the section of docs/speed.md and the README's table from results/cpu.json.

Without measuring again: ``python benchmarks/cpu_report.py``.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import report
from ceilings import CEILINGS
from comparison import peer_table, rate, ratios
from peers import BASELINE, PEERS
from report import GIGA, MIB, wrapped

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README, SPEED = HERE.parent / "README.md", HERE.parent / "docs" / "speed.md"
BEGIN, END = "<!-- benchmarks/cpu.py writes this section -->", "<!-- end of the section -->"
ROWS = {"10s": "10 s of audio, warm", "1s": "1 s of audio, warm", "corpus": "a corpus", "file": "one file"}
#: Of the picture: rows, grey that stands out from white and black, colours of others and ours, dark and light by row.
PICTURED = {"10s": "10 s, warm process", "corpus": "corpus, whole process"}
GREY, OTHERS, OURS = "#7d8590", ("#8c959f", "#afb8c1"), ("#1f7fe0", "#6cb0f7")
#: What the README's table shows of that of the first model, and what it leaves out.
SHOWN_PEERS = (BASELINE, "w2v-onnx cpu fp32", "w2v-onnx cpu int8", "w2v-onnx openvino bf16")
HIDDEN_COLUMN = "1 s, warm"


def sections(results: Mapping[str, Any]) -> list[str]:
    """The tables of every model, each under its title."""
    lines = []
    for short, result in results["models"].items():
        lines += [f"## {short}: {result['model']}", ""]
        forwards = result["forwards"].get("rows", {})
        for name, row in forwards.items():
            lines += [f"### {ROWS[name]} ({row['operations'] / GIGA:.0f} GFLOP)", ""]
            accuracy = result["forwards"]["accuracy"]
            lines += [*peer_table(PEERS, row, result["skipped"], accuracy, fastest(row)), ""]
        for name, row in result["processes"].items():
            what = f"{results['files']} files" if name == "corpus" else ROWS[name]
            lines += [f"### {what}, {row['audio_seconds']:.0f} s in all, whole process", ""]
            lines += [*peer_table(PEERS, row, result["skipped"], {}, {}), ""]
        if forwards:
            lines += ["### Matrix products alone, GFLOP/s", "", *ceiling_table(forwards), ""]
    return lines


def fastest(row: Mapping[str, Any]) -> dict[str, float]:
    """GFLOP/s of the engine that multiplies the model's matrices fastest, by precision."""
    found: dict[str, float] = {}
    for name, times in row["ceilings"].items():
        precision, _ = CEILINGS[name]
        found[precision] = max(found.get(precision, 0), rate(row["product_operations"], times))
    return found


def ceiling_table(rows: Mapping[str, Any]) -> list[str]:
    """What the engines reach on the model's matrix products alone."""
    lines = []
    for name in CEILINGS:
        cells = {"": name}
        for column, row in rows.items():
            rates = [row["product_operations"] / seconds / GIGA for seconds in row["ceilings"].get(name, ())]
            cells[column] = report.spread(rates, ".0f") if rates else "not run"
        lines.append(cells)
    return report.table(lines)


def header(results: Mapping[str, Any]) -> list[str]:
    """What stands over the tables: command, machine, and how the figures are to be read."""
    rounds = ", ".join(f"{ROWS[name]} {count}" for name, count in results["rounds"].items())
    said = (
        f"Made by `{results['command']}` on {results['date']}. The same seeded weights, audio and threads for all. "
        f"Medians of rounds in which every peer has one turn ({rounds}), in brackets the range over the rounds. *Times "
        f"as fast* compares with {BASELINE} (feature extractor, model in inference mode with SDPA, mean over time) "
        "within each round. *Of the ceiling*: GFLOP/s against what the fastest engine reaches in that precision on the "
        "model's matrix products alone. Cosines and differences are against the baseline: frames and pooled vector of "
        "the 10 s, pooled vectors of the files. Signals are speech-like, with pauses. Whole processes start with "
        "Python, end with vectors on the disk, and find their files in the system's cache."
    )
    return report.head("Everything that embeds speech on a processor", said, {"": results})


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
    results = report.load(folder, "cpu")
    report.write(folder, "cpu", [*header(results), *sections(results), "![times as fast](cpu.svg)"], shown=False)
    draw(results, folder / "cpu.svg")
    if folder == RESULTS:
        write_pages(results)
    for short, result in results["models"].items():
        print("\n".join(summary_table(short, result, results["files"])), end="\n\n")


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


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture, without a background, so that it stands on light and dark pages."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY}
    )
    matplotlib.rcParams.update({"ytick.color": GREY, "font.size": 10, "svg.hashsalt": "cpu"})
    from matplotlib import pyplot

    models = results["models"]
    measured = {short: {**model["forwards"].get("rows", {}), **model["processes"]} for short, model in models.items()}
    peers = [p for p in PEERS if any(p in row["seconds"] for rows in measured.values() for row in rows.values())]
    figure, panels = pyplot.subplots(1, len(models), figsize=(9, 1.2 + 0.38 * len(peers)), sharey=True, squeeze=False)
    for axes, (short, rows) in zip(panels[0], measured.items(), strict=True):
        _panel(axes, peers, rows, models[short]["forwards"].get("accuracy", {}))
        axes.set_title(models[short]["model"].rpartition("/")[2], fontsize=11)
    shades = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in OTHERS]
    figure.supxlabel("times as fast as the PyTorch recipe, and smallest cosine of a frame", color=GREY, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.legend(shades, PICTURED.values(), loc="upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def _panel(axes: Any, peers: list[str], rows: Mapping[str, Any], accuracy: Mapping[str, Any]) -> None:
    height = 0.8 / len(PICTURED)
    for place, name in enumerate(PICTURED):
        seconds = rows.get(name, {"seconds": {}})["seconds"]
        for i, peer in enumerate(peers):
            if peer not in seconds:
                continue
            found = ratios(seconds, peer)
            middle, at = statistics.median(found), i - 0.4 + height * (place + 0.5)
            colour = (OURS if PEERS[peer].options else OTHERS)[place]
            axes.barh(at, middle, height * 0.92, color=colour)
            axes.plot([min(found), max(found)], [at, at], color=GREY, linewidth=1)
            near = f", cosine {accuracy[peer]['frame_cosine']:.4f}" if place == 0 and peer in accuracy else ""
            axes.text(max(found) + 0.05, at, f"{middle:.1f}{near}", va="center", fontsize=8)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(peers)), peers)
    axes.set_ylim(len(peers) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xlim(left=0)


if __name__ == "__main__":
    write(RESULTS)
