"""Blinding: image and video files without the texts in them (captions, settings, names of models); pixels stay bit for bit.

Of PNG, JPEG, WebP and GIF only what a picture needs is kept; what is not known goes. Films are not moved: texts are blanked.
"""

import io
import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (  # the critical ones, colour, transparency, pixel size, animation
    *(b"IHDR", b"PLTE", b"IDAT", b"IEND"),
    *(b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP", b"mDCV", b"cLLI", b"bKGD", b"pHYs"),
    *(b"acTL", b"fcTL", b"fdAT"),
)
WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP")
WEBP_EXIF, WEBP_XMP = 0x08, 0x04  # flags of VP8X
GIF_KEPT = (b"NETSCAPE2.0", b"ANIMEXTS1.0")  # how often it plays
JPEG_TEXTS = (*range(0xE0, 0xF0), 0xFE)  # application segments, comments
JPEG_KEPT = {0xE0: b"JFIF\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}
SCAN, END, EXIF = 0xDA, 0xD9, 0xE1
BARE = (*range(0xD0, 0xD8), 0x01)  # markers of JPEG without a length: restarts
ORIENTATION = 0x0112


def blinded(data: bytes) -> bytes:
    """Return a PNG, JPEG, WebP, GIF, MP4 or WebM file without its texts; an EXIF orientation is kept. Others are left alone."""
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] == b"GIF8":
        return _gif(data)
    if data[4:8] == b"ftyp":
        film = bytearray(data)
        _blank_mp4(film, 0, len(film))
        return bytes(film)
    if data[:4] == b"\x1a\x45\xdf\xa3":
        film = bytearray(data)
        _blank_webm(film, 0, len(film))
        return bytes(film)
    return data


def _png(data: bytes) -> bytes:
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if kind == b"eXIf" and (turned := _orientation(data[at + 8 : at + 8 + length])):
            body = kind + _exif(turned)
            kept.append(struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)))
        elif kind in PNG_KEPT:
            kept.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    return b"".join(kept)


def _orientation(exif: bytes) -> int | None:
    """Return the orientation in an EXIF block (without its `Exif` head), None where it is upright or not told."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 10:
        return None
    start: int = struct.unpack(f"{order}I", exif[4:8])[0]
    count = struct.unpack(f"{order}H", exif[start : start + 2])[0] if start + 2 <= len(exif) else 0
    for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        name, value = struct.unpack(f"{order}H6xH", exif[at : at + 10])
        if name == ORIENTATION and value in range(2, 9):
            return int(value)
    return None


def _exif(orientation: int) -> bytes:
    """Return an EXIF block that tells nothing but the orientation."""
    return b"MM\x00*" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes) -> bytes:
    kept, at, turned = list[bytes](), 2, None
    while at + 2 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == END:
            kept.append(data[at : at + 2])
            break
        if marker == 0xFF or marker in BARE:
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at:end]
        if marker == EXIF and segment[4:10] == b"Exif\0\0":
            turned = turned or _orientation(segment[10:])
        if marker == SCAN:
            end = _end_of_scan(data, end)
            segment = data[at:end]
        if _is_needed(marker, segment):
            kept.append(segment)
        at = end
    body = b"Exif\0\0" + _exif(turned) if turned else b""
    head = bytes([0xFF, EXIF]) + struct.pack(">H", len(body) + 2) + body if turned else b""
    return b"".join([data[:2], head, *kept])


def _is_needed(marker: int, segment: bytes) -> bool:
    """Of the application segments JFIF, the colour profile and Adobe's colour transform decide what the picture looks like."""
    if marker in JPEG_TEXTS:
        return marker in JPEG_KEPT and segment[4:].startswith(JPEG_KEPT[marker])
    return True


def _end_of_scan(data: bytes, at: int) -> int:
    """Return where the packed pixels after a head of a scan end: at the next marker that is no restart."""
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        if data[at + 1] != 0 and data[at + 1] not in BARE:
            return at
        at += 2
    return len(data)


