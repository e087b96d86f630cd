"""Blinding: image files without the texts in them (captions, settings, cameras, names of models); pixels stay bit for bit."""

import struct

PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"caBX")
ORIENTATION = 0x0112


def blinded(data: bytes) -> bytes:
    """Return a PNG, JPEG, WebP, GIF or MP4 file without its texts; EXIF orientation is kept. Other data stay as they are."""
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] == b"GIF8":
        return _gif(data)
    return _mp4(data) if data[4:8] == b"ftyp" else data


def _png(data: bytes) -> bytes:
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        end = at + 12 + length
        if kind == b"eXIf":
            turned = _orientation(data[at + 8 : at + 8 + length])
            kept.append(_png_chunk(b"eXIf", _exif(turned)) if turned else b"")
        elif kind not in PNG_TEXTS:
            kept.append(data[at:end])
        at = end
        if kind == b"IEND":
            break
    return b"".join(kept)


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    import zlib

    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _orientation(exif: bytes) -> int | None:
    """Return the orientation in an EXIF block (without its `Exif` head), None where it is upright or not told."""
    from PIL import Image

    found = Image.Exif()
    try:
        found.load(exif)
        value = found.get(ORIENTATION)
    except (SyntaxError, ValueError, OSError, struct.error):
        return None
    return value if value in range(2, 9) else None


def _exif(orientation: int) -> bytes:
    """Return an EXIF block that tells nothing but the orientation."""
    return b"MM\x00*" + struct.pack(">IHHHIHHI", 8, 1, ORIENTATION, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes) -> bytes:
    kept, at = [data[:2]], 2
    turned: int | None = None
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = struct.unpack(">H", data[at + 2 : at + 4])[0]
        segment = data[at : at + 2 + length]
        if marker == 0xDA:
            break
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            turned = turned or _orientation(segment[10:])
        elif marker not in (0xE1, 0xED, 0xEB, 0xFE):  # EXIF and XMP, IPTC, C2PA, comments
            kept.append(segment)
        at += 2 + length
    if turned:
        body = b"Exif\0\0" + _exif(turned)
        kept.insert(1, b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body)
    return b"".join([*kept, data[at:]])


def _webp(data: bytes) -> bytes:
    kept, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[at : at + 8])
        end = at + 8 + length + length % 2
        chunk = data[at:end]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~0x0C]) + chunk[9:]
        if kind not in (b"EXIF", b"XMP "):
            kept.append(chunk)
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(data: bytes) -> bytes:
    """Leave out comments and application blocks but the one that loops."""
    flags = data[10]
    at = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)
    kept = [data[:at]]
    while at < len(data) and data[at] != 0x3B:
        start = at
        if data[at] == 0x21:
            at = _after_blocks(data, at + 2)
            name = data[start + 3 : start + 14]
            if data[start + 1] == 0xF9 or (data[start + 1] == 0xFF and name in (b"NETSCAPE2.0", b"ANIMEXTS1.0")):
                kept.append(data[start:at])
        elif data[at] == 0x2C:
            local = data[at + 9]
            at = _after_blocks(data, at + 11 + (3 * 2 ** ((local & 7) + 1) if local & 0x80 else 0))
            kept.append(data[start:at])
        else:
            break
    return b"".join([*kept, b"\x3b"])


def _after_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += data[at] + 1
    return at + 1


def _mp4(data: bytes) -> bytes:
    """Blank the user data of a film and of its tracks; nothing moves."""
    film = bytearray(data)
    _blank(film, 0, len(film))
    return bytes(film)


def _blank(film: bytearray, at: int, end: int) -> None:
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
            _blank(film, at + head, at + size)
        at += size
