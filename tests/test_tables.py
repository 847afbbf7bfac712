"""Tables of segments as other tools write them: what is read, what is refused, and where recordings are found."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from w2v_models.errors import AudioError, RefusedError
from w2v_runtime.tables import Column, Table
from w2v_runtime.tables.recordings import Recordings


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_of(path: str, tier: str | None = None) -> list[tuple]:
    table = Table(path, tier)
    return [(row.file, row.start, row.end, row.channel, *table.values(row)) for row in table.rows()]


AUDFORMAT = """file,start,end,emotion
audio/001.wav,0 days,0 days 00:00:01.500000,happy
audio/001.wav,0 days 00:00:02.25,0 days 00:01:03,"sad, very"
audio/002.wav,0 days,NaT,
"""
SEGMENTS = [
    ("audio/001.wav", 0.0, 1.5, None, "happy"),
    ("audio/001.wav", 2.25, 63.0, None, "sad, very"),
    ("audio/002.wav", 0.0, None, None, ""),
]


@pytest.mark.parametrize(
    "content",
    [
        AUDFORMAT.replace("0 days,0", "0 days 00:00:00,0"),
        "\ufeff" + AUDFORMAT.replace("0 days,", "0,").replace("NaT", ""),
        AUDFORMAT.replace("0 days,", "0.0,").replace("\n", "\r\n"),
        AUDFORMAT.replace("0 days,", "00:00:00,").replace("NaT", "nan").encode("utf-16"),
        gzip.compress(AUDFORMAT.replace("0 days,", "+0,").encode()),
    ],
    ids=["timedeltas", "BOM", "CRLF", "UTF-16", "gzip"],
)
def test_csv_as_audformat_and_spreadsheets_write_it(tmp_path, content):
    """Numbers are seconds, strings timedeltas, an empty end is that of the file; of any line ends and encoding."""
    assert rows_of(written(tmp_path, "t.csv", content)) == SEGMENTS


def test_columns_may_come_in_any_order_with_any_delimiter(tmp_path):
    """Tabs and semicolons; more columns before the three."""
    content = "id\tend\tfile\tstart\n7\t2\ta.wav\t1\n"
    expected = [("a.wav", 1.0, 2.0, None, "7")]
    assert rows_of(written(tmp_path, "t.tsv", content)) == expected
    assert rows_of(written(tmp_path, "t.csv", content.replace("\t", ";"))) == expected
    assert rows_of(written(tmp_path, "t", content)) == expected


def test_text_is_a_number_only_if_nothing_of_it_is_lost(tmp_path):
    """Ids keep their zeros, a word makes a column text, and what is missing is none."""
    content = (
        "file,start,end,id,n,m,x,yes,word,big\na,0,1,007,7,1,1.5,True,1,1\na,0,1,8,-8,,2,False,b,99999999999999999999\n"
    )
    table = Table(written(tmp_path, "t.csv", content))
    assert table.columns == (
        Column("id", "str"),
        Column("n", "int"),
        Column("m", "int", missing=True),
        Column("x", "float"),
        Column("yes", "bool"),
        Column("word", "str"),
        Column("big", "float"),
    )
    first, second = (
        [c.typed(v) for c, v in zip(table.columns, table.values(row), strict=True)] for row in table.rows()
    )
    assert first[:6] == ["007", 7, 1, 1.5, True, "1"]
    assert second[:6] == ["8", -8, None, 2.0, False, "b"]


def test_parquet_keeps_its_types(tmp_path):
    """Times as floats, integers or durations; categories as text; lists are left out."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for start, end in (
        ([0.5, 1.0], [1.5, None]),
        ([datetime.timedelta(seconds=0.5), datetime.timedelta(seconds=1)], [datetime.timedelta(seconds=1.5), None]),
    ):
        columns = {
            "file": pa.array(["a.wav", "b.wav"]).dictionary_encode(),
            "start": start,
            "end": end,
            "n": [1, None],
            "vector": [[1.0], [2.0]],
            "yes": [True, False],
            "day": [datetime.date(2020, 1, 2), None],
        }
        path = str(tmp_path / "t.parquet")
        pq.write_table(pa.table(columns), path)
        assert rows_of(path) == [
            ("a.wav", 0.5, 1.5, None, 1, True, "2020-01-02"),
            ("b.wav", 1.0, None, None, None, False, None),
        ]
        assert [column.kind for column in Table(path).columns] == ["int", "bool", "str"]


