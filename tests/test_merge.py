"""Joining the outputs of shards: in input order, from any formats to any, and only what belongs together."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import journal_line, run_merge
from w2v_models.errors import OutputError
from w2v_runtime.embedding.results import Embedding, FrameTimes
from w2v_runtime.runs.inputs import Shard
from w2v_runtime.runs.journal import UNKNOWN, Entry, Header, Inputs, Stamp, read_entries, write_journal
from w2v_runtime.runs.merge import Joined, merge
from w2v_runtime.runs.readback import RUN, FinishedOutput, run_record
from w2v_runtime.stores import Layout, open_store, output_format, read_metadata, read_values

DIM = 4
LABELS = ("arousal", "valence")
FORMATS = ["npz", "csv", "jsonl", "parquet", "h5", "scp", "npy"]
Edit = Callable[[Header], Header]


def name_of(folder: Path, stem: str, kind: str) -> str:
    """An output as a user types it."""
    if kind in ("parquet", "h5", "scp"):
        pytest.importorskip({"parquet": "pyarrow", "h5": "h5py", "scp": "kaldiio"}[kind])
    return f"{folder / stem}/" if kind == "npy" else str(folder / f"{stem}.{kind}")


def result(index: int, level: str = "utterance", layers: int = 1, head: str = "utterance") -> Embedding:
    """What the input ``index`` gives; every third has a warning."""
    shape = ((index % 5 + 1,) if level == "frame" else ()) + ((layers, DIM) if layers > 1 else (DIM,))
    values = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
    logits = np.array([index, -index], np.float32) / 7
    if head == "frame":
        logits = logits + np.arange(index % 5 + 1, dtype=np.float32)[:, np.newaxis]
    return Embedding(f"in/{index:03}.wav", values, index / 3, logits, ("cut short",) if index % 3 == 0 else ())


def write_part(
    output: str,
    shard: str,
    indices: list[int],
    level: str = "utterance",
    layers: int = 1,
    head: str = "utterance",
    edit: Edit = lambda header: header,
    total: int | None = None,
    listed: str = "one list",
    **metadata: Any,
) -> str:
    """An output and its journal as a finished run of ``--shard`` leaves them.

    Of ``total`` inputs of the list those fail that are not among ``indices``; without, the run says nothing of them, as
    those of the release before.
    """
    names = tuple(str(layer) for layer in range(layers)) if layers > 1 else ("last",)
    made = [result(index, level, layers, head) for index in indices]
    described = {
        "model": "tiny",
        "level": level,
        "labels": list(LABELS),
        "head_level": head,
        "frame_step_seconds": 0.02,
        "frame_width_seconds": 0.025,
        "device": "cpu",
    }
    layout = Layout(
        count=len(made),
        frames=sum(len(embedding.values) for embedding in made) if level == "frame" else 0,
        dim=DIM,
        layers=names,
        level=level,  # type: ignore[arg-type]
        labels=LABELS,
        times=FrameTimes(0.02, 0.025),
        metadata=described | metadata,
        head_level=head,  # type: ignore[arg-type]
    )
    fingerprint = {"model": "tiny", "precision": "fp32", "level": level, "layers": list(names)}
    header = Header(fingerprint, shard, finished=True)
    if total is not None:
        failed = tuple(i for i in range(total) if Shard.of(shard).holds(i) and i not in indices)
        seen = Inputs(total, hashlib.sha256(listed.encode()).hexdigest())
        header = dataclasses.replace(header, inputs=seen, failed=failed)
    layout.metadata[RUN] = run_record(edit(header))
    store = open_store(Path(output), layout, output_format(output))
    for embedding in made:
        store.write(embedding)
    store.commit()
    entries = [Entry.of(e, Stamp(index, 1), index, offset=None) for index, e in zip(indices, made, strict=True)]
    write_journal(journal_of(output), header, entries)
    lines = journal_of(output).read_bytes().split(b"\n", 1)
    lines[0] = journal_line(json.dumps(dataclasses.asdict(edit(header))).encode())
    journal_of(output).write_bytes(b"\n".join(lines))
    return output


def journal_of(output: str) -> Path:
    path = Path(output)
    return path.with_name(f".{path.name}.w2v-journal")


def three_parts(folder: Path, kind: str = "npz", **options: Any) -> list[str]:
    """Shards of ten inputs of which the fifth failed, in no order."""
    indices = [index for index in range(10) if index != 4]
    return [
        write_part(
            name_of(folder, f"part{shard}", kind),
            f"{shard}/3",
            [i for i in indices if i % 3 == shard - 1],
            **({"total": 10} | options),
        )
        for shard in (2, 3, 1)
    ]


def join(parts: list[str], output: str, overwrite: bool = False) -> Joined:
    return merge(parts, Path(output), output_format(output), overwrite)


def content(path: Path) -> dict[str, bytes]:
    """The bytes of a file, or of all files of a folder, by their names inside it."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    return {entry.relative_to(path).as_posix(): entry.read_bytes() for entry in files}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("level", "layers", "head"),
    [
        ("utterance", 1, "utterance"),
        ("utterance", 2, "utterance"),
        ("frame", 1, "utterance"),
        ("frame", 2, "utterance"),
        ("frame", 1, "frame"),
        ("frame", 2, "frame"),
    ],
)
def test_merged_equals_a_run_without_shards(tmp_path: Path, kind: str, level: str, layers: int, head: str) -> None:
    """The joined output is byte for byte that of one run over all inputs, and so is its journal."""
    parts = three_parts(tmp_path, kind, level=level, layers=layers, head=head)
    (tmp_path / "whole").mkdir()
    indices = [index for index in range(10) if index != 4]
    whole = write_part(name_of(tmp_path / "whole", "out", kind), "1/1", indices, level, layers, head, total=10)
    (tmp_path / "merged").mkdir()
    merged = name_of(tmp_path / "merged", "out", kind)
    assert join(parts, merged) == Joined(embedded=9, failed=1)
    results = FinishedOutput.open(Path(merged), output_format(merged)).results()
    for (entry, actual), index in zip(results, indices, strict=True):
        expected = result(index, level, layers, head)
        assert (entry.index, actual.path, actual.warnings) == (index, expected.path, expected.warnings)
        assert actual.logits.shape == expected.logits.shape
        assert actual.logits.tobytes() == expected.logits.tobytes()
        assert actual.values.tobytes() == expected.values.tobytes()
    if kind in ("h5", "scp"):  # HDF5 stores when an object was made, Kaldi where it is
        assert read_metadata(Path(merged), kind) == read_metadata(Path(whole), kind)
    else:
        assert content(Path(merged)) == content(Path(whole))
    assert Header.read(journal_of(merged)) == Header.read(journal_of(whole))
    assert list(read_entries(journal_of(merged))) == list(read_entries(journal_of(whole)))


