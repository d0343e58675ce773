"""Contact sheets: pictures in a grid, with words over them."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIDE = 192  # smaller pictures are enlarged to about this many pixels
GAP = 8
TEXT = 14  # pixels of a letter's height
LINE = 20


def contact_sheet(rows: Sequence[Sequence[Image.Image | None]], captions: Sequence[str],
                  headings: Sequence[str] = ()) -> Image.Image:
    """A sheet of `rows` of pictures, equally many in each, None for an empty place.

    Over each row stands its caption, over each column its heading, if given; long ones are
    wrapped. Small pictures are enlarged by whole factors, so that their pixels stay sharp.
    """
    rows = [[p and _enlarged(p) for p in row] for row in rows]
    columns = [max((p.width for p in column if p), default=SIDE) for column in zip(*rows)]
    lefts = [GAP + sum(columns[:i]) + GAP * i for i in range(len(columns))]
    width = lefts[-1] + columns[-1] + GAP
    font = ImageFont.load_default(TEXT)

    top, words, places = GAP, [], []  # where each line of text and each picture goes
    heads = [_wrapped(text, columns[i], font) for i, text in enumerate(headings)]
    for left, lines in zip(lefts, heads):
        words += [(left, top + LINE * i, line, "dimgray") for i, line in enumerate(lines)]
    top += LINE * max(map(len, heads), default=0)
    for row, caption in zip(rows, captions):
        lines = _wrapped(caption, width - 2 * GAP, font)
        words += [(GAP, top + LINE * i, line, "black") for i, line in enumerate(lines)]
        top += LINE * len(lines)
        places += [(left, top, p) for left, p in zip(lefts, row) if p]
        top += max((p.height for p in row if p), default=0) + GAP

    sheet = Image.new("RGB", (width, top), "white")
    draw = ImageDraw.Draw(sheet)
    for left, y, line, colour in words:
        draw.text((left, y), line, colour, font)
    for left, y, picture in places:
        sheet.paste(picture, (left, y))
    return sheet


def _enlarged(picture: Image.Image) -> Image.Image:
    return picture.resize([s * max(1, SIDE // max(picture.size)) for s in picture.size],
                          Image.Resampling.NEAREST)


def _wrapped(text: str, width: int, font) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words, or within long ones."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines if text.strip() else []