KALDI = "u1 rec 0.5 2.25\nu2 other 1 -1 1\n\n"


def test_kaldi_segments_with_wav_scp(tmp_path):
    """An end of -1 is the end; the paths of wav.scp may have spaces."""
    path = written(tmp_path, "segments", KALDI)
    assert rows_of(path) == [("rec", 0.5, 2.25, None, "u1"), ("other", 1.0, None, 1, "u2")]
    assert Table(path).named
    written(tmp_path, "wav.scp", "rec  audio/a b.wav\nother /x/c.wav\n")
    assert rows_of(path) == [("audio/a b.wav", 0.5, 2.25, None, "u1"), ("/x/c.wav", 1.0, None, 1, "u2")]
    assert not Table(path).named


def test_no_command_of_wav_scp_is_run(tmp_path):
    """Nor is one that only some recordings have."""
    path = written(tmp_path, "segments", KALDI)
    mark = tmp_path / "mark"
    written(tmp_path, "wav.scp", f"rec a.wav\nother touch {mark} |\n")
    with pytest.raises(RefusedError, match=r"line 2 of .*wav.scp is a command, which is never run"):
        Table(path)
    assert not mark.exists()


RTTM = """;; a comment
SPKR-INFO meet 1 <NA> <NA> <NA> unknown alice <NA>
SPEAKER meet 1 0.50 1.25 <NA> <NA> alice <NA> <NA>
SPEAKER meet 2 3 0.1 <NA> <NA> bob <NA>
LEXEME meet 1 5.0 0.2 hello lex alice 0.9
"""


def test_rttm_and_ctm(tmp_path):
    """Recordings by name, channels from 1 or A, comments, and words or speakers carried through."""
    path = written(tmp_path, "t.rttm", RTTM)
    assert [row[:6] for row in rows_of(path)] == [
        ("meet", 0.5, 1.75, 0, "alice", "SPEAKER"),
        ("meet", 3.0, 3.1, 1, "bob", "SPEAKER"),
        ("meet", 5.0, 5.2, 0, "alice", "LEXEME"),
    ]
    assert rows_of(written(tmp_path, "t.ctm", "talk A 1.0 0.25 hello 0.98\ntalk 2 1.5 0.25 world\n")) == [
        ("talk", 1.0, 1.25, 0, "hello", "0.98"),
        ("talk", 1.5, 1.75, 1, "world", None),
    ]
    assert rows_of(written(tmp_path, "u", RTTM.splitlines(keepends=True)[2]))[0][0] == "meet"


LONG_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

xmin = 0
xmax = 2.3
tiers? <exists>
size = 2
item []:
    item [1]:
        class = "IntervalTier"
        name = "words"
        xmin = 0
        xmax = 2.3
        intervals: size = 3
        intervals [1]:
            xmin = 0
            xmax = 0.7
            text = ""
        intervals [2]:
            xmin = 0.7
            xmax = 1.2
            text = "say ""größer"", ok"
        intervals [3]:
            xmin = 1.2
            xmax = 2.3
            text = "two words"
    item [2]:
        class = "TextTier"
        name = "clicks"
        xmin = 0
        xmax = 2.3
        points: size = 1
        points [1]:
            number = 1.5
            mark = "x"
"""
SHORT_GRID = """File type = "ooTextFile"
Object class = "TextGrid"

0
2.3
<exists>
1
"IntervalTier"
"words"
0
2.3
3
0
0.7
""
0.7
1.2
"say ""größer"", ok"
1.2
2.3
"two words"
"""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("grid", [LONG_GRID, SHORT_GRID], ids=["long", "short"])
def test_textgrids_of_praat(tmp_path, grid, encoding):
    """Long and short, in Praat's encodings, with CR LF: the intervals of the one tier that has some, but empty ones."""
    pytest.importorskip("praatio")
    path = written(tmp_path, "rec.TextGrid", grid.replace("\n", "\r\n").encode(encoding))
    label = 'say "größer", ok'
    expected = [("rec", 0.7, 1.2, None, label), ("rec", 1.2, 2.3, None, "two words")]
    assert rows_of(path) == expected
    assert Table(path).named