def test_logits_by_frame_stay_with_their_frames(tmp_path: Path) -> None:
    """Parts of different formats whose head answers frame by frame join into rows with each frame's own columns."""
    options = {"level": "frame", "head": "frame"}
    parts = [
        write_part(name_of(tmp_path, "a", "jsonl"), "1/3", [0, 3], **options),
        write_part(name_of(tmp_path, "b", "npy"), "2/3", [1, 4], **options),
        write_part(name_of(tmp_path, "c", "csv"), "3/3", [2], **options),
    ]
    join(parts, str(tmp_path / "out.npz"))
    with np.load(tmp_path / "out.npz") as stored:
        expected = np.concatenate([result(index, **options).logits for index in range(5)])
        assert stored["logits"].tobytes() == expected.tobytes()
        assert stored["frame_offsets"].tolist() == [0, 1, 3, 6, 10, 15]
        assert stored["logit_names"].tolist() == list(LABELS)


def test_parts_may_have_any_formats(tmp_path: Path) -> None:
    """Parts of different formats join into a third, with every value, label and time in its place."""
    parts = [
        write_part(name_of(tmp_path, "a", "jsonl"), "1/3", [0, 3]),
        write_part(name_of(tmp_path, "b", "npy"), "2/3", [1, 4]),
        write_part(name_of(tmp_path, "c", "npz"), "3/3", [2]),
    ]
    join(parts, str(tmp_path / "out.csv"))
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"in/{index:03}.wav" for index in range(5)]
    for index, row in enumerate(rows):
        expected = result(index)
        assert float(row["end"]) == expected.duration
        assert [np.float32(row[label]) for label in LABELS] == expected.logits.tolist()
        assert [np.float32(row[f"f{i}"]) for i in range(DIM)] == expected.values.tolist()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("level", "head"), [("utterance", "utterance"), ("frame", "utterance"), ("frame", "frame")])
