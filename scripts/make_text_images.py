"""Draws pictures of text that stands on its feet or not, for classifiers that tell which way is up.

    python scripts/make_text_images.py pages --count 6000 --out pages/    # 320x320, four ways round
    python scripts/make_text_images.py lines --count 6000 --out lines/    # 192x48, two ways round

The words are those of the documentation, the typefaces those that matplotlib brings; size, colours, paper, slant, blur
and noise are drawn at random from `--seed`. A folder for each turn, a JPEG for each picture.
"""

import argparse
import random
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

_PAGE = 320  # pixels along both sides
_LINE = (192, 48)  # pixels across and down
_FACES = ("DejaVuSans*", "DejaVuSerif*", "STIXGeneral*")


def words() -> list[str]:
    """Gives the words of the documentation, in order."""
    pages = sorted((Path(__file__).parent.parent / "docs").rglob("*.md"))
    return [word for page in pages for word in re.findall(r"[A-Za-z][A-Za-z,.']+|\d[\d.,]*", page.read_text("utf-8"))]


def faces() -> list[Path]:
    """Gives the files of the typefaces that letters can be drawn with."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return sorted(path for pattern in _FACES for path in folder.glob(f"{pattern}.ttf") if "Display" not in path.name)


class Printer:
    """Draws pictures of text at random."""

    def __init__(self, seed: int) -> None:
        self.random, self.words, self.faces = random.Random(seed), words(), faces()

    def line(self, turn: int) -> Image.Image:
        """Draws a line of text that fills its picture from top to bottom, turned by so many degrees."""
        font = self._font(self.random.randint(26, 36))
        text = self._text(self.random.randint(1, 5))
        left, top, right, bottom = map(int, font.getbbox(text))
        ink, paper = self._colours()
        margin = self.random.randint(2, 8)
        picture = Image.new("RGB", (right - left + 2 * margin, bottom - top + 2 * margin), paper)
        ImageDraw.Draw(picture).text((margin - left, margin - top), text, ink, font)
        picture = self._slanted(picture, 2.0, paper).rotate(turn)
        width = min(_LINE[0], max(1, round(picture.width * _LINE[1] / picture.height)))
        canvas = Image.new("RGB", _LINE, (127, 127, 127))  # as PP-OCR fills up what a short line leaves
        canvas.paste(picture.resize((width, _LINE[1]), Image.Resampling.BILINEAR))
        return self._worn(canvas, 0.7)

    def page(self, turn: int) -> Image.Image:
        """Draws a page, turned by so many degrees: a heading, paragraphs in one or two columns, sometimes a figure."""
        ink, paper = self._colours()
        height = 2 * _PAGE
        width = round(height * self.random.uniform(0.65, 1.0))
        picture = Image.new("RGB", (width, height), paper)
        draw = ImageDraw.Draw(picture)
        margin, size = self.random.randint(20, 60), self.random.randint(11, 22)
        down = margin
        if self.random.random() < 0.6:
            draw.text((margin, down), self._text(4), ink, self._font(round(1.8 * size)))
            down += 3 * size
        font, columns = self._font(size), self.random.choice((1, 1, 2))
        column = (width - 2 * margin) // columns
        for number in range(columns):
            self._column(
                draw, (margin + number * column, down, margin + (number + 1) * column - size, height), ink, font
            )
        if self.random.random() < 0.3:
            across, up = self.random.randint(0, width // 2), self.random.randint(height // 3, height * 2 // 3)
            draw.rectangle(
                (across, up, across + width // 3, up + height // 5), tuple(self.random.choices(range(256), k=3))
            )
        picture = self._slanted(picture, 3.0, paper)
        picture.thumbnail((_PAGE, _PAGE), Image.Resampling.BILINEAR)
        canvas = Image.new("RGB", (_PAGE, _PAGE), (255, 255, 255))
        canvas.paste(picture, ((_PAGE - picture.width) // 2, (_PAGE - picture.height) // 2))
        return self._worn(canvas.rotate(-turn), 0.5)

    def _column(
        self,
        draw: ImageDraw.ImageDraw,
        box: tuple[int, int, int, int],
        ink: tuple[int, ...],
        font: ImageFont.FreeTypeFont,
    ) -> None:
        left, down, right, bottom = box
        line = round(font.size * self.random.uniform(1.2, 1.6))
        end = bottom - self.random.randint(line, max(line + 1, (bottom - down) // 2))
        while down < end:
            text, wanted = "", right - left
            if self.random.random() < 0.12:  # a paragraph ends
                wanted = round(wanted * self.random.random())
            while font.getlength(longer := f"{text} {self._text(1)}".strip()) <= wanted:
                text = longer
            draw.text((left, down), text, ink, font)
            down += line if wanted == right - left else line * 2

    def _text(self, count: int) -> str:
        start = self.random.randrange(len(self.words) - count)
        return " ".join(self.words[start : start + count])

    def _font(self, size: int) -> ImageFont.FreeTypeFont:
        return ImageFont.truetype(str(self.random.choice(self.faces)), size)

    def _colours(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Gives ink and paper, one dark and one light."""
        dark = tuple(self.random.randint(0, 90) for _ in range(3))
        light = tuple(self.random.randint(185, 255) for _ in range(3))
        return (light, dark) if self.random.random() < 0.15 else (dark, light)

    def _slanted(self, picture: Image.Image, most: float, paper: tuple[int, ...]) -> Image.Image:
        angle = self.random.gauss(0, most / 2)
        return picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=paper)

    def _worn(self, picture: Image.Image, most: float) -> Image.Image:
        picture = picture.filter(ImageFilter.GaussianBlur(self.random.uniform(0, most)))
        noise = np.random.default_rng(self.random.getrandbits(32)).normal(
            0, self.random.uniform(0, 12), (*picture.size[::-1], 1)
        )
        return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def main() -> None:
    """Draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("pages", "lines"))
    parser.add_argument("--count", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    printer = Printer(arguments.seed)
    draw: Callable[[int], Image.Image] = printer.page if arguments.kind == "pages" else printer.line
    turns = (0, 90, 180, 270) if arguments.kind == "pages" else (0, 180)
    for turn in turns:
        (arguments.out / str(turn)).mkdir(parents=True, exist_ok=True)
    for number in range(arguments.count):
        turn = turns[number % len(turns)]
        draw(turn).save(arguments.out / str(turn) / f"{number:06}.jpg", quality=printer.random.randint(60, 95))


if __name__ == "__main__":
    main()
