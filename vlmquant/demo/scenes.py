"""Small drawn scenes with captions, questions and answers that follow from the drawing's own description.

A scene is one of three frozen records: objects on a two-by-two grid, a bar chart, or a sign with a word and a number.
The demo model learns from them and is measured on them; `calibration/render.py` draws its own larger pictures.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from PIL import Image, ImageDraw, ImageFont

SIZE = 48
"""Pixels a side of a scene's picture."""
OVERSAMPLING = 2
"""Pictures are drawn this many times larger and averaged down, for smooth edges."""
CELL = 24
"""Pixels a side of one of the four cells objects stand in."""

COLOURS = {
    "red": (214, 39, 40),
    "green": (34, 150, 60),
    "blue": (40, 90, 215),
    "yellow": (245, 208, 30),
    "purple": (140, 60, 185),
    "orange": (250, 130, 20),
}
BACKGROUNDS = {"white": (250, 250, 250), "gray": (168, 168, 168), "black": (16, 16, 16), "pink": (252, 196, 212)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BOARD = (2, 3, 46, 45)
"""Left, top, right, bottom of a sign's board."""
TEXT_HEIGHTS = (14, 33)
"""How far down the middle of a sign's word and of its number stand."""
WORDS = ("stop", "open", "exit", "sale", "taxi", "cafe", "milk", "park", "home", "west")
NUMBERS = ("no", "one", "two", "three", "four")
PLACES = (
    "in the top left corner",
    "in the top right corner",
    "in the bottom left corner",
    "in the bottom right corner",
)


@dataclass(frozen=True)
class Thing:
    """One drawn shape; cell counts 0 to 3 in reading order, dx and dy shift it from the cell's middle, in pixels."""

    colour: str
    shape: str
    cell: int
    dx: int
    dy: int
    radius: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def row(self) -> int:
        return self.cell // 2

    @property
    def column(self) -> int:
        return self.cell % 2

    @property
    def centre(self) -> tuple[int, int]:
        return CELL // 2 + CELL * self.column + self.dx, CELL // 2 + CELL * self.row + self.dy


@dataclass(frozen=True)
class Objects:
    """One to four things on a plain background, in reading order, all of different cells and names."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Bars:
    """A chart of two to four bars, left to right: a colour and a height in pixels each, heights at least 7 apart."""

    background: str
    bars: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Sign:
    """A coloured board that shows a word over a one-digit number."""

    background: str
    board: str
    word: str
    number: int
    dx: int
    dy: int
    size: int


Scene = Objects | Bars | Sign


@dataclass(frozen=True)
class Question:
    """A question of one task with its one right answer."""

    task: str
    text: str
    answer: str


# ---- making ----------------------------------------------------------------------------------------------------------


def random_scene(rng: random.Random) -> Scene:
    """Objects in every other draw, else a chart or a sign."""
    makers: list[Callable[[random.Random], Scene]] = [random_objects, random_bars, random_sign]
    return rng.choices(makers, [2, 1, 1])[0](rng)


def random_objects(rng: random.Random) -> Objects:
    count = rng.choices([1, 2, 3, 4], [2, 4, 3, 1])[0]
    cells = sorted(rng.sample(range(4), count))
    names: list[tuple[str, str]] = []
    while len(names) < count:
        # Half of the later things repeat an earlier shape, so that counting a shape has answers beyond one.
        shape = rng.choice(names)[1] if names and rng.random() < 0.5 else rng.choice(SHAPES)
        name = rng.choice(list(COLOURS)), shape
        if name not in names:
            names.append(name)
    things = tuple(
        Thing(colour, shape, cell, rng.randint(-2, 2), rng.randint(-2, 2), rng.randint(8, 10))
        for (colour, shape), cell in zip(names, cells, strict=True)
    )
    return Objects(rng.choice(list(BACKGROUNDS)), things)


def random_bars(rng: random.Random) -> Bars:
    colours = rng.sample(list(COLOURS), rng.randint(2, 4))
    heights = rng.sample(range(6, 41, 7), len(colours))
    return Bars(rng.choice(list(BACKGROUNDS)), tuple(zip(colours, heights, strict=True)))


def random_sign(rng: random.Random) -> Sign:
    background, board = rng.choice(list(BACKGROUNDS)), rng.choice(list(COLOURS))
    return Sign(background, board, rng.choice(WORDS), rng.randint(1, 9), rng.randint(-1, 1), rng.randint(-1, 1), 17)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene) -> Image.Image:
    """The scene's picture, RGB, SIZE by SIZE."""
    image = Image.new("RGB", (SIZE * OVERSAMPLING, SIZE * OVERSAMPLING), BACKGROUNDS[scene.background])
    canvas = ImageDraw.Draw(image)
    match scene:
        case Objects():
            for thing in scene.things:
                ground = BACKGROUNDS[scene.background]
                draw_shape(canvas, thing.shape, thing.centre, thing.radius, COLOURS[thing.colour], ground, OVERSAMPLING)
        case Bars():
            draw_bars(canvas, scene)
        case Sign():
            draw_sign(canvas, scene)
    return image.reduce(OVERSAMPLING)


def draw_shape(
    canvas: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[int, int],
    radius: int,
    colour: tuple[int, int, int],
    background: tuple[int, int, int],
    scale: int,
) -> None:
    """One of SHAPES about `centre` (x, y), in pixels before `scale`; the hole of a ring has the background's colour."""
    x, y, r = scale * centre[0], scale * centre[1], scale * radius
    match shape:
        case "circle":
            canvas.ellipse((x - r, y - r, x + r, y + r), colour)
        case "square":
            canvas.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), colour)
        case "triangle":
            canvas.polygon([(x, y - r), (x + r, y + 0.9 * r), (x - r, y + 0.9 * r)], colour)
        case "cross":
            canvas.rectangle((x - r, y - 0.35 * r, x + r, y + 0.35 * r), colour)
            canvas.rectangle((x - 0.35 * r, y - r, x + 0.35 * r, y + r), colour)
        case "ring":
            canvas.ellipse((x - r, y - r, x + r, y + r), colour)
            canvas.ellipse((x - 0.55 * r, y - 0.55 * r, x + 0.55 * r, y + 0.55 * r), background)
        case "diamond":
            canvas.polygon([(x, y - 1.1 * r), (x + 0.75 * r, y), (x, y + 1.1 * r), (x - 0.75 * r, y)], colour)
        case _:
            raise ValueError(f"no shape {shape!r}; one of {', '.join(SHAPES)}")


