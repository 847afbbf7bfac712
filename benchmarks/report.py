"""How a page of figures is written: its options, its head with the machine, its tables, medians with their range."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from w2v_runtime.threads.processors import available

RESULTS = Path(__file__).resolve().parent / "results"
MIB, GIB, GIGA = 2**20, 2**30, 1e9
#: Instructions that decide the speed of matrix products.
_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16")
_PACKAGES = ("torch", "transformers", "optimum-onnx", "onnxruntime", "openvino", "ctranslate2", "numpy", "w2v-onnx")


def parser(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options.add_argument("--tables", action="store_true", help="write the page again from stored figures, no more")
    return options


def origin() -> dict[str, Any]:
    """How and where figures come about: command, date and machine."""
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }


def machine() -> dict[str, str]:
    """Processor, threads of each engine, instructions, memory, system, and versions of packages."""
    cpu = _fields("/proc/cpuinfo")
    flags = (cpu.get("flags") or cpu.get("Features", "")).split()
    return {
        "processor": f"{cpu.get('model name', platform.machine())}, {os.cpu_count()} cores",
        "threads": str(available()),
        "instructions": " ".join(flag for flag in _FLAGS if flag in flags),
        "memory": f"{int(_fields('/proc/meminfo')['MemTotal'].split()[0]) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def _fields(path: str) -> dict[str, str]:
    """The first value of each field of a file of ``name: value`` lines."""
    found: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def load(folder: Path, name: str) -> dict[str, Any]:
    """The stored figures, none where there are none yet."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(folder: Path, name: str, figures: Mapping[str, Any]) -> None:
    """Store figures."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(figures, indent=2, ensure_ascii=False)
    (folder / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def records(
    options: argparse.Namespace, page: str, names: Iterable[str], measure: Callable[[str], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The stored records of a page, by name; those of ``names`` are measured anew first, and stored one by one."""
    found = load(options.output, page)
    for name in () if options.tables else names:
        found[name] = origin() | measure(name)
        save(options.output, page, found)
    return found


def write(folder: Path, name: str, lines: Sequence[str], shown: bool = True) -> None:
    """Write a page, and print it where it is to be shown."""
    if shown:
        print("\n".join(lines))
    (folder / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def head(title: str, said: str, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What stands over the tables: how the figures came about, and the machine of each record: text, or facts."""
    machines = defaultdict(list)
    for name, record in measured.items():
        held = record.get("machine", "not noted")
        machines[held if isinstance(held, str) else "; ".join(map(" ".join, held.items()))].append(name)
    lines = [f"# {title}", "", *wrapped(said), ""]
    for held, names in machines.items():
        of = f" of {', '.join(names)}" if len(machines) > 1 else ""
        lines += [*wrapped(f"Machine{of}: {held}"), ""]
    return lines


def wrapped(text: str) -> list[str]:
    """Lines as wide as the README's, without breaking a link or a command."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Rows of Markdown from cells by column; a row may lack some."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [[f" {row[column]} " if row.get(column) else " " for column in columns] for row in rows]
    head = [f" {column} " if column else " " for column in columns]
    return [f"|{'|'.join(line)}|" for line in (head, ["---"] * len(columns), *lines)]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and the range where there are several."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}}–{max(values):{form}})"
