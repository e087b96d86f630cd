"""Zip files: folders on their way out, and uploads on their way in."""

import stat
import zipfile
from pathlib import Path, PurePosixPath

from mmalign.errors import UserError

MOST_MEMBERS = 200_000
TEXTS = (".json", ".jsonl", ".csv", ".md", ".svg")


def packed(folder: Path) -> Path:
    """Pack a folder into a zip file beside it; media are packed already, so nothing is compressed but texts."""
    archive = folder.with_name(f"{folder.name}.zip")
    with zipfile.ZipFile(archive, "w", strict_timestamps=False) as target:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            way = zipfile.ZIP_DEFLATED if file.suffix in TEXTS else zipfile.ZIP_STORED
            target.write(file, Path(folder.name) / file.relative_to(folder), compress_type=way)
    return archive


def file_name(name: str) -> str:
    """Return a name as one that every file system and header takes."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)[:80].strip("-") or "project"


def unpack(archive: Path, target: Path, *, most_bytes: int) -> None:
    """Unpack a zip file into a folder: plain files alone, none beside the folder, no more bytes than allowed.

    Raises:
        UserError: a member that leads elsewhere or is a link, too many of them, too many bytes, a damaged file.
    """
    left = most_bytes
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [one for one in packed.infolist() if not one.is_dir()]
            if len(members) > MOST_MEMBERS:
                raise UserError(f"upload: got {len(members)} files in the archive, want at most {MOST_MEMBERS}.")
            for member in members:
                file = target / _member_path(member)
                file.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, file.open("xb") as out:
                    while block := source.read(2**20):
                        left -= len(block)
                        if left < 0:
                            raise UserError(f"upload: the archive unpacks to more than {most_bytes} bytes. Split it.")
                        out.write(block)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as fault:
        raise UserError(f"upload: the archive cannot be unpacked ({fault}). Pack it anew.") from fault


def _member_path(member: zipfile.ZipInfo) -> PurePosixPath:
    path = PurePosixPath(member.filename.replace("\\", "/"))
    is_link = stat.S_ISLNK(member.external_attr >> 16)
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or is_link or "\0" in member.filename:
        raise UserError(f"upload: got the member {member.filename[:100]!r}, want plain files inside the archive's folder.")
    return path
