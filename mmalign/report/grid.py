"""Grids: one PNG in which the same prompt and seed stand side by side, before, at each checkpoint, and after."""

import unicodedata
from collections.abc import Sequence
from itertools import zip_longest

from PIL import Image, ImageDraw, ImageFont

TILE = 128  # pixels of an image's longer side
GAP = 4  # between the two images of a pair
GUTTER = 28  # between pairs
MARGIN = 40
CAPTION = 30  # height under a pair
TEXT, MUTED, PAPER, RULE = "#1f2328", "#6e7781", "#ffffff", "#d8dee4"

# Pillow's own font has ASCII letters only; these are asked in turn for a prompt that needs more.
SYSTEM_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "msyh.ttc")


def chosen_places(prompts: Sequence[str], count: int) -> list[int]:
    """Which pairs are shown: the first of every prompt in turn, then the second of every prompt, and so on.

    The scores play no part, so a grid cannot be flattering.
    """
    by_prompt: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(place)
    turns = [place for turn in zip_longest(*by_prompt.values()) for place in turn if place is not None]
    return turns[:count]


def short_captions(prompts: Sequence[str]) -> tuple[str, list[str]]:
    """The words with which all prompts begin (at least two, else none) and what remains of each prompt.

    `a handwritten digit two`, `a handwritten digit six` give `a handwritten digit` and `two`, `six`.
    """
    if len(set(prompts)) < 2:
        return "", list(prompts)
    split = [prompt.split() for prompt in prompts]
    num_shared = 0
    while all(len(words) > num_shared + 1 for words in split) and len({words[num_shared] for words in split}) == 1:
        num_shared += 1
    if num_shared < 2:
        return "", list(prompts)
    return " ".join(split[0][:num_shared]), [" ".join(words[num_shared:]) for words in split]


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """The image with its longer side at most `side`: large ones are averaged, small ones enlarged by a whole factor, crisp."""
    rgb = image.convert("RGB")
    longer = max(rgb.size)
    if longer > side:
        return rgb.resize((max(1, rgb.width * side // longer), max(1, rgb.height * side // longer)), Image.Resampling.LANCZOS)
    factor = side // longer
    return rgb.resize((rgb.width * factor, rgb.height * factor), Image.Resampling.NEAREST)


def before_after_grid(
    prompts: Sequence[str], before: Sequence[Image.Image], after: Sequence[Image.Image], *, rows: int, cols: int
) -> Image.Image:
    """A grid of rows x cols pairs, before on the left, with the prompts as captions; fewer if there are fewer pairs.

    Args:
        prompts, before, after: entry i of all three belongs together; which are shown: `chosen_places`.
        rows, cols: in pairs.
    """
    places = chosen_places(prompts, rows * cols)
    shared, captions = short_captions([prompts[place] for place in places])
    cols = min(cols, len(places))
    rows = -(-len(places) // cols)
    header = 74 if shared else 26
    width = 2 * MARGIN + cols * (2 * TILE + GAP) + (cols - 1) * GUTTER
    height = MARGIN + header + rows * (TILE + CAPTION) + (rows - 1) * GUTTER // 2 + MARGIN // 2
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if shared:
        draw.text((MARGIN, MARGIN - 10), _drawable(f"{shared} …", 20)[0], font=_drawable(shared, 20)[1], fill=TEXT)
    for col in range(cols):
        left = MARGIN + col * (2 * TILE + GAP + GUTTER)
        baseline = MARGIN + header - 26
        draw.text((left, baseline), "before", font=ImageFont.load_default(14), fill=MUTED)
        draw.text((left + TILE + GAP, baseline), "after", font=ImageFont.load_default(14), fill=MUTED)
        draw.line((left, baseline + 20, left + 2 * TILE + GAP - 1, baseline + 20), fill=RULE)
    for index, (place, caption) in enumerate(zip(places, captions, strict=True)):
        left = MARGIN + (index % cols) * (2 * TILE + GAP + GUTTER)
        top = MARGIN + header + (index // cols) * (TILE + CAPTION + GUTTER // 2)
        for image, offset in ((before[place], 0), (after[place], TILE + GAP)):
            small = thumbnail(image, TILE)
            sheet.paste(small, (left + offset + (TILE - small.width) // 2, top + (TILE - small.height) // 2))
        _caption(draw, caption, left, top + TILE + 6)
    return sheet


def checkpoint_grid(prompts: Sequence[str], columns: Sequence[tuple[str, Sequence[Image.Image]]], *, rows: int) -> Image.Image:
    """A grid with one row a prompt and seed and one column a state of the model, so that an eye sees when an image turned.

    Args:
        prompts: entry i belongs to image i of every column; which are shown: `chosen_places`.
        columns: (heading, images): before training, each checkpoint, after.
        rows: prompts and seeds, fewer if there are fewer.
    """
    places = chosen_places(prompts, rows)
    room = len(columns) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (2 * MARGIN + room, 2 * MARGIN + len(places) * (TILE + CAPTION)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for col, (heading, _) in enumerate(columns):
        draw.text((MARGIN + col * (TILE + GAP), MARGIN - 22), heading, font=ImageFont.load_default(14), fill=MUTED)
    for row, place in enumerate(places):
        top = MARGIN + row * (TILE + CAPTION)
        for col, (_, images) in enumerate(columns):
            small = thumbnail(images[place], TILE)
            left = MARGIN + col * (TILE + GAP)
            sheet.paste(small, (left + (TILE - small.width) // 2, top + (TILE - small.height) // 2))
        _caption(draw, prompts[place], MARGIN, top + TILE + 6, room)
    return sheet


def _caption(draw: ImageDraw.ImageDraw, text: str, left: int, top: int, room: int = 2 * TILE + GAP) -> None:
    text, font = _drawable(text, 15)
    if draw.textlength(text, font=font) > room:
        while text and draw.textlength(text + "…", font=font) > room:
            text = text[:-1]
        text = text.rstrip() + "…"
    draw.text((left, top), text, font=font, fill=TEXT)


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _drawable(text: str, size: int) -> tuple[str, Font]:
    """The text and the first font that has all its letters; without one, letters without accents and ? for the rest."""
    own = ImageFont.load_default(size)
    letters = (letter for letter in unicodedata.normalize("NFKD", text) if not unicodedata.combining(letter))
    plain = "".join(letters).encode("ascii", "replace").decode()
    if text.replace("…", "").isascii():
        return text, own
    for name in SYSTEM_FONTS:
        try:
            font = ImageFont.truetype(name, size)
        except OSError:
            continue
        missing = bytes(font.getmask("\uffff"))
        if not any(bytes(font.getmask(letter)) == missing for letter in set(text) - {" "}):
            return text, font
    return plain, own
