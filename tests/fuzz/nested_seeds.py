"""Recordings behind, before and within other things: tags, pictures, other streams, and what looks like a header.

``nested`` is the one table of them. The tests read each and compare it with the recordings that it holds; the fuzzer
takes short ones as seeds.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import soundfile

#: Where streams begin in each of the formats that can be joined, as it stands in a picture, an attachment or PCM.
HEADS: Final = (
    b'fLaC\x00\x00\x00"',
    b"OggS\x00\x02" + bytes(8),
    b"ID3\x04\x00\x00\x00\x00\x00\x0a",
    b"RIFF\x24\x00\x00\x00WAVEfmt ",
    b"FORM\x00\x00\x00\x24AIFFCOMM",
    b"\xff\xfb\x90\x64" + bytes(60),
)
_JPEG: Final = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00\xff\xe2\x02\x40ICC_PROFILE\x00"
_OGG_POLYNOMIAL: Final = 0x04C11DB7


@dataclass(frozen=True)
class Nested:
    """A file, and the plain files whose samples, one behind the other, are its samples."""

    content: bytes
    plain: tuple[bytes, ...]


def nested(frames: int, rate: int = 16_000, channels: int = 1) -> dict[str, Nested]:
    """Files by name, with recordings of about ``frames`` frames of noise each.

    At 16 kHz and 0.5 s all streams stay below 64 KiB; at 48 kHz, in two channels and 3 s, all are above.
    """

    def recording(kind: str, seed: int = 0, subtype: str | None = None) -> bytes:
        noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (frames + 480 * seed, channels))
        file = io.BytesIO()
        options = {"compression_level": 0.0} if kind in ("MP3", "OGG") else {}
        if kind == "MP3":
            options["bitrate_mode"] = "CONSTANT"
        soundfile.write(file, noise, rate, subtype, format=kind, **options)
        return file.getvalue()

    flac, mp3, wav, aiff = map(recording, ("FLAC", "MP3", "WAV", "AIFF"))
    vorbis, opus = recording("OGG", subtype="VORBIS"), recording("OGG", subtype="OPUS")
    all_of_them = {"flac": flac, "mp3": mp3, "vorbis": vorbis, "opus": opus, "wav": wav, "aiff": aiff}
    others = {
        "flac": recording("FLAC", 1),
        "mp3": recording("MP3", 1),
        "vorbis": recording("OGG", 1, "VORBIS"),
        "opus": recording("OGG", 1, "OPUS"),
    }
    picture = _JPEG + b"".join(HEADS) + bytes(range(256)) * 3 + b"\xff\xd9"
    found: dict[str, Nested] = {}
    for name, plain in all_of_them.items():
        for tag, front in _fronts(picture, flac, mp3, vorbis).items():
            found[f"{name} behind {tag}"] = Nested(front + plain, (plain,))
    for name, plain in {"mp3": mp3, "flac": flac, "vorbis": vorbis, "opus": opus}.items():
        for tag, back in _backs(picture, mp3 if name == "mp3" else flac).items():
            found[f"{name} before {tag}"] = Nested(plain + back, (plain,))
            found[f"{name} between tags and {tag}"] = Nested(id3v2(picture) + plain + back, (plain,))
    for name, other in others.items():
        plain = all_of_them[name]
        found |= _joined(name, plain, other, picture)
    found |= _flac_blocks(flac, picture, others["flac"])
    found |= _ogg_side_by_side({"vorbis": vorbis, "opus": opus}, others)
    found |= _riff(wav, aiff, flac, mp3, picture)
    for name in ("AIFF", "AU", "CAF", "NIST", "RF64", "W64", *(("SVX",) if channels == 1 else ())):
        plain = recording(name)
        found[f"{name} before itself"] = Nested(plain * 2, (plain,))
        found[f"{name} before a WAV"] = Nested(plain + wav, (plain,))
        found[f"{name} before ID3v1"] = Nested(plain + id3v1(), (plain,))
    return found | _pcm_that_spells(wav, flac, mp3, rate, channels)


def _fronts(picture: bytes, flac: bytes, mp3: bytes, vorbis: bytes) -> dict[str, bytes]:
    return {
        "a tag": id3v2(),
        "two tags": id3v2(version=3) + id3v2(),
        "a tag with a footer": id3v2(footer=True),
        "a tag with a picture": id3v2(picture),
        "a tag with a FLAC": id3v2(flac),
        "a tag with an MP3": id3v2(mp3),
        "a tag with an Ogg": id3v2(vorbis, footer=True),
        "a tag of 100 KB": id3v2(padding=100_000),
    }


def _backs(picture: bytes, attached: bytes) -> dict[str, bytes]:
    return {
        "ID3v1": id3v1(),
        "APE": ape(b"note"),
        "APE with a picture and ID3v1": ape(picture) + id3v1(),
        "APE with an attachment": ape(attached),
        "Lyrics3 and ID3v1": lyrics3(b"la la") + id3v1(),
        "Lyrics3 and APE with an attachment and ID3v1": lyrics3(b"la la") + ape(attached) + id3v1(),
        "an ID3v2 with an attachment and a footer": id3v2(attached, footer=True),
    }


def _joined(name: str, one: bytes, other: bytes, picture: bytes) -> dict[str, Nested]:
    """True chains, bare and each with tags of its own, in which heads of streams stand too."""
    tagged = id3v2(picture) + one + id3v1() + id3v2(other, footer=True) + other + ape(picture) + id3v1()
    return {
        f"{name} joined": Nested(one + other, (one, other)),
        f"{name} joined, three": Nested(one + other + one, (one, other, one)),
        f"{name} joined, tagged": Nested(tagged, (one, other)),
    }


def _flac_blocks(flac: bytes, picture: bytes, other: bytes) -> dict[str, Nested]:
    """Metadata blocks that hold a picture, or a FLAC."""
    info, rest = flac[4:42], flac[42:]
    cover = struct.pack(">II", 3, 10) + b"image/jpeg" + struct.pack(">IIIIII", 0, 1, 1, 24, 0, len(picture)) + picture
    blocks = {"a picture": (6, cover), "a FLAC": (2, b"riff" + other), "padding": (1, bytes(100_000))}
    return {
        f"flac with a block of {name}": Nested(
            b"fLaC" + bytes([info[0] & 0x7F]) + info[1:] + _flac_block(kind, content) + _last_blocks(flac, rest),
            (flac,),
        )
        for name, (kind, content) in blocks.items()
    }


def _flac_block(kind: int, content: bytes) -> bytes:
    return bytes([kind]) + len(content).to_bytes(3, "big") + content


def _last_blocks(flac: bytes, rest: bytes) -> bytes:
    """What follows STREAMINFO; where that was the last block, an empty padding is, so that another fits between."""
    return rest if not flac[4] & 0x80 else _flac_block(0x81, b"") + rest


def _ogg_side_by_side(streams: dict[str, bytes], others: dict[str, bytes]) -> dict[str, Nested]:
    """An Ogg with a skeleton, or with another logical stream, whose pages stand between those of the audio."""
    found = {}
    for name, ogg in streams.items():
        pages = ogg_pages(ogg)
        skeleton = [ogg_page(b"fishead\0" + bytes(56), 7, 0, 2), ogg_page(b"", 7, 1, 4)]
        head = sum(1 for page in pages if not struct.unpack("<q", page[6:14])[0])
        found[f"{name} with a skeleton"] = Nested(
            b"".join([skeleton[0], *pages[:head], skeleton[1], *pages[head:]]), (ogg,)
        )
        notes = [ogg_page(b"note\0", 9, 0, 2), *(ogg_page(b"".join(HEADS), 9, n + 1, 0) for n in range(len(pages)))]
        notes.append(ogg_page(b"end", 9, len(notes), 4))
        mixed = [page for pair in zip(pages[1:], notes[1:], strict=False) for page in pair]
        found[f"{name} with another stream"] = Nested(
            b"".join([pages[0], notes[0], *mixed, *notes[len(pages) :]]), (ogg,)
        )
        found[f"{name} joined with one serial number"] = Nested(
            ogg + with_serial(others[name], struct.unpack("<I", ogg[14:18])[0]), (ogg, others[name])
        )
    return found


def _riff(wav: bytes, aiff: bytes, flac: bytes, mp3: bytes, picture: bytes) -> dict[str, Nested]:
    """Chunks around the samples of a WAV and an AIFF, and files behind a WAV."""
    found = {}
    for name, content in (("a tag", id3v2(picture)), ("a FLAC", flac), ("an MP3", mp3)):
        chunk = b"id3 " + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        found[f"wav with {name} behind its samples"] = Nested(_resized(wav + chunk), (wav,))
        found[f"wav with {name} before its samples"] = Nested(_resized(wav[:36] + chunk + wav[36:]), (wav,))
        found[f"wav with {name} that the header does not count"] = Nested(wav + chunk, (wav,))
        chunk = b"ID3 " + struct.pack(">I", len(content)) + content + bytes(len(content) % 2)
        found[f"aiff with {name} behind its samples"] = Nested(_resized(aiff + chunk, ">"), (aiff,))
    info = b"LIST" + struct.pack("<I", 4 + 8 + len(picture)) + b"INFOICMT" + struct.pack("<I", len(picture)) + picture
    found["wav with LIST behind its samples"] = Nested(_resized(wav + info + bytes(len(info) % 2)), (wav,))
    for name, behind in (("WAV", wav), ("FLAC", flac), ("MP3", mp3), ("AIFF", aiff)):
        found[f"wav before a {name}"] = Nested(wav + behind, (wav,))
    return found


def _resized(content: bytes, order: str = "<") -> bytes:
    return content[:4] + struct.pack(f"{order}I", len(content) - 8) + content[8:]


def _pcm_that_spells(wav: bytes, flac: bytes, mp3: bytes, rate: int, channels: int) -> dict[str, Nested]:
    """WAV and AU whose first samples are the bytes of another header, or of a whole file."""
    found = {}
    for number, spelled in enumerate((*HEADS, flac, mp3, wav)):
        samples = spelled + bytes(-len(spelled) % (2 * channels)) + wav[44:]
        layout = struct.pack("<HHIIHH", 1, channels, rate, 2 * channels * rate, 2 * channels, 16)
        head = b"RIFF" + struct.pack("<I", 36 + len(samples)) + b"WAVEfmt " + struct.pack("<I", 16) + layout
        content = head + b"data" + struct.pack("<I", len(samples)) + samples
        if not spelled.startswith(b"OggS"):  # which libsndfile refuses, as it does "wvpk"
            found[f"wav that spells {number}"] = Nested(content, (content,))
        content = b".snd" + struct.pack(">IIIII", 24, len(samples), 3, rate, channels) + samples
        found[f"au that spells {number}"] = Nested(content, (content,))
    return found


def id3v2(attached: bytes = b"", footer: bool = False, padding: int = 0, version: int = 4) -> bytes:
    """An ID3v2 tag with a title, and an attachment (GEOB) where there is one; a footer takes the place of padding."""
    frames = _id3_frame(b"TIT2", b"\0A title", version)
    if attached:
        frames += _id3_frame(b"GEOB", b"\0application/x\0name\0about\0" + attached, version)
    frames += bytes(padding)
    size = _syncsafe(len(frames))
    head = b"ID3" + bytes([version, 0, 0x10 if footer else 0]) + size
    return head + frames + (b"3DI" + head[3:] if footer else b"")


def _id3_frame(name: bytes, content: bytes, version: int) -> bytes:
    size = _syncsafe(len(content)) if version == 4 else struct.pack(">I", len(content))
    return name + size + b"\0\0" + content


def _syncsafe(number: int) -> bytes:
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def id3v1() -> bytes:
    """An ID3v1 tag."""
    return b"TAG" + b"A title".ljust(124, b"\0") + b"\x0c"


def ape(value: bytes) -> bytes:
    """An APEv2 tag of one binary item, with header and footer."""
    item = struct.pack("<II", len(value), 2) + b"Cover Art (Front)\0" + value
    fields = (2000, len(item) + 32, 1)
    header = b"APETAGEX" + struct.pack("<IIII", *fields, 0xA000_0000) + bytes(8)
    return header + item + b"APETAGEX" + struct.pack("<IIII", *fields, 0x8000_0000) + bytes(8)


def lyrics3(text: bytes) -> bytes:
    """A Lyrics3v2 tag."""
    content = b"LYRICSBEGIN" + b"LYR%05d" % len(text) + text
    return content + b"%06dLYRICS200" % len(content)


def ogg_pages(content: bytes) -> list[bytes]:
    """The pages of an Ogg file."""
    pages, start = [], 0
    while start < len(content):
        segments = content[start + 27 : start + 27 + content[start + 26]]
        stop = start + 27 + len(segments) + sum(segments)
        pages.append(content[start:stop])
        start = stop
    return pages


def ogg_page(packet: bytes, serial: int, number: int, flags: int) -> bytes:
    """A page of one packet; ``flags`` 2 begins, 4 ends a stream."""
    lacing = bytes([255]) * (len(packet) // 255) + bytes([len(packet) % 255])
    head = b"OggS\0" + struct.pack("<BqIII", flags, 0, serial, number, 0) + bytes([len(lacing)]) + lacing
    return _with_checksum(head + packet)


def with_serial(content: bytes, serial: int) -> bytes:
    """An Ogg file with another serial number."""
    return b"".join(_with_checksum(page[:14] + struct.pack("<I", serial) + page[18:]) for page in ogg_pages(content))


def _with_checksum(page: bytes) -> bytes:
    page = page[:22] + bytes(4) + page[26:]
    return page[:22] + struct.pack("<I", _ogg_checksum(page)) + page[26:]


def _ogg_checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value = (value << 8 & 0xFFFF_FFFF) ^ _OGG_TABLE[value >> 24 ^ byte]
    return value


def _ogg_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1 ^ (_OGG_POLYNOMIAL if value >> 31 else 0)) & 0xFFFF_FFFF
        table.append(value)
    return table


_OGG_TABLE: Final = _ogg_table()