def test_a_folder_of_textgrids_and_their_tiers(tmp_path):
    """Written by praatio; recordings are named by their place in the folder; of several tiers one must be chosen."""
    textgrid = pytest.importorskip("praatio.textgrid")
    for name, labels in (("a", ["x", "", "y"]), ("below/b", ["z"])):
        grid = textgrid.Textgrid()
        entries = [(i, i + 1, label) for i, label in enumerate(labels)]
        for tier in ("words", "phones"):
            grid.addTier(textgrid.IntervalTier(tier, entries, 0, 3))
        path = tmp_path / "grids" / f"{name}.TextGrid"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.save(str(path), format="short_textgrid", includeBlankSpaces=True)
    folder = str(tmp_path / "grids")
    assert rows_of(folder, "phones") == [
        ("a", 0.0, 1.0, None, "x"),
        ("a", 2.0, 3.0, None, "y"),
        ("below/b", 0.0, 1.0, None, "z"),
    ]
    with pytest.raises(RefusedError, match="choose a tier with --tier; it has 2 tiers with intervals: words, phones"):
        Table(folder)
    with pytest.raises(RefusedError, match="the tier 'none' is not there; those with intervals are: words, phones"):
        Table(folder, "none")


CUT = {
    "id": "cut-1",
    "start": 1.5,
    "duration": 2.0,
    "channel": 1,
    "supervisions": [{"id": "s", "recording_id": "r", "start": 0, "duration": 2, "text": "hi", "speaker": "eve"}],
    "recording": {"id": "r", "sources": [{"type": "file", "channels": [0, 1], "source": "audio/r.wav"}]},
    "type": "MonoCut",
}


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t"])
def test_cuts_of_lhotse_and_manifests_of_nemo(tmp_path, name):
    """Compressed or not, by suffix or content."""
    nemo = {"audio_filepath": "a.wav", "offset": 0.5, "duration": 1.25, "text": "yes, no", "label": 3}
    whole = {"audio_filepath": "b.wav", "text": "all"}
    for lines, expected in (
        ([CUT], [("audio/r.wav", 1.5, 3.5, 1, "cut-1", "eve", "hi")]),
        ([nemo, whole], [("a.wav", 0.5, 1.75, None, "yes, no", 3), ("b.wav", 0.0, None, None, "all", None)]),
    ):
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        path = written(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
        assert rows_of(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", "", "no column file, start, end"),
        ("t.csv", "file,begin,end\na,0,1\n", "no column start; .* this one has: file, begin, end"),
        ("t.csv", "file,start,end,x,x\na,0,1,1,1\n", "two columns 'x'"),
        ("t.csv", "file,start,end\n", "has no segments"),
        ("t.csv", "file,start,end,a\0b\na,0,1,x\n", "without control characters"),
        ("t.csv", "file,start,end\na,0,1\nb,zero,1\n", "line 3: start 'zero' is no time"),
        ("t.csv", "file,start,end\na,0,inf\n", "line 2: end 'inf' is no time"),
        ("t.csv", "file,start,end\na,1e308,\n", "line 2: start '1e308' is no time"),
        ("t.csv", "file,start,end\na,0,1\nb,,1\n", "line 3 has no start; write 0"),
        ("t.csv", "file,start,end\na,nan,1\n", "line 2 has no start"),
        ("t.csv", "file,start,end\na,0\n", "line 2 has 2 fields, but the header has 3"),
        ("t.csv", "file,start,end\n,0,1\n", "line 2 names no file"),
        ("t.csv", 'file,start,end\n"a,0,1\n', "line 2 is no row of a table"),
        ("t.csv", "file,start,end\nü,0,1\n".encode("utf-16")[:-1], "cannot be read"),
        ("t.csv.gz", gzip.compress(AUDFORMAT.encode())[:-20], "cannot be"),
        ("t.dat", "hello world\n", "has no known format"),
        ("t.rttm", "SPEAKER a 1 0\n", "line 1 has 4 fields"),
        ("t.ctm", "a 1 0 x word\n", "line 1: duration 'x' is no time"),
        ("segments", "u rec 0\n", "line 1 has 3 fields"),
        ("segments", "u a 0 1\nv a 1 2\nu a 2 3\n", "the utterance 'u' twice, in lines 1 and 3"),
        ("t.jsonl", "{\n", "line 1 is not JSON"),
        ("t.jsonl", "[]\n", "line 1: it has neither audio_filepath"),
        ("t.jsonl", json.dumps(CUT | {"duration": None}), "line 1: it lacks"),
        ("t.jsonl", json.dumps(CUT) + "\n" + json.dumps(CUT), "the id 'cut-1' twice"),
        ("t.jsonl", json.dumps(CUT).replace('"file"', '"command"'), "of type 'command', which is neither run nor"),
        ("t.jsonl", json.dumps(CUT).replace('"file"', '"url"'), "of type 'url', which is neither run nor fetched"),
        ("t.parquet", "no parquet", "cannot be"),
        ("t.TextGrid", "no grid", "no TextGrid"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_row(tmp_path, name, content, words):
    """Before anything is embedded."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith("TextGrid"):
        pytest.importorskip("praatio")
    with pytest.raises(RefusedError, match=words) as refused:
        Table(written(tmp_path, name, content))
    assert str(tmp_path) in str(refused.value)


def test_a_table_is_a_file_that_does_not_change(tmp_path):
    """Neither a pipe nor one that is rewritten between two readings."""
    os.mkfifo(tmp_path / "t.csv")
    with pytest.raises(RefusedError, match="is no file"):
        Table(str(tmp_path / "t.csv"))
    table = Table(path := written(tmp_path, "u.csv", AUDFORMAT))
    Path(path).write_text(AUDFORMAT + AUDFORMAT)
    with pytest.raises(RefusedError, match="was changed while it was in use"):
        list(table.rows())


def test_a_million_rows_are_checked_in_flat_memory(tmp_path):
    """Less than a hundred megabytes more than an empty table."""
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("file,start,end,label,n\n")
        for block in range(100):
            file.writelines(
                f"a/{i % 997}.wav,{i * 0.25},{i * 0.25 + 1},l{i},{i}\n"
                for i in range(block * 10**4, (block + 1) * 10**4)
            )
    code = f"""
import resource
from w2v_runtime.tables import Table
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
table = Table({str(path)!r})
assert table.count == 10**6, table.count
assert sum(1 for row in table.rows()) == 10**6
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100 * 1024


# ---- finding recordings ----


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Recordings below two inputs, beside the table, and in the working directory."""
    for name in ("in/x/a.wav", "in/y/a.wav", "in/b.wav", "table/c.wav", "cwd/d.wav", "in/e.f.wav", "in/g.flac"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.zeros(400), 16000)
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


def test_files_are_found_below_inputs_beside_the_table_and_here(place):
    """In this order; an absolute path is itself; an input that is a file is found by the end of its path."""
    recordings = Recordings(str(place / "table/t.csv"), [str(place / "in"), str(place / "in/x/a.wav")])
    assert recordings.find("x/a.wav") == str(place / "in/x/a.wav")
    assert recordings.find("a.wav") == str(place / "in/x/a.wav")
    assert recordings.find("b.wav") == str(place / "in/b.wav")
    assert recordings.find("c.wav") == str(place / "table/c.wav")
    assert recordings.find("d.wav") == "d.wav"
    assert recordings.find(str(place / "in/b.wav")) == str(place / "in/b.wav")
    with pytest.raises(
        AudioError, match=r"h.wav is not there; it was looked for in .*in, .*table, the working directory"
    ):
        recordings.find("h.wav")
    with pytest.raises(AudioError, match="is a URL, and nothing that a table names is fetched"):
        recordings.find("https://example.org/a.wav")


def test_names_are_found_by_the_stem(place):
    """With dots in them, and by their folder where two are alike; else they are ambiguous."""
    listed = sorted(map(str, (place / "in").rglob("*.*")))
    recordings = Recordings(str(place / "table/t.rttm"), [str(place / "in")], listed)
    assert recordings.find("b") == str(place / "in/b.wav")
    assert recordings.find("e.f") == str(place / "in/e.f.wav")
    assert recordings.find("g") == str(place / "in/g.flac")
    assert recordings.find("y/a") == str(place / "in/y/a.wav")
    assert recordings.find("c") == str(place / "table/c.wav")
    assert recordings.find("d") == "d.wav"
    with pytest.raises(AudioError, match=r"'a' may be .*x/a.wav, .*y/a.wav"):
        recordings.find("a")
    with pytest.raises(AudioError, match="no recording has the name 'h'"):
        recordings.find("h")


def test_two_inputs_with_one_file_are_ambiguous(place):
    """Neither is taken."""
    recordings = Recordings(str(place / "table/t.csv"), [str(place / "in/x"), str(place / "in/y")])
    with pytest.raises(AudioError, match=r"'a\.wav' may be"):
        recordings.find("a.wav")
