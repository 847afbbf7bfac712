"""The picture: how many times as fast as the baseline each peer is, a panel a model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpu_report import ratios
from peers import PEERS

#: Grey that stands out from white and from black, and colours for others and for ours, dark and light by row.
_TEXT, _OTHERS, _OURS = "#7d8590", ("#8c959f", "#afb8c1"), ("#1f7fe0", "#6cb0f7")
_ROWS = {"10s": "10 s, warm process", "corpus": "corpus, whole process"}


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Write the picture, without a background, so that it stands on light and dark pages."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"text.color": _TEXT, "axes.labelcolor": _TEXT, "axes.edgecolor": _TEXT, "xtick.color": _TEXT}
    )
    matplotlib.rcParams.update({"ytick.color": _TEXT, "font.size": 10, "svg.hashsalt": "cpu"})
    from matplotlib import pyplot

    models = results["models"]
    measured = {
        short: {name: row for name, row in {**r["forwards"].get("rows", {}), **r["processes"]}.items() if name in _ROWS}
        for short, r in models.items()
    }
    peers = [p for p in PEERS if any(p in row["seconds"] for rows in measured.values() for row in rows.values())]
    figure, panels = pyplot.subplots(1, len(models), figsize=(9, 1.2 + 0.38 * len(peers)), sharey=True, squeeze=False)
    for axes, (short, rows) in zip(panels[0], measured.items(), strict=True):
        _panel(axes, peers, rows)
        axes.set_title(models[short]["model"].rpartition("/")[2], fontsize=11)
    shades = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in _OTHERS]
    figure.supxlabel("times as fast as the PyTorch recipe", color=_TEXT, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.legend(shades, _ROWS.values(), loc="upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, transparent=True, metadata={"Date": None})
    pyplot.close(figure)


def _panel(axes: Any, peers: list[str], rows: Mapping[str, Any]) -> None:
    height = 0.8 / len(_ROWS)
    for place, name in enumerate(_ROWS):
        seconds = rows.get(name, {"seconds": {}})["seconds"]
        for i, peer in enumerate(peers):
            if peer not in seconds:
                continue
            found = ratios(seconds, peer)
            middle, at = statistics.median(found), i - 0.4 + height * (place + 0.5)
            colour = (_OURS if PEERS[peer].options else _OTHERS)[place]
            axes.barh(at, middle, height * 0.92, color=colour)
            axes.plot([min(found), max(found)], [at, at], color=_TEXT, linewidth=1)
            axes.text(max(found) + 0.05, at, f"{middle:.1f}", va="center", fontsize=8)
    axes.axvline(1, color=_TEXT, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(peers)), peers)
    axes.set_ylim(len(peers) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    axes.set_xlim(left=0)