def bar_boxes(scene: Bars) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom of each bar, in pixels of the picture."""
    pitch = (SIZE - 6) // len(scene.bars)
    return [(5 + i * pitch + 1, 44 - height, 5 + (i + 1) * pitch - 2, 44) for i, (_, height) in enumerate(scene.bars)]


def ink(ground: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is read better on `ground`."""
    return (10, 10, 10) if 299 * ground[0] + 587 * ground[1] + 114 * ground[2] > 120_000 else (250, 250, 250)


def draw_bars(canvas: ImageDraw.ImageDraw, scene: Bars) -> None:
    line = ink(BACKGROUNDS[scene.background])
    for (colour, _), box in zip(scene.bars, bar_boxes(scene), strict=True):
        canvas.rectangle([OVERSAMPLING * edge for edge in box], COLOURS[colour])
    canvas.rectangle([OVERSAMPLING * edge for edge in (3, 2, 3, 45)], line)
    canvas.rectangle([OVERSAMPLING * edge for edge in (3, 45, 46, 45)], line)


def draw_sign(canvas: ImageDraw.ImageDraw, scene: Sign) -> None:
    scale, board = OVERSAMPLING, COLOURS[scene.board]
    canvas.rectangle([edge * scale for edge in BOARD], board)
    font = ImageFont.load_default(scene.size * scale)
    for text, y in zip((scene.word, str(scene.number)), TEXT_HEIGHTS, strict=True):
        canvas.text(((SIZE // 2 + scene.dx) * scale, (y + scene.dy) * scale), text, ink(board), font, "mm")


# ---- telling ---------------------------------------------------------------------------------------------------------


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def listed(names: list[str]) -> str:
    """One: "a red ring"; more: "a red ring and a blue cross", "a red ring, a blue cross and a green square"."""
    return a(names[0]) if len(names) == 1 else ", ".join(map(a, names[:-1])) + " and " + a(names[-1])


def captions(scene: Scene) -> list[str]:
    """Every wording that is right for the scene; with a capital, as calibration and evaluation spell captions."""
    return [text[0].upper() + text[1:] for text in wordings(scene)]


def wordings(scene: Scene) -> list[str]:
    """The captions, all in small letters."""
    match scene:
        case Objects(things=(thing,)):
            return [
                f"{a(thing.name)} {PLACES[thing.cell]}.",
                f"there is {a(thing.name)} {PLACES[thing.cell]}.",
                f"{a(thing.name)} on a {scene.background} background.",
                f"the picture shows {a(thing.name)}.",
            ]
        case Objects(things=(one, two)):
            return [
                *(
                    f"{a(p.name)} {relation} {a(q.name)}."
                    for p, q in ((one, two), (two, one))
                    for relation in relations(p, q)
                ),
                f"{listed([one.name, two.name])} on a {scene.background} background.",
                f"there are two shapes: {listed([one.name, two.name])}.",
            ]
        case Objects(things=things):
            names = listed([thing.name for thing in things])
            return [
                f"{names}.",
                f"there are {NUMBERS[len(things)]} shapes: {names}.",
                f"{names} on a {scene.background} background.",
            ]
        case Bars(bars=bars):
            count, ranked = NUMBERS[len(bars)], ranking(scene)
            return [
                f"a bar chart with {count} bars; the {ranked[0]} bar is the tallest.",
                f"a chart of {count} bars, the tallest is {ranked[0]} and the shortest is {ranked[-1]}.",
                f"the {ranked[0]} bar is taller than the {'other bar' if len(bars) == 2 else 'other bars'}.",
            ]
        case Sign():
            return [
                f"{a(scene.board)} sign that says {scene.word} {scene.number}.",
                f"the words {scene.word} {scene.number} on {a(scene.board)} sign.",
                f"{a(scene.board)} sign with the word {scene.word} and the number {scene.number}.",
            ]


def relations(one: Thing, two: Thing) -> list[str]:
    """How `one` stands to `two`: above, below, left or right, by cells."""
    vertical = ["above"] if one.row < two.row else ["below"] if one.row > two.row else []
    across = ["to the left of"] if one.column < two.column else ["to the right of"] if one.column > two.column else []
    return vertical + across


def ranking(scene: Bars) -> list[str]:
    """Colours of the bars, tallest first."""
    return [colour for colour, _ in sorted(scene.bars, key=lambda bar: -bar[1])]


def questions(scene: Scene) -> list[Question]:
    """Every question that has exactly one right answer in the scene; "yes" is right as often as "no"."""
    match scene:
        case Objects():
            return object_questions(scene)
        case Bars():
            return bar_questions(scene)
        case Sign():
            return [
                Question("document", "What word is on the sign?", scene.word),
                Question("document", "What number is on the sign?", str(scene.number)),
                Question("document", "What does the sign say?", f"{scene.word} {scene.number}"),
                Question("vqa", "What color is the sign?", scene.board),
            ]


def object_questions(scene: Objects) -> list[Question]:
    things = scene.things
    shapes, colours = [thing.shape for thing in things], [thing.colour for thing in things]
    asked = [
        Question("vqa", "What color is the background?", scene.background),
        Question("reasoning", "How many shapes are there?", NUMBERS[len(things)]),
    ]
    asked += [
        Question("reasoning", f"How many {plural(shape)} are there?", NUMBERS[shapes.count(shape)])
        for shape in sorted(set(shapes))
    ]
    for thing in things:
        if shapes.count(thing.shape) == 1:
            asked.append(Question("vqa", f"What color is the {thing.shape}?", thing.colour))
        if colours.count(thing.colour) == 1:
            asked.append(Question("vqa", f"What shape is {thing.colour}?", thing.shape))
        asked.append(Question("reasoning", f"Where is the {thing.name}?", PLACES[thing.cell]))
        absent = next(
            colour for colour in turned(COLOURS, thing.colour) if f"{colour} {thing.shape}" not in names(things)
        )
        asked.append(Question("vqa", f"Is there {a(thing.name)}?", "yes"))
        asked.append(Question("vqa", f"Is there {a(f'{absent} {thing.shape}')}?", "no"))
    for one, two in permutations(things, 2):
        for relation in relations(one, two):
            others = [thing for thing in things if thing != two and relation in relations(thing, two)]
            if len(others) == 1:
                asked.append(Question("reasoning", f"What is {relation} the {two.name}?", a(one.name)))
    return asked


def bar_questions(scene: Bars) -> list[Question]:
    ranked, colours = ranking(scene), [colour for colour, _ in scene.bars]
    asked = [
        Question("chart", "How many bars are there?", NUMBERS[len(colours)]),
        Question("chart", "Which bar is the tallest?", ranked[0]),
        Question("chart", "Which bar is the shortest?", ranked[-1]),
        Question("chart", "What color is the bar on the left?", colours[0]),
        Question("chart", "What color is the bar on the right?", colours[-1]),
    ]
    asked += [
        Question(
            "chart",
            f"Is the {one} bar taller than the {two} bar?",
            "yes" if ranked.index(one) < ranked.index(two) else "no",
        )
        for one, two in permutations(colours, 2)
    ]
    return asked


def names(things: tuple[Thing, ...]) -> set[str]:
    return {thing.name for thing in things}


def turned(colours: dict[str, tuple[int, int, int]], first: str) -> list[str]:
    """The colours after `first`, cyclically, so that the absent colour asked about varies."""
    order = list(colours)
    at = order.index(first)
    return order[at + 1 :] + order[:at]


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def sums(rng: random.Random) -> Question:
    """A text-only question."""
    one, two = rng.randint(0, 9), rng.randint(0, 9)
    ask: Callable[[int, int], tuple[str, int]] = rng.choice(
        [
            lambda p, q: (f"What is {p} plus {q}?", p + q),
            lambda p, q: (f"What is {max(p, q)} minus {min(p, q)}?", abs(p - q)),
        ]
    )
    text, answer = ask(one, two)
    return Question("text", text, str(answer))