def test_parts_without_inputs(tmp_path: Path, kind: str, level: str, head: str) -> None:
    """Shards that got no inputs join as well, beside others and alone."""
    parts = [
        write_part(name_of(tmp_path, "a", kind), "1/2", [], level, head=head),
        write_part(name_of(tmp_path, "b", kind), "2/2", [1], level, head=head),
        write_part(name_of(tmp_path, "c", kind), "2/2", [], level, head=head),
    ]
    one, none = name_of(tmp_path, "one", kind), name_of(tmp_path, "none", kind)
    assert join(parts[:2], one).embedded == 1
    assert join([parts[0], parts[2]], none).embedded == 0
    values = list(read_values(Path(one), output_format(one), [result(1, level).values.shape]))
    assert values[0].tobytes() == result(1, level).values.tobytes()
    assert list(read_values(Path(none), output_format(none), [])) == []
    assert Header.read(journal_of(none)).shard == "1/1"


def test_metadata_keep_what_differs(tmp_path: Path) -> None:
    """Metadata of the parts hold for the whole; of what differs, such as devices, all is kept."""
    parts = [
        write_part(name_of(tmp_path, "a", "npz"), "1/3", [0], device="cuda:0"),
        write_part(name_of(tmp_path, "b", "npz"), "2/3", [1]),
        write_part(name_of(tmp_path, "c", "npz"), "3/3", [2]),
    ]
    join(parts, str(tmp_path / "out.npz"))
    metadata = read_metadata(tmp_path / "out.npz", "npz")
    assert metadata["device"] == ["cuda:0", "cpu"]
    assert metadata["model"] == "tiny"
    assert metadata["warnings"] == {"in/000.wav": ["cut short"]}


def changed(**fields: Any) -> Edit:
    return lambda header: dataclasses.replace(header, **fields)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"shard": "3/3"}, r"^shard 2/3 is missing; name the output of every shard\.$"),
        ({"shard": "1/3", "indices": [0]}, r"second\.npz and .*first\.npz are both shard 1/3"),
        ({"shard": "2/2"}, r"second\.npz is shard 2/2, but .*first\.npz is shard 1/3"),
        ({"edit": changed(finished=False)}, r"second\.npz is unfinished; .*w2v-embed --shard 2/3 --resume"),
        ({"edit": changed(format=1)}, r"\.second\.npz\.w2v-journal was written by another release .*--overwrite"),
        ({"level": "frame"}, r"second\.npz is of another run than .*first\.npz: level is 'frame', not 'utterance'"),
        ({"labels": ["mood", "valence"]}, r"labels is \['mood', 'valence'\], not \['arousal', 'valence'\]"),
    ],
    ids=["missing", "repeated", "other-count", "unfinished", "other-release", "other-level", "other-labels"],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    """A shard that is missing, repeated, unfinished or of another run is named, and no output appears."""
    options = {"shard": "2/3", "indices": [int(second.get("shard", "2/3")[0]) - 1]} | second
    parts = [
        write_part(name_of(tmp_path, "first", "npz"), "1/3", [0]),
        write_part(name_of(tmp_path, "second", "npz"), **options),
    ]
    before = set(tmp_path.iterdir())
    with pytest.raises(OutputError, match=message):
        join(parts, str(tmp_path / "out.npz"))
    assert set(tmp_path.iterdir()) == before


def test_an_output_of_another_program_is_refused(tmp_path: Path) -> None:
    """What has neither a journal nor a word of the run that made it is named with what it lacks."""
    part = str(tmp_path / "part.npz")
    np.savez(part, embeddings=np.zeros((1, 4)), metadata=np.array("{}"))
    with pytest.raises(OutputError, match=r"part\.npz has no journal beside it \(\.part\.npz\.w2v-journal\) and does"):
        join([part], str(tmp_path / "out.npz"))


def remove(journal: Path) -> None:
    journal.unlink()


