"""The table of file formats: audio containers and others, recognised by file name suffix or by magic bytes.

The search of folders, the decoder and the error messages all use the one table :data:`FORMATS`.

To add an audio container that libsndfile decodes, add its :class:`Format` to the table. If libsndfile decodes a
truncated file of it without an error, read its declared data size in ``headers.data_chunk``; if one file can hold
several streams, find them in ``streams``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from w2v_runtime.audio import mpeg

#: Bytes at the start of a file from which its format is recognised; an MPEG audio frame takes up to a few thousand.
HEAD_BYTES: Final = 8192

CONVERT: Final = "convert it with: ffmpeg -i IN -ar 16000 -ac 1 OUT.wav"
_UNPACK: Final = "unpack it and name the recordings in it."


@dataclass(frozen=True)
class Format:
    """One file format.

    A file is of this format if its name has one of ``suffixes``, or if ``told`` is true of its first bytes.
    ``recording`` says whether the format holds audio, so that the search of a folder lists the file. ``help`` says what
    to do about a file that cannot be decoded, and is empty for formats that libsndfile decodes.
    """

    name: str
    suffixes: str = ""
    told: Callable[[bytes], object] = lambda head: False
    help: str = ""
    recording: bool = True


def _magic(pattern: bytes) -> Callable[[bytes], object]:
    return re.compile(pattern, re.DOTALL).match


def _is_mp3(head: bytes) -> bool:
    """Whether the file begins with MPEG audio frames, or with an ID3v2 or APEv2 tag, as MP3 files do."""
    tagged = re.match(rb"ID3[\x02-\x04].{2}[\0-\x7f]{4}|APETAGEX", head, re.DOTALL)
    return tagged is not None or mpeg.begins(head, ends=len(head) < HEAD_BYTES)


def _is_adts(head: bytes) -> bool:
    """Whether the file begins with two ADTS frames of AAC; bits 30 to 42 of a header hold the frame's length."""
    length = int.from_bytes(head[3:6], "big") >> 5 & 0x1FFF
    return all(re.match(rb"\xff[\xf0\xf1\xf8\xf9]", head[start : start + 2]) for start in (0, length)) and length > 6


def is_text(head: bytes) -> bool:
    """Whether the first bytes of a file are printable UTF-8 text."""
    text = head.decode("utf-8", "replace").rstrip("\ufffd")  # the last character may be cut
    return bool(text) and all(char.isprintable() or char in "\t\r\n\f" for char in text)