def _webp(data: bytes) -> bytes:
    kept, at, turned = list[bytes](), 12, None
    last = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    while at + 8 <= last:
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        end = at + 8 + length + length % 2
        chunk = data[at:end]
        if kind == b"EXIF":
            turned = _orientation(chunk[8:])
        if kind in WEBP_KEPT:
            kept.append(chunk)
        at = end
    if kept and kept[0][:4] == b"VP8X":
        told = kept[0][8] & ~(WEBP_EXIF | WEBP_XMP) | (WEBP_EXIF if turned else 0)
        kept[0] = kept[0][:8] + bytes([told]) + kept[0][9:]
    if turned:
        kept.append(b"EXIF" + struct.pack("<I", len(_exif(turned))) + _exif(turned))
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(data: bytes) -> bytes:
    """Leave out comments, texts and application blocks but the one that loops."""
    at = 13 + _gif_colours(data[10])
    kept = [data[:at]]
    while at < len(data) and data[at] in (0x21, 0x2C):
        start = at
        if data[at] == 0x2C:
            at = _after_blocks(data, at + 11 + _gif_colours(data[at + 9]))
            kept.append(data[start:at])
            continue
        at = _after_blocks(data, at + 2)
        if data[start + 1] == 0xF9 or (data[start + 1] == 0xFF and data[start + 3 : start + 14] in GIF_KEPT):
            kept.append(data[start:at])
    return b"".join([*kept, b"\x3b"])


def _gif_colours(flags: int) -> int:
    """Return the bytes of the colour table that flags tell of."""
    return 3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0


def _after_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def _blank_mp4(film: bytearray, at: int, end: int) -> None:
    """Blank the user data of a film and of its tracks."""
    while at + 8 <= end:
        size, kind = struct.unpack(">I4s", film[at : at + 8])
        head = 16 if size == 1 else 8
        size = struct.unpack(">Q", film[at + 8 : at + 16])[0] if size == 1 and at + 16 <= end else size or end - at
        if size < head or at + size > end:
            return
        if kind in (b"udta", b"meta", b"uuid"):
            film[at + 4 : at + 8] = b"free"
            film[at + head : at + size] = bytes(size - head)
        elif kind in (b"moov", b"trak"):
            _blank_mp4(film, at + head, at + size)
        at += size


WEBM_OPENED = (0x18538067, 0x1549A966, 0x1654AE6B, 0xAE)  # segment, information, tracks, one track
WEBM_BLANKED = (0x1254C367, 0x1941A469, 0x7BA9, 0x536E, 0x4D80, 0x5741)  # tags, attachments, titles, names, programs


def _blank_webm(film: bytearray, at: int, end: int) -> None:
    """Blank the tags, titles and names of a film: void elements of the same length take their places."""
    stream = io.BytesIO(film)
    while at < end:
        stream.seek(at)
        name, marked = _webm_number(stream, keep_mark=True), stream.tell()
        size, start = _webm_number(stream, keep_mark=False), stream.tell()
        if name is None or size is None:
            return
        unknown = size == 2 ** (7 * (start - marked)) - 1
        last = end if unknown else start + size
        if last > end:
            return
        if name in WEBM_OPENED:
            _blank_webm(film, start, last)
        elif name in WEBM_BLANKED:
            length = last - at
            wide = 8 if length >= 9 else 1
            void = b"\xec" + ((1 << (7 * wide)) | (length - 1 - wide)).to_bytes(wide, "big")
            film[at:last] = void + bytes(length - len(void))
        at = last


def _webm_number(stream: io.BytesIO, *, keep_mark: bool) -> int | None:
    """Read a number of EBML: its length is told by the zeros before its first one."""
    first = stream.read(1)
    if not first or not first[0]:
        return None
    rest = 8 - first[0].bit_length()
    value = int.from_bytes(first + stream.read(rest), "big")
    return value if keep_mark else value & ((1 << (7 * (rest + 1))) - 1)
