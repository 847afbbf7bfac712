"""Kinds of files: what they are called, how name and first bytes tell them, and what helps where one is no use.

The one table of them serves the search of folders, the decoder and the words for what cannot be decoded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from w2v_runtime.audio import mpeg

#: First bytes of a file that tell its kind; frames of MPEG take some thousand each.
HEAD_BYTES: Final = 8192

CONVERT: Final = "convert it with: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"
_UNPACK: Final = "unpack it and name the recordings in it."


@dataclass(frozen=True)
class Format:
    """One kind of file.

    ``suffixes`` and ``told`` (by the first bytes) each tell it alone. ``recording`` says whether it is one, which a
    folder is searched for; ``help``, what to do about one that cannot be decoded, is empty where it can.
    """

    name: str
    suffixes: str = ""
    told: Callable[[bytes], object] = lambda head: False
    help: str = ""
    recording: bool = True


def _bytes(pattern: bytes) -> Callable[[bytes], object]:
    return re.compile(pattern, re.DOTALL).match


def _is_mp3(head: bytes) -> bool:
    """Whether it begins with frames, or with a tag as they stand before MP3 files."""
    tagged = re.match(rb"ID3[\x02-\x04].{2}[\0-\x7f]{4}|APETAGEX", head, re.DOTALL)
    return tagged is not None or mpeg.begins(head, ends=len(head) < HEAD_BYTES)


def _is_adts(head: bytes) -> bool:
    """Whether two frames of AAC follow one another; their length stands in bits 30 to 42."""
    length = int.from_bytes(head[3:6], "big") >> 5 & 0x1FFF
    return all(re.match(rb"\xff[\xf0\xf1\xf8\xf9]", head[start : start + 2]) for start in (0, length)) and length > 6


def is_text(head: bytes) -> bool:
    text = head.decode("utf-8", "replace").rstrip("\ufffd")  # the last character may be cut
    return bool(text) and all(char.isprintable() or char in "\t\r\n\f" for char in text)


MP3: Final = Format("MP3", ".mp3 .mp2 .mp1 .mpa .mpga", _is_mp3)
WAV: Final = Format("WAV", ".wav .wave .bwf .rf64", _bytes(rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE"))
FLAC: Final = Format("FLAC", ".flac", _bytes(rb"fLaC[\0\x80]"))
OGG: Final = Format("Ogg", ".ogg .oga .opus", _bytes(rb"OggS\0"))
SDS: Final = Format("a sample dump", ".sds", _bytes(rb"\xf0\x7e.\x01"))

#: In the order in which first bytes are compared: what is inside a container before the container.
FORMATS: Final = (
    Format("Ogg-FLAC", "", _bytes(rb"OggS.{24}\x7fFLAC"), CONVERT),
    Format("Ogg-Speex", ".spx", _bytes(rb"OggS.{24}Speex   "), CONVERT),
    Format(
        "SPHERE compressed with shorten or the like",
        "",
        _bytes(rb"NIST_1A\n.{0,1000}\nsample_coding -s\d+ [^\n]*embedded"),
        "convert it with: sph2pipe -f wav IN OUT.wav",
    ),
    # What libsndfile decodes.
    MP3,
    WAV,
    FLAC,
    OGG,
    SDS,
    Format("W64", ".w64", _bytes(rb"riff\x2e\x91\xcf\x11")),
    Format("AIFF", ".aif .aiff .aifc", _bytes(rb"FORM.{4}AIF[FC]")),
    Format("IFF", ".svx .8svx .16sv", _bytes(rb"FORM.{4}(?:8SVX|16SV)")),
    Format("AU", ".au .snd", _bytes(rb"\.snd\0\0|dns\..{2}\0\0")),
    Format("SPHERE", ".sph .nist", _bytes(rb"NIST_1A\n")),
    Format("CAF", ".caf", _bytes(rb"caff\0\x01")),
    Format("VOC", ".voc", _bytes(rb"Creative Voice File\x1a")),
    Format("PARIS", ".paf .fap", _bytes(rb"(?: paf|fap )\0{4}")),
    Format("PVF", ".pvf", _bytes(rb"PVF1\n")),
    Format("AVR", ".avr", _bytes(rb"2BIT.{8}(?:\0\0|\xff\xff)")),
    Format("IRCAM", ".sf .ircam", _bytes(rb"\x64\xa3[\0-\x07]\0|\0[\0-\x07]\xa3\x64")),
    Format("XI", ".xi", _bytes(rb"Extended Instrument: ")),
    Format("Psion WVE", ".wve", _bytes(rb"ALawSoundFile\*\*")),
    Format("HTK", ".htk"),
    Format(
        "MATLAB", "", _bytes(rb".{20}samplerate\0|MATLAB 5\.0.{100,200}samplerate")
    ),  # other data has the suffix too
    # What it does not.
    Format("MPC", ".mpc", _bytes(rb"MPCKSH|MP\+[\x07\x17]"), CONVERT),
    Format("AMR", ".amr .awb", _bytes(rb"#!AMR"), CONVERT),
    Format(
        "M4A/MP4 (AAC or ALAC)",
        ".m4a .m4b .m4r .mp4 .m4v .mov .qt .3gp .3gpp .3g2",
        _bytes(rb".{4}(?:ftyp(?!hei|hev|mif1|msf1|avi[fs]|crx )|moov|mdat|wide)"),
        CONVERT,
    ),
    Format("AAC", ".aac .adts", _is_adts, CONVERT),
    Format("AAC", "", _bytes(rb"ADIF"), CONVERT),
    Format("WMA/ASF", ".wma .wmv .asf", _bytes(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), CONVERT),
    Format("WebM/Matroska", ".webm .weba .mka .mkv", _bytes(rb"\x1a\x45\xdf\xa3"), CONVERT),
    Format("WavPack", ".wv", _bytes(rb"wvpk.{5}\x04"), CONVERT),
    Format("Monkey's Audio", ".ape", _bytes(rb"MAC .[\x0b-\x1f]"), CONVERT),
    Format("True Audio", ".tta", _bytes(rb"TTA1[\x01\x03]\0|TTA2"), CONVERT),
    Format("Shorten", ".shn", _bytes(rb"ajkg[\x01-\x03]"), CONVERT),
    Format("Flash video", ".flv", _bytes(rb"FLV\x01"), CONVERT),
    Format("AVI video", ".avi", _bytes(rb"RIFF.{4}AVI "), CONVERT),
    Format("QCP", ".qcp", _bytes(rb"RIFF.{4}QLCM"), CONVERT),
    Format("AC-3", ".ac3 .eac3 .ec3", _bytes(rb"\x0b\x77.{3}[\x30-\x57\x80-\x87]"), CONVERT),
    Format("DTS", "", _bytes(rb"\x7f\xfe\x80\x01"), CONVERT),
    Format("RealAudio", ".ra .rm", _bytes(rb"\.RMF\0|\.ra\xfd"), CONVERT),
    Format("DSD", ".dsf .dff", _bytes(rb"DSD \x1c\0|FRM8.{8}DSD "), CONVERT),
    Format("MPEG video", ".mpg .mpeg .vob", _bytes(rb"\0\0\x01\xba"), CONVERT),
    Format("MPEG transport stream", ".mts .m2ts", _bytes(rb"G.{187}G.{187}G|.{4}G.{191}G.{191}G"), CONVERT),
    Format("Sound Designer II", ".sd2", help=CONVERT),
    # What is no recording.
    Format("a ZIP archive", ".zip", _bytes(rb"PK[\x03\x05]"), _UNPACK, recording=False),
    Format("a gzip archive", ".gz .tgz", _bytes(rb"\x1f\x8b"), _UNPACK, recording=False),
    Format("a bzip2 archive", ".bz2", _bytes(rb"BZh[1-9]1AY"), _UNPACK, recording=False),
    Format("an xz archive", ".xz", _bytes(rb"\xfd7zXZ"), _UNPACK, recording=False),
    Format("a Zstandard archive", ".zst", _bytes(rb"\x28\xb5\x2f\xfd"), _UNPACK, recording=False),
    Format("a 7z archive", ".7z", _bytes(rb"7z\xbc\xaf"), _UNPACK, recording=False),
    Format("a RAR archive", ".rar", _bytes(rb"Rar!\x1a"), _UNPACK, recording=False),
    Format("a tar archive", ".tar", _bytes(rb".{257}ustar"), _UNPACK, recording=False),
    Format(
        "an HTML page",
        ".html .htm",
        re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)", re.IGNORECASE).match,
        "it may stand for a recording that could not be downloaded; fetch that again.",
        recording=False,
    ),
    Format(
        "text",
        "",
        is_text,
        "leave it out, or give it with --files-from if it lists recordings (in Python, its lines to embed_files).",
        recording=False,
    ),
)

_RECORDINGS: Final = tuple(format_.told for format_ in FORMATS if format_.recording)
_BY_SUFFIX: Final = {suffix: format_ for format_ in FORMATS for suffix in format_.suffixes.split()}


def by_name(name: str) -> Format | None:
    """What the suffix of a file's name says it is; None where that says nothing."""
    return _BY_SUFFIX.get(os.path.splitext(name)[1].lower())


def by_head(head: bytes) -> Format | None:
    """What the first bytes of a file say it is, up to ``HEAD_BYTES``; None where they say nothing."""
    return next((format_ for format_ in FORMATS if format_.told(head)), None)


def is_recording(head: bytes) -> bool:
    """Whether a file with these first bytes, up to ``HEAD_BYTES``, is a recording, also one that cannot be decoded."""
    return any(told(head) for told in _RECORDINGS)