MP3: Final = Format("MP3", ".mp3 .mp2 .mp1 .mpa .mpga", _is_mp3)
WAV: Final = Format("WAV", ".wav .wave .bwf .rf64", _magic(rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE"))
FLAC: Final = Format("FLAC", ".flac", _magic(rb"fLaC[\0\x80]"))
OGG: Final = Format("Ogg", ".ogg .oga .opus", _magic(rb"OggS\0"))
SDS: Final = Format("a sample dump", ".sds", _magic(rb"\xf0\x7e.\x01"))

#: In the order in which magic bytes are compared: a codec inside a container comes before the container.
FORMATS: Final = (
    Format("Ogg-FLAC", "", _magic(rb"OggS.{24}\x7fFLAC"), CONVERT),
    Format("Ogg-Speex", ".spx", _magic(rb"OggS.{24}Speex   "), CONVERT),
    Format(
        "SPHERE compressed with shorten or the like",
        "",
        _magic(rb"NIST_1A\n.{0,1000}\nsample_coding -s\d+ [^\n]*embedded"),
        "convert it with: sph2pipe -f wav IN OUT.wav",
    ),
    # Audio formats that libsndfile decodes.
    MP3,
    WAV,
    FLAC,
    OGG,
    SDS,
    Format("W64", ".w64", _magic(rb"riff\x2e\x91\xcf\x11")),
    Format("AIFF", ".aif .aiff .aifc", _magic(rb"FORM.{4}AIF[FC]")),
    Format("IFF", ".svx .8svx .16sv", _magic(rb"FORM.{4}(?:8SVX|16SV)")),
    Format("AU", ".au .snd", _magic(rb"\.snd\0\0|dns\..{2}\0\0")),
    Format("SPHERE", ".sph .nist", _magic(rb"NIST_1A\n")),
    Format("CAF", ".caf", _magic(rb"caff\0\x01")),
    Format("VOC", ".voc", _magic(rb"Creative Voice File\x1a")),
    Format("PARIS", ".paf .fap", _magic(rb"(?: paf|fap )\0{4}")),
    Format("PVF", ".pvf", _magic(rb"PVF1\n")),
    Format("AVR", ".avr", _magic(rb"2BIT.{8}(?:\0\0|\xff\xff)")),
    Format("IRCAM", ".sf .ircam", _magic(rb"\x64\xa3[\0-\x07]\0|\0[\0-\x07]\xa3\x64")),
    Format("XI", ".xi", _magic(rb"Extended Instrument: ")),
    Format("Psion WVE", ".wve", _magic(rb"ALawSoundFile\*\*")),
    Format("HTK", ".htk"),
    Format(
        "MATLAB", "", _magic(rb".{20}samplerate\0|MATLAB 5\.0.{100,200}samplerate")
    ),  # other data has the suffix too
    # Audio formats that libsndfile does not decode.
    Format("MPC", ".mpc", _magic(rb"MPCKSH|MP\+[\x07\x17]"), CONVERT),
    Format("AMR", ".amr .awb", _magic(rb"#!AMR"), CONVERT),
    Format(
        "M4A/MP4 (AAC or ALAC)",
        ".m4a .m4b .m4r .mp4 .m4v .mov .qt .3gp .3gpp .3g2",
        _magic(rb".{4}(?:ftyp(?!hei|hev|mif1|msf1|avi[fs]|crx )|moov|mdat|wide)"),
        CONVERT,
    ),
    Format("AAC", ".aac .adts", _is_adts, CONVERT),
    Format("AAC", "", _magic(rb"ADIF"), CONVERT),
    Format("WMA/ASF", ".wma .wmv .asf", _magic(rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"), CONVERT),
    Format("WebM/Matroska", ".webm .weba .mka .mkv", _magic(rb"\x1a\x45\xdf\xa3"), CONVERT),
    Format("WavPack", ".wv", _magic(rb"wvpk.{5}\x04"), CONVERT),
    Format("Monkey's Audio", ".ape", _magic(rb"MAC .[\x0b-\x1f]"), CONVERT),
    Format("True Audio", ".tta", _magic(rb"TTA1[\x01\x03]\0|TTA2"), CONVERT),
    Format("Shorten", ".shn", _magic(rb"ajkg[\x01-\x03]"), CONVERT),
    Format("Flash video", ".flv", _magic(rb"FLV\x01"), CONVERT),
    Format("AVI video", ".avi", _magic(rb"RIFF.{4}AVI "), CONVERT),
    Format("QCP", ".qcp", _magic(rb"RIFF.{4}QLCM"), CONVERT),
    Format("AC-3", ".ac3 .eac3 .ec3", _magic(rb"\x0b\x77.{3}[\x30-\x57\x80-\x87]"), CONVERT),
    Format("DTS", "", _magic(rb"\x7f\xfe\x80\x01"), CONVERT),
    Format("RealAudio", ".ra .rm", _magic(rb"\.RMF\0|\.ra\xfd"), CONVERT),
    Format("DSD", ".dsf .dff", _magic(rb"DSD \x1c\0|FRM8.{8}DSD "), CONVERT),
    Format("MPEG video", ".mpg .mpeg .vob", _magic(rb"\0\0\x01\xba"), CONVERT),
    Format("MPEG transport stream", ".mts .m2ts", _magic(rb"G.{187}G.{187}G|.{4}G.{191}G.{191}G"), CONVERT),
    Format("Sound Designer II", ".sd2", help=CONVERT),
    # Formats that are not audio.
    Format("a ZIP archive", ".zip", _magic(rb"PK[\x03\x05]"), _UNPACK, recording=False),
    Format("a gzip archive", ".gz .tgz", _magic(rb"\x1f\x8b"), _UNPACK, recording=False),
    Format("a bzip2 archive", ".bz2", _magic(rb"BZh[1-9]1AY"), _UNPACK, recording=False),
    Format("an xz archive", ".xz", _magic(rb"\xfd7zXZ"), _UNPACK, recording=False),
    Format("a Zstandard archive", ".zst", _magic(rb"\x28\xb5\x2f\xfd"), _UNPACK, recording=False),
    Format("a 7z archive", ".7z", _magic(rb"7z\xbc\xaf"), _UNPACK, recording=False),
    Format("a RAR archive", ".rar", _magic(rb"Rar!\x1a"), _UNPACK, recording=False),
    Format("a tar archive", ".tar", _magic(rb".{257}ustar"), _UNPACK, recording=False),
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
    """The format by the suffix of a file's name, or None if the suffix is unknown."""
    return _BY_SUFFIX.get(os.path.splitext(name)[1].lower())


def by_head(head: bytes) -> Format | None:
    """The format by the first bytes of a file (up to ``HEAD_BYTES``), or None if no format matches."""
    return next((format_ for format_ in FORMATS if format_.told(head)), None)


def is_recording(head: bytes) -> bool:
    """Whether the first bytes of a file (up to ``HEAD_BYTES``) are of an audio format, decodable or not."""
    return any(told(head) for told in _RECORDINGS)