def damage_header(journal: Path) -> None:
    journal.write_bytes(b"\0" + journal.read_bytes()[1:])


def damage_line(journal: Path) -> None:
    """Turn one digit of the second entry into another."""
    lines = journal.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"shape":[', b'"shape":[1', 1)
    journal.write_bytes(b"\n".join(lines))


def tear(journal: Path) -> None:
    journal.write_bytes(journal.read_bytes()[:-20])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("level", "layers", "head"), [("utterance", 2, "utterance"), ("frame", 1, "utterance"), ("frame", 2, "frame")]
)
@pytest.mark.parametrize("harm", [remove, damage_header, damage_line, tear])
def test_a_complete_part_is_joined_without_its_journal(
    tmp_path: Path, kind: str, level: str, layers: int, head: str, harm: Callable[[Path], None]
) -> None:
    """An output tells itself of its inputs and its run: the joined one is that of parts whose journals are whole."""
    options = {"level": level, "layers": layers, "head": head}
    (tmp_path / "whole").mkdir()
    whole, merged = name_of(tmp_path / "whole", "out", kind), name_of(tmp_path, "out", kind)
    parts = three_parts(tmp_path, kind, **options)
    join(parts, whole)
    for part in parts:
        harm(journal_of(part))
    assert join(parts, merged) == Joined(embedded=9, failed=1)
    if kind in ("h5", "scp"):
        assert read_metadata(Path(merged), kind) == read_metadata(Path(whole), kind)
        mine, theirs = (list(FinishedOutput.open(Path(path), kind).results()) for path in (merged, whole))
        assert [actual.values.tobytes() for _, actual in mine] == [expected.values.tobytes() for _, expected in theirs]
    else:
        assert content(Path(merged)) == content(Path(whole))
    unstamped = [dataclasses.replace(entry, stamp=UNKNOWN) for entry in read_entries(journal_of(whole))]
    assert [dataclasses.replace(entry, stamp=UNKNOWN) for entry in read_entries(journal_of(merged))] == unstamped


def test_parts_of_different_lists_are_refused(tmp_path: Path) -> None:
    """Two machines that saw other files do not add up: nothing is joined, where files would miss or be there twice."""
    parts = [
        write_part(name_of(tmp_path, "a", "npz"), "1/2", [0, 2], total=4),
        write_part(name_of(tmp_path, "b", "npz"), "2/2", [1, 3], total=4, listed="another list"),
    ]
    before = set(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"b\.npz was made of another list of inputs than .*a\.npz .*--resume"):
        join(parts, str(tmp_path / "out.npz"))
    parts[1] = write_part(name_of(tmp_path, "c", "npz"), "2/2", [1, 3], total=5)
    with pytest.raises(OutputError, match=r"\(5 inputs, \w+…, not 4 inputs, \w+…\)"):
        join(parts, str(tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz").exists()
    assert set(tmp_path.iterdir()) >= before


def test_a_part_that_covers_less_than_its_share_is_refused(tmp_path: Path) -> None:
    """An input that has neither a result nor a failure is missing, and its part is named with what completes it."""
    parts = [
        write_part(name_of(tmp_path, "a", "npz"), "1/2", [0, 2], total=4),
        write_part(name_of(tmp_path, "b", "npz"), "2/2", [1], total=4, edit=changed(failed=())),
    ]
    with pytest.raises(OutputError, match=r"b\.npz lacks results: 1 of 2 are there\. .*--shard 2/2 --resume"):
        join(parts, str(tmp_path / "out.npz"))


def test_parts_that_do_not_know_their_list_hold_no_path_twice(tmp_path: Path) -> None:
    """Of the release before, whose journals say nothing of the list, a path in two parts betrays two lists."""
    parts = [
        write_part(name_of(tmp_path, "a", "npz"), "1/2", [0, 2]),
        write_part(name_of(tmp_path, "b", "npz"), "2/2", [1]),
    ]
    lines = [json.loads(line) for line in journal_of(parts[1]).read_bytes().splitlines()]
    lines[1]["path"] = "in/002.wav"
    journal_of(parts[1]).write_bytes(b"".join(journal_line(json.dumps(line).encode()) + b"\n" for line in lines))
    with pytest.raises(OutputError, match=r"in/002\.wav is in .*b\.npz and in .*a\.npz"):
        join(parts, str(tmp_path / "out.npz"))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_part_leaves_nothing(tmp_path: Path, kind: str) -> None:
    """A part with fewer results than its journal has lines is refused, and no output or temporary file stays."""
    parts = three_parts(tmp_path, kind)
    (tmp_path / "elsewhere").mkdir()
    shorter = write_part(name_of(tmp_path / "elsewhere", "part2", kind), "2/3", [1])
    journal_of(parts[0]).replace(journal_of(shorter))
    before = set(tmp_path.iterdir())
    with pytest.raises(OutputError, match=r"part2(\.\w+)? is not the output that"):
        join([shorter, *parts[1:]], name_of(tmp_path, "out", kind))
    assert set(tmp_path.iterdir()) == before


def test_results_whose_place_is_unknown_are_refused(tmp_path: Path) -> None:
    """A shard whose journal counts the inputs otherwise than shards do was continued with other inputs: refused."""
    for stem, indices in (("order", [3, 0]), ("stride", [0, 1])):
        parts = [write_part(name_of(tmp_path, stem, "npz"), "1/3", indices)]
        parts += [write_part(name_of(tmp_path, f"{stem}{i}", "npz"), f"{i}/3", []) for i in (2, 3)]
        with pytest.raises(
            OutputError, match=rf"{stem}\.npz was continued with other inputs .*--shard 1/3 --overwrite"
        ):
            join(parts, str(tmp_path / "out.npz"))


def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    """An output, or an unfinished run beside its name, is refused without ``overwrite`` and replaced with it."""
    parts = three_parts(tmp_path)
    output = write_part(name_of(tmp_path, "out", "npz"), "1/1", [77])
    before = content(tmp_path)
    with pytest.raises(OutputError, match=r"out\.npz exists; replace it with --overwrite"):
        join(parts, output)
    assert content(tmp_path) == before
    assert join(parts, output, overwrite=True).embedded == 9
    assert [entry.index for entry in read_entries(journal_of(output))] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    (tmp_path / ".other.npz.w2v-values").write_bytes(b"")
    with pytest.raises(OutputError, match=r"other\.npz has an unfinished run beside it"):
        join(parts, str(tmp_path / "other.npz"))
    join(parts, str(tmp_path / "other.npz"), overwrite=True)
    assert not (tmp_path / ".other.npz.w2v-values").exists()


def failures_of(output: str) -> Path:
    path = Path(output)
    return path.with_name(path.name + ".failures.jsonl")


def failure(index: int) -> str:
    return json.dumps({"path": f"in/{index:03}.wav", "stage": "read", "reason": "no sound"}) + "\n"


def test_lists_of_failures_are_joined(tmp_path: Path) -> None:
    """The parts' lists become one, shard by shard, and stay; one of an output that is replaced goes.

    The runs do not say what failed, as those of the release before; where they do, that counts.
    """
    second, third, first = three_parts(tmp_path, total=None)
    failures_of(second).write_text(failure(4))
    failures_of(first).write_text(failure(9) + failure(12))
    output = str(tmp_path / "out.npz")
    assert join([second, third, first], output) == Joined(embedded=9, failed=3)
    assert failures_of(output).read_text() == failure(9) + failure(12) + failure(4)
    assert failures_of(second).read_text() == failure(4)
    for part in (first, second):
        failures_of(part).unlink()
    assert join([second, third, first], output, overwrite=True) == Joined(embedded=9, failed=0)
    assert not failures_of(output).exists()


@pytest.mark.parametrize("damage", ["{}\n", failure(4)[:-9], failure(4)[:-1], "\n", "[1]\n"])
def test_a_damaged_list_of_failures_is_refused(tmp_path: Path, damage: str) -> None:
    """A line that names no failed input is refused with the list's name, and nothing appears."""
    parts = three_parts(tmp_path)
    failures_of(parts[0]).write_text(damage)
    before = set(tmp_path.iterdir())
    with pytest.raises(
        OutputError, match=r"part2\.npz\.failures\.jsonl is no list of failures; .*--shard 2/3 --resume"
    ):
        join(parts, str(tmp_path / "out.npz"))
    assert set(tmp_path.iterdir()) == before


def test_a_part_is_never_the_output(tmp_path: Path) -> None:
    """Naming a part as the output is refused even with ``overwrite``."""
    parts = three_parts(tmp_path)
    (tmp_path / "link.npz").symlink_to(parts[2])
    for name in (f"{tmp_path}/../{tmp_path.name}/part1.npz", str(tmp_path / "link.npz")):
        with pytest.raises(OutputError, match=r"\.npz is one of the parts and the merged output at once"):
            join(parts, name, overwrite=True)


@pytest.mark.parametrize("victim", ["journal", "failures", "metadata"])
def test_what_stands_beside_a_part_is_never_the_output(tmp_path: Path, victim: str) -> None:
    """Nor is its journal, its list of failures or its metadata file, whatever name leads there."""
    parts = three_parts(tmp_path, "csv")
    failures_of(parts[0]).write_text(failure(4))
    path = {
        "journal": journal_of(parts[0]),
        "failures": failures_of(parts[0]),
        "metadata": Path(f"{parts[0]}.metadata.json"),
    }[victim]
    before = content(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(OutputError, match=r"link\.jsonl is a part's .* and the merged output at once"):
        join(parts, str(tmp_path / "link.jsonl"), overwrite=True)
    (tmp_path / "link.jsonl").unlink()
    assert content(tmp_path) == before


def test_a_file_of_the_user_beside_the_output_is_not_replaced(tmp_path: Path) -> None:
    """What bears the name of the list of failures or of the metadata and is none stays, and nothing is joined."""
    parts = three_parts(tmp_path)
    for name, output in (("out.npz.failures.jsonl", "out.npz"), ("out.csv.metadata.json", "out.csv")):
        (tmp_path / name).write_text("a thesis\n")
        with pytest.raises(OutputError, match=f"{name} is no"):
            join(parts, str(tmp_path / output))
        assert (tmp_path / name).read_text() == "a thesis\n"
        assert not (tmp_path / output).exists()


def test_many_parts_in_flat_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining holds one result and a block of each part, not the fourteen megabytes of all."""
    monkeypatch.setattr("w2v_runtime.stores.reading.BLOCK_BYTES", 2**14)
    parts = [
        write_part(name_of(tmp_path, f"{i}", "npz"), f"{i}/20", list(range(i - 1, 600, 20)), "frame", layers=500)
        for i in range(1, 21)
    ]
    tracemalloc.start()
    assert join(parts, str(tmp_path / "out.npz")).embedded == 600
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out.npz").stat().st_size > 14e6
    assert peak < 6e6


def test_command(tmp_path: Path) -> None:
    """The command joins and says so on standard error; what it refuses is one sentence and exit code 2."""
    parts, output = three_parts(tmp_path), str(tmp_path / "out.jsonl")
    done = run_merge("-o", output, *parts)
    assert (done.returncode, done.stdout) == (3, "")
    failed = "1 failed (listed where --failures said)"
    assert done.stderr == f"w2v-merge: 9 inputs from 3 parts, {failed} → {output}\n"
    assert [json.loads(line)["file"][3:6] for line in Path(output).read_text().splitlines()] == [
        f"{index:03}" for index in range(10) if index != 4
    ]
    for words, message in (
        (("-o", output, *parts), "exists; replace it with --overwrite"),
        (("-o", "-", *parts), "cannot go to standard output"),
        (("-o", str(tmp_path / "x.npz"), *parts[:2]), "shard 1/3 is missing"),
        (("-o", str(tmp_path / "x.wav"), *parts), "no known format"),
        (("-o", str(tmp_path / "x.npz")), "PART"),
    ):
        refused = run_merge(*words)
        assert refused.returncode == 2
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
    assert run_merge("-o", output, "--overwrite", *parts).returncode == 3
    failures_of(parts[0]).write_text(failure(4))
    failed = run_merge("-o", output, "--overwrite", *parts)
    assert failed.returncode == 3
    assert failed.stderr == f"w2v-merge: 9 inputs from 3 parts, 1 failed (see {output}.failures.jsonl) → {output}\n"
    assert not list(tmp_path.glob("*.lock"))
