"""A curve over steps as a picture."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE, MARGIN, TEXT = (640, 320), 48, 14
SMOOTH = 5  # steps whose mean is drawn over the values themselves


def curve(values: Sequence[float], title: str) -> Image.Image:
    """Values of steps 1, 2, ..., with their running mean; `title` says what they are."""
    picture, font = Image.new("RGB", SIZE, "white"), ImageFont.load_default(TEXT)
    draw = ImageDraw.Draw(picture)
    least, most = min(values), max(values)
    room = (most - least) or 1.0
    width, height = SIZE[0] - 2 * MARGIN, SIZE[1] - 2 * MARGIN

    def at(step, value):
        return (MARGIN + width * step / max(len(values) - 1, 1),
                MARGIN + height * (1 - (value - least) / room))

    draw.rectangle((MARGIN, MARGIN, MARGIN + width, MARGIN + height), outline="lightgray")
    draw.text((MARGIN, TEXT), title, "black", font)
    for value in {least, most}:
        draw.text((4, at(0, value)[1] - TEXT / 2), f"{value:.3g}", "dimgray", font)
    below = MARGIN + height + 6
    draw.text((MARGIN, below), "1", "dimgray", font)
    draw.text((MARGIN + width - 24, below), str(len(values)), "dimgray", font)
    means = [sum(near) / len(near) for near in (
        values[max(0, i + 1 - SMOOTH):i + 1] for i in range(len(values)))]
    for line, colour, thick in ((values, "#9db8d9", 1), (means, "#1f3b63", 3)):
        points = [at(i, v) for i, v in enumerate(line)]
        draw.line(points if len(points) > 1 else points * 2, colour, thick)
    return picture
