"""A corpus of hostile requests, the same in every run: broken files of every format, lies, bombs, odd forms."""

import io
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "BMP": "image/bmp", "TIFF": "image/tiff"}
_MAGIC = [b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 ", b"BM", b"II*\0", b"MM\0*", b"GIF89a"]
_EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]


@dataclass(frozen=True)
class Hostile:
    """One request to /segment."""

    name: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "image/png"})
    query: str = ""


def corpus(count: int) -> list[Hostile]:
    """At least `count` requests; the first of them have something of every kind."""
    chance = random.Random(7)
    found = [*_forms(), *_bombs(), *_queries(chance)]
    mutations = _mutations(chance)
    while len(found) < count:
        found.append(next(mutations))
    return found


def seeds() -> dict[str, bytes]:
    """A sound file of each format."""
    noise = np.random.default_rng(3).integers(0, 256, (37, 53, 3), dtype=np.uint8)
    return {kind: _file(Image.fromarray(noise), kind) for kind in FORMATS}


def _file(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _mutations(chance: random.Random) -> Iterator[Hostile]:
    """Files of each format with bits flipped, cut, repeated, extreme numbers in their headers; raw or in a form."""
    sound = seeds()
    number = 0
    while True:
        kind = FORMATS[number % len(FORMATS)]
        data = bytearray(sound[kind])
        how = chance.choice(["bits", "head", "cut", "insert", "numbers", "splice", "magic", "swap"])
        if how == "bits":
            for _ in range(chance.randrange(1, 30)):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif how == "head":
            for _ in range(chance.randrange(1, 10)):
                data[chance.randrange(min(100, len(data)))] = chance.randrange(256)
        elif how == "cut":
            del data[chance.randrange(len(data)) :]
        elif how == "insert":
            at = chance.randrange(len(data))
            data[at:at] = chance.randbytes(chance.choice([1, 3, 100, 5000]))
        elif how == "numbers":
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(2, min(200, len(data) - 4))
                struct.pack_into(chance.choice(["<I", ">I"]), data, at, chance.choice(_EXTREMES))
        elif how == "splice":
            other = sound[chance.choice(FORMATS)]
            data = data[: chance.randrange(len(data))] + other[chance.randrange(len(other)) :]
        elif how == "magic":
            data = bytearray(chance.choice(_MAGIC) + chance.randbytes(chance.randrange(200)))
        else:
            first, second = sorted(chance.randrange(len(data)) for _ in range(2))
            data = data[:first] + data[second:] + data[first:second]
        declared = _TYPES[chance.choice([kind, chance.choice(FORMATS)])]
        if chance.random() < 0.3:
            yield Hostile(f"{number} {kind} {how}, form", *_form([bytes(data)], chance))
        else:
            yield Hostile(f"{number} {kind} {how}", bytes(data), {"Content-Type": declared})
        number += 1


def _form(files: list[bytes], chance: random.Random | None = None) -> tuple[bytes, dict[str, str]]:
    names = ["a.png", "\u202egnp.a", "../../etc/passwd", "a" * 3000, "", "%00", "'; drop table--", "💥", "con"]
    name = chance.choice(names) if chance else "a.png"
    body = b""
    for data in files:
        disposition = f'form-data; name="image"; filename="{name}"'
        body += b"--b\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"
    return body + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


def _bombs() -> Iterator[Hostile]:
    """Small files that say that they are large, and some that are."""

    def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 2) -> bytes:
        def chunk(kind: bytes, content: bytes) -> bytes:
            return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

        header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    def text_bomb() -> bytes:
        content = b"key\0\0" + zlib.compress(b"\0" * 50_000_000)
        chunk = struct.pack(">I", len(content)) + b"zTXt" + content + struct.pack(">I", zlib.crc32(b"zTXt" + content))
        return sound["PNG"][:33] + chunk + sound["PNG"][33:]

    sound = seeds()
    zeros = zlib.compress(b"\0" * 3_000_000)
    for width, height in ((1, 1), (0, 0), (0, 9), (2**31 - 1, 1), (1, 2**31 - 1), (2**31 - 1,) * 2, (50_000, 50_000)):
        yield Hostile(f"PNG of {width} x {height}", png(width, height, zeros))
    yield Hostile("PNG with a text of 50 MB", text_bomb())
    yield Hostile("PNG with more data than pixels", png(10, 10, zeros))
    yield Hostile("PNG with less data than pixels", png(1000, 1000, zlib.compress(b"\0" * 10)))
    for bits, colour in ((16, 2), (1, 0), (3, 0), (8, 7), (16, 6), (8, 3)):
        yield Hostile(f"PNG of {bits} bits, colour type {colour}", png(4, 4, zlib.compress(b"\0" * 200), bits, colour))
    for kind in FORMATS:
        limit = 16_000 if kind == "WEBP" else 20_000
        wide = Image.new("RGB", (limit, 150))
        yield Hostile(f"{kind} of {limit} x 150", _file(wide, kind), {"Content-Type": _TYPES[kind]})
    for kind in ("GIF", "PPM", "ICO", "TGA", "PCX", "JPEG2000", "DDS", "PDF", "EPS", "MPO"):
        try:
            yield Hostile(f"a {kind}", _file(Image.new("RGB", (16, 16)), kind))
        except (OSError, KeyError):
            continue
    frames = [Image.new("RGB", (8, 8), (n, n, n)) for n in range(0, 250, 50)]
    for kind, options in (("PNG", {}), ("WEBP", {}), ("TIFF", {})):
        data = _file(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        yield Hostile(f"{kind} of five frames", data, {"Content-Type": _TYPES[kind]})
    for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "YCbCr"):
        yield Hostile(f"TIFF of {mode}", _file(Image.new(mode, (9, 7)), "TIFF"), {"Content-Type": "image/tiff"})
    exif = Image.Exif()
    for orientation in (0, 1, 6, 8, 9, 255):
        exif[0x0112] = orientation
        data = _file(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
        yield Hostile(f"JPEG, orientation {orientation}", data, {"Content-Type": "image/jpeg"})
    yield from _endless()
    yield Hostile("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>")
    yield Hostile("an address", b"http://169.254.169.254/latest/meta-data/")
    yield Hostile("nothing", b"")
    yield Hostile("too many bytes", b"\0" * 600_000)


def _endless() -> Iterator[Hostile]:
    """Pictures of few pixels, or bytes, that keep a decoder busy."""
    jpeg = _file(Image.new("L", (1400, 1400), 128), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    yield Hostile("JPEG of 5,000 scans", jpeg[:-2] + scan * 5000 + jpeg[-2:], {"Content-Type": "image/jpeg"})
    segments = jpeg[:2] + b"\xff\xee\0\2" * 100_000 + jpeg[2:]
    yield Hostile("JPEG of 100,000 segments", segments, {"Content-Type": "image/jpeg"})

    def tiff(entries: list[tuple[int, int, int]], place: int) -> bytes:
        """A directory of (tag, count, value) that begins at `place`, and is followed by another right behind it."""
        content = b"".join(struct.pack("<HHII", tag, 4, count, value) for tag, count, value in entries)
        return struct.pack("<H", len(entries)) + content + struct.pack("<I", place + len(content) + 6)

    head, grey = b"II*\0\x18\0\0\0" + bytes(16), [(256, 1, 4), (257, 1, 4), (258, 1, 8), (262, 1, 1), (273, 1, 8)]
    size = len(tiff(grey, 0))
    pages = head + b"".join(tiff(grey, 24 + size * number) for number in range(6000))
    yield Hostile("TIFF of 6,000 pages", pages, {"Content-Type": "image/tiff"})
    packed = zlib.compress(bytes(6000 * 6000), 9)
    tiles = [(256, 1, 4), (257, 1, 4), (258, 1, 8), (259, 1, 8), (262, 1, 1), (322, 1, 6000), (323, 1, 6000)]
    tiles += [(324, 1, 8), (325, 1, len(packed))]
    data = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + tiff(tiles, 0)[:-4] + bytes(4)
    yield Hostile("TIFF with a tile of 6,000 x 6,000", data, {"Content-Type": "image/tiff"})


def _forms() -> Iterator[Hostile]:
    """Bodies of multipart that are not what they say."""
    sound = seeds()["PNG"]
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    part = b"--b\r\nContent-Disposition: form-data; name=image\r\n\r\n"
    bodies = {
        "empty": b"",
        "end alone": b"--b--\r\n",
        "10,000 parts": (part + b"\r\n") * 10_000 + b"--b--\r\n",
        "10,000 parts without an end": (part + b"\r\n") * 10_000,
        "10,000 lines of header": b"--b\r\n" + b"X-A: b\r\n" * 10_000 + b"\r\n\r\n--b--\r\n",
        "a header of 400 kB": b"--b\r\nX-A: " + b"a" * 400_000 + b"\r\n\r\n\r\n--b--\r\n",
        "empty part": part + b"\r\n--b--\r\n",
        "no name": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        "no disposition": b"--b\r\n\r\nx\r\n--b--\r\n",
        "another name": b"--b\r\nContent-Disposition: form-data; name=file\r\n\r\nx\r\n--b--\r\n",
        "name in bytes": b"--b\r\nContent-Disposition: form-data; name=\xff\xfe\x00\r\n\r\nx\r\n--b--\r\n",
        "nested": part + b"Content-Type: multipart/mixed; boundary=c\r\n\r\n--c--\r\n--b--\r\n",
        "boundaries": b"--b" * 50_000,
        "new lines": b"\r\n" * 100_000,
        "cut in a header": part[:30],
        "cut in a file": part + sound[:100],
        "good and bad": part + sound + b"\r\n" + part + b"bad\r\n--b--\r\n",
        "json": b'{"image": "http://localhost/"}',
        "zeros": b"\0" * 100_000,
    }
    for name, body in bodies.items():
        yield Hostile(f"form: {name}", body, form)
    types = ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 5000]
    types += ['multipart/form-data; boundary="\\"', "multipart/mixed; boundary=b", "application/json", "text/plain"]
    types += ["", ";", "image/*", "image/png; charset=utf-8", "IMAGE/PNG", "image/gif", "image/svg+xml", "*/*"]
    types += ["é", "a" * 9000]
    for kind in types:
        yield Hostile(f"type {kind[:40]!r}", sound, {"Content-Type": kind})
    for name, value in (
        ("Accept", "image/png"),
        ("Accept", "text/html"),
        ("Accept", "a/b;q=" + "9" * 500),
        ("Accept", "," * 5000),
        ("Accept-Encoding", "gzip, br, zstd;q=x"),
        ("Content-Encoding", "gzip"),
        ("X-Timeout-Ms", "-1"),
        ("X-Timeout-Ms", "1e9"),
        ("X-Timeout-Ms", "9" * 5000),
        ("X-Timeout-Ms", "²"),
        ("X-Request-Id", "a\tb"),
        ("X-Request-Id", "x" * 5000),
        ("Authorization", "Bearer " + "x" * 5000),
        ("Authorization", "é"),
        ("traceparent", "00-zz"),
        ("Range", "bytes=0-1"),
        ("Host", "'<script>"),
        ("Cookie", "a=b; " * 1000 + "c=d"),
    ):
        yield Hostile(f"{name}: {value[:30]!r}", sound, {"Content-Type": "image/png", name: value})


def _queries(chance: random.Random) -> Iterator[Hostile]:
    """Parameters of wrong types, twice, unknown, in odd letters."""
    sound = seeds()["PNG"]
    names = ["score_threshold", "max_detections", "mask_format", "categories", "model", "é", "__proto__", "a[]"]
    values = ["", "0", "-1", "1e400", "nan", "inf", "1" * 5000, "null", "true", "[]", "{}", "%00", "%ff"]
    values += ["%F0%9F%92%A5", "../../etc/passwd", "rle", "polygon", "red", "red,red", ",", "%E2%80%AEred"]
    values += ["0x10", "1_0", "٣"]
    for name in names:
        for value in values:
            yield Hostile(f"{name}={value[:20]}", sound, query=f"{name}={value}")
    for _ in range(40):
        pairs = "&".join(f"{chance.choice(names)}={chance.choice(values)[:30]}" for _ in range(chance.randrange(2, 6)))
        yield Hostile(f"?{pairs[:40]}", sound, query=pairs)
