"""Draw a calibration set: pictures whose questions and answers follow from what was drawn.

    python calibration/render.py OUT [--pairs 128] [--texts 24] [--seed 7]

writes OUT in the format of `vlmquant/calibration/sets.py`. Every maker below draws one picture and tells about it from
the same values, so an answer cannot disagree with its picture. Equal arguments and fonts give equal bytes.
"""

import argparse
import datetime
import io
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmquant.calibration.samples import Sample
from vlmquant.calibration.sets import SampleSet, write_set
from vlmquant.demo.scenes import COLOURS, a, draw_shape, ink, listed, plural

SHARES = {"caption": 0.25, "vqa": 0.22, "document": 0.22, "chart": 0.18, "reasoning": 0.13}
"""Of the pairs with a picture; what rounding leaves over goes to captions."""
PALETTE_COLOURS = 64
FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansCondensed.ttf",
    "DejaVuSerif-Italic.ttf",
)
"""Free (Bitstream Vera licence and public domain); looked up in the system's font folders."""
BUILT_IN = None
"""Stands for Pillow's own font (Aileron, CC0)."""

Colour = tuple[int, int, int]
NUMBER_WORDS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
NAMES = (
    "Amara",
    "Ben",
    "Chiara",
    "David",
    "Elena",
    "Farid",
    "Grace",
    "Hiro",
    "Ines",
    "Jonas",
    "Kofi",
    "Lena",
    "Mateo",
    "Nadia",
    "Omar",
    "Priya",
)
SURNAMES = (
    "Adeyemi",
    "Berg",
    "Castillo",
    "Dubois",
    "Evans",
    "Fischer",
    "Gupta",
    "Hansen",
    "Ito",
    "Jensen",
    "Kowalski",
    "Lopez",
    "Moreau",
    "Novak",
)
TOWNS = (
    "Ashford",
    "Brookfield",
    "Calder",
    "Dunmore",
    "Eastbury",
    "Fairview",
    "Glenrock",
    "Harlow",
    "Millbrook",
    "Norwick",
)
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


@dataclass(frozen=True)
class Made:
    """One picture with what is asked about it."""

    image: Image.Image | None
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Maker:
    """What makers draw with: chance, and fonts by file name (BUILT_IN for Pillow's)."""

    rng: random.Random
    fonts: tuple[str | None, ...]


# ---- tools -----------------------------------------------------------------------------------------------------------


def pick_face(make: Maker) -> Callable[[float], ImageFont.FreeTypeFont]:
    """A typeface for one picture: size in pixels -> font."""
    name = make.rng.choice(make.fonts)
    return lambda size: ImageFont.load_default(size) if name is BUILT_IN else ImageFont.truetype(name, size)


def shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (max(0, min(255, round(channel * factor))) for channel in colour)
    return red, green, blue


def pale(make: Maker) -> Colour:
    red, green, blue = (make.rng.randint(225, 255) for _ in range(3))
    return red, green, blue


def count_words(number: int, noun: str) -> str:
    """count_words(1, "tree") is "one tree", count_words(3, "tree") "three trees"."""
    return f"{NUMBER_WORDS[number]} {noun if number == 1 else plural(noun)}"


def join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def money(cents: int, sign: str = "$") -> str:
    return f"{sign}{cents // 100}.{cents % 100:02d}"


# ---- landscapes ------------------------------------------------------------------------------------------------------

SKIES: dict[str, Colour] = {
    "blue": (135, 196, 240),
    "gray": (176, 182, 190),
    "orange": (250, 176, 110),
    "dark": (24, 30, 66),
}
GROUNDS: dict[str, Colour] = {
    "green grass": (96, 168, 80),
    "yellow sand": (232, 208, 140),
    "white snow": (240, 244, 248),
}
WALLS: dict[str, Colour] = {
    "red": (196, 60, 54),
    "white": (248, 246, 240),
    "yellow": (240, 212, 110),
    "brown": (140, 96, 62),
    "blue": (84, 120, 190),
}


@dataclass(frozen=True)
class Landscape:
    """Things stand side by side on the ground, left to right: (kind, colour or "")."""

    sky: str
    ground: str
    clouds: int
    things: tuple[tuple[str, str], ...]

    def count(self, kind: str) -> int:
        return sum(kind == other for other, _ in self.things)

    @property
    def names(self) -> list[str]:
        return [f"{colour} {kind}".strip() for kind, colour in self.things]


def random_landscape(rng: random.Random) -> Landscape:
    things = []
    for _ in range(rng.randint(2, 6)):
        kind = rng.choice(["house", "tree", "tree", "car", "person", "flower", "ball"])
        colours = {"house": list(WALLS), "tree": [""]}.get(kind, list(COLOURS))
        things.append((kind, rng.choice(colours)))
    return Landscape(rng.choice(list(SKIES)), rng.choice(list(GROUNDS)), rng.randint(0, 3), tuple(things))


def draw_landscape(make: Maker, scene: Landscape) -> Image.Image:
    slot = make.rng.randint(56, 84)
    width, height = max(3, len(scene.things)) * slot + 20, make.rng.randint(180, 300)
    horizon = round(height * 0.62)
    image = Image.new("RGB", (width, height), SKIES[scene.sky])
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, horizon, width, height), GROUNDS[scene.ground])
    light = (245, 240, 215) if scene.sky == "dark" else (252, 224, 96)
    canvas.ellipse((width - 46, 10, width - 14, 42), light)
    for i in range(scene.clouds):
        x, y = 14 + i * (width - 60) // 3, 16 + make.rng.randint(0, 18)
        for dx, dy, r in ((0, 8, 10), (14, 2, 13), (29, 8, 10)):
            canvas.ellipse((x + dx, y + dy, x + dx + 2 * r, y + dy + 1.5 * r), (250, 250, 252))
    first = (width - slot * len(scene.things)) // 2
    for i, (kind, colour) in enumerate(scene.things):
        draw_thing(canvas, kind, colour, first + i * slot + slot // 2, horizon + make.rng.randint(14, 30), slot * 0.8)
    return image


def draw_thing(canvas: ImageDraw.ImageDraw, kind: str, colour: str, x: float, foot: float, size: float) -> None:
    """A thing `size` wide whose middle stands at (x, foot)."""
    paint = WALLS[colour] if kind == "house" else COLOURS.get(colour, (46, 120, 56))
    u = size / 10
    match kind:
        case "house":
            canvas.rectangle((x - 4 * u, foot - 5 * u, x + 4 * u, foot), paint, (60, 50, 50))
            canvas.polygon([(x - 5 * u, foot - 5 * u), (x, foot - 9 * u), (x + 5 * u, foot - 5 * u)], (110, 58, 48))
            canvas.rectangle((x - u, foot - 3 * u, x + u, foot), (90, 64, 44))
            canvas.rectangle((x + 1.6 * u, foot - 4.2 * u, x + 3.2 * u, foot - 2.6 * u), (190, 222, 240), (60, 50, 50))
        case "tree":
            canvas.rectangle((x - 0.7 * u, foot - 4 * u, x + 0.7 * u, foot), (104, 72, 44))
            canvas.ellipse((x - 3.2 * u, foot - 10 * u, x + 3.2 * u, foot - 3 * u), (46, 120, 56))
        case "car":
            canvas.rounded_rectangle((x - 5 * u, foot - 3 * u, x + 5 * u, foot - u), u, paint)
            canvas.polygon(
                [
                    (x - 3 * u, foot - 3 * u),
                    (x - 2 * u, foot - 5 * u),
                    (x + 2 * u, foot - 5 * u),
                    (x + 3 * u, foot - 3 * u),
                ],
                (200, 226, 240),
            )
            for wheel in (-3, 3):
                canvas.ellipse((x + (wheel - 1.1) * u, foot - 2.2 * u, x + (wheel + 1.1) * u, foot), (34, 34, 38))
        case "person":
            canvas.line((x, foot - 3 * u, x - 1.2 * u, foot), (50, 50, 90), round(u))
            canvas.line((x, foot - 3 * u, x + 1.2 * u, foot), (50, 50, 90), round(u))
            canvas.rounded_rectangle((x - 1.4 * u, foot - 6.4 * u, x + 1.4 * u, foot - 2.6 * u), u / 2, paint)
            canvas.ellipse((x - 1.1 * u, foot - 8.8 * u, x + 1.1 * u, foot - 6.4 * u), (214, 164, 130))
        case "flower":
            canvas.line((x, foot, x, foot - 4 * u), (40, 120, 50), max(2, round(u / 3)))
            for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
                cx, cy = x + 1.1 * dx * u, foot - 4.6 * u + 1.1 * dy * u
                canvas.ellipse((cx - u, cy - u, cx + u, cy + u), paint)
            canvas.ellipse((x - 0.7 * u, foot - 5.3 * u, x + 0.7 * u, foot - 3.9 * u), (250, 240, 190))
        case "ball":
            canvas.ellipse((x - 2 * u, foot - 4 * u, x + 2 * u, foot), paint)
            canvas.arc((x - 2 * u, foot - 4 * u, x + 2 * u, foot), 200, 340, shade(paint, 0.6), 2)


SKY_WORDS = {"blue": "a blue sky", "gray": "a gray sky", "orange": "an orange evening sky", "dark": "a dark night sky"}


def wearing(kind: str, colour: str) -> str:
    return f"a person in {a(f'{colour} shirt')}" if kind == "person" else a(f"{colour} {kind}".strip())


def caption_of_landscape(make: Maker) -> Made:
    scene = random_landscape(make.rng)
    things = join([wearing(*thing) for thing in scene.things])
    kinds = list(dict.fromkeys(kind for kind, _ in scene.things))
    counted = join([count_words(scene.count(kind), kind) if kind != "person" else people(scene) for kind in kinds])
    sky = SKY_WORDS[scene.sky]
    clouds = f" with {count_words(scene.clouds, 'cloud')}" if scene.clouds else " without clouds"
    wordings = [
        sentence(f"{things} under {sky}"),
        sentence(f"a simple drawing of {counted} on {scene.ground}"),
        f"The drawing shows {things}. They stand on {scene.ground} under {sky}{clouds}.",
        f"From left to right there is {things}; the sky is {scene.sky}.",
        sentence(f"{counted} in a row on {scene.ground}, {sky} above"),
    ]
    question = make.rng.choice(
        ["Describe the image.", "Describe the image in one sentence.", "Write a caption for this picture."]
    )
    answers = make.rng.sample(wordings, make.rng.randint(3, 5))
    return Made(draw_landscape(make, scene), question, tuple(answers))


def people(scene: Landscape) -> str:
    number = scene.count("person")
    return "one person" if number == 1 else f"{NUMBER_WORDS[number]} people"


def question_about_landscape(make: Maker) -> Made:
    scene = random_landscape(make.rng)
    first, last = wearing(*scene.things[0]), wearing(*scene.things[-1])
    asked = [
        ("What color is the sky?", scene.sky),
        ("What is on the ground?", scene.ground),
        ("What is the leftmost thing on the ground?", first),
        ("What stands farthest to the right?", f"{sentence(last)[:-1]}."),
        ("Is it day or night in the picture?", "night" if scene.sky == "dark" else "day"),
        ("Are there any clouds in the sky?", f"Yes, {count_words(scene.clouds, 'cloud')}." if scene.clouds else "No."),
        ("How many trees are there?", str(scene.count("tree"))),
    ]
    for kind, colour in scene.things:
        if scene.count(kind) == 1 and kind != "tree":
            what = "the person's shirt" if kind == "person" else f"the {kind}"
            asked += 2 * [(f"What color is {what}?", colour)]
    asked.append((f"Is there a {scene.things[0][0]} in the picture?", "yes"))
    asked += 2 * [
        ("What stands on the ground, from left to right?", sentence(join([wearing(*thing) for thing in scene.things])))
    ]
    for kind in ("car", "house", "person"):
        if scene.count(kind) == 0:
            asked.append((f"Is there a {kind} in the picture?", "no"))
    question, answer = make.rng.choice(asked)
    return Made(draw_landscape(make, scene), question, (answer,))


# ---- documents -------------------------------------------------------------------------------------------------------

GOODS = {
    "Bread": 249, "Milk": 119, "Eggs": 329, "Apples": 275, "Coffee": 649, "Rice": 189, "Cheese": 455, "Tea": 299,
    "Soap": 159, "Honey": 525, "Pasta": 135, "Butter": 279, "Juice": 239, "Carrots": 99, "Salt": 79,
}  # fmt: skip


def receipt(make: Maker) -> Made:
    rng, face = make.rng, pick_face(make)
    lines = [
        (name, rng.randint(1, 3), GOODS[name] + 10 * rng.randint(0, 9))
        for name in rng.sample(list(GOODS), rng.randint(3, 7))
    ]
    total = sum(count * price for _, count, price in lines)
    sign, shop = (
        rng.choice(["$", "€", "£"]),
        f"{rng.choice(SURNAMES)}'s {rng.choice(['Market', 'Grocery', 'Corner Shop', 'Deli'])}",
    )
    date = datetime.date(rng.randint(2019, 2025), rng.randint(1, 12), rng.randint(1, 28)).isoformat()
    size = rng.randint(14, 18)
    width, row = size * 18, round(size * 1.6)
    image = Image.new("RGB", (width, row * (len(lines) + 7)), (252, 251, 246))
    canvas = ImageDraw.Draw(image)
    canvas.text((width / 2, row), shop, (20, 20, 20), face(size * 1.15), "mm")
    canvas.text((width / 2, 2 * row), f"Date: {date}", (70, 70, 70), face(size * 0.9), "mm")
    y = 3.2 * row
    for name, count, price in lines:
        canvas.text((12, y), f"{count} x {name}", (20, 20, 20), face(size), "lm")
        canvas.text((width - 12, y), money(count * price, sign), (20, 20, 20), face(size), "rm")
        y += row
    canvas.line((12, y, width - 12, y), (60, 60, 60), 1)
    canvas.text((12, y + row), "TOTAL", (0, 0, 0), face(size * 1.2), "lm")
    canvas.text((width - 12, y + row), money(total, sign), (0, 0, 0), face(size * 1.2), "rm")
    canvas.text((width / 2, y + 2.4 * row), "Thank you!", (90, 90, 90), face(size * 0.9), "mm")
    name, count, price = rng.choice(lines)
    bought = join([f"{n} x {item}" for item, n, _ in lines])
    question, answer = rng.choice(
        [
            ("What is the total on this receipt?", money(total, sign)),
            ("What is the date on the receipt?", date),
            ("What is the name of the shop?", shop),
            (f"How much was paid for {name}?", money(count * price, sign)),
            ("What was bought?", f"The receipt lists {bought}, for {money(total, sign)} in all."),
        ]
    )
    return Made(image, question, (answer,))


LETTERS = (
    (
        "the meeting",
        "thank you for your visit last week. I would like to meet again on {day} at {hour} to talk about {matter}.",
    ),
    ("your order", "your order of {matter} is ready. Please collect it on {day} after {hour} at the front desk."),
    ("an invitation", "we are glad to invite you to our summer evening on {day} at {hour}. Please bring {matter}."),
    ("a delay", "the delivery of {matter} is late. It will now arrive on {day} at about {hour}. We are sorry."),
)
MATTERS = (
    "the garden plan",
    "two wooden chairs",
    "the new library",
    "a set of lamps",
    "the school concert",
    "garden tools",
)
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def wrap(canvas: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if canvas.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def letter(make: Maker) -> Made:
    rng, face = make.rng, pick_face(make)
    sender, reader = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}", rng.choice(NAMES)
    subject, body = rng.choice(LETTERS)
    day, hour, matter = rng.choice(DAYS), f"{rng.randint(8, 19)}:{rng.choice(['00', '15', '30'])}", rng.choice(MATTERS)
    body = body.format(day=day, hour=hour, matter=matter)
    town, size, width = rng.choice(TOWNS), rng.randint(14, 18), rng.randint(280, 380)
    image = Image.new("RGB", (width, 600), pale(make))
    canvas, font, row = ImageDraw.Draw(image), face(size), size * 1.5
    text = [town, "", f"Dear {reader},", "", *wrap(canvas, body, font, width - 40), "", "Kind regards,", sender]
    for i, line in enumerate(text):
        canvas.text((20, 20 + i * row), line, (24, 24, 44), font)
    question, answer = rng.choice(
        [
            ("Who wrote this letter?", sender),
            ("To whom is the letter addressed?", reader),
            ("Which day does the letter name?", day),
            ("What time is given in the letter?", hour),
            ("What is the letter about?", f"It is about {subject}: it names {matter}, {day} and {hour}."),
            ("Read the body of the letter.", body),
        ]
    )
    return Made(image.crop((0, 0, width, round(40 + len(text) * row))), question, (answer,))


def form(make: Maker) -> Made:
    rng, face = make.rng, pick_face(make)
    name, surname = rng.choice(NAMES), rng.choice(SURNAMES)
    fields = {
        "First name": name,
        "Last name": surname,
        "Town": rng.choice(TOWNS),
        "Phone": f"555-{rng.randint(1000, 9999)}",
        "Age": str(rng.randint(18, 79)),
        "Email": f"{name}.{surname}@example.org".lower(),
        "Member since": str(rng.randint(2005, 2024)),
    }
    shown = rng.sample(list(fields), rng.randint(4, 6))
    box, accepted = rng.choice(["Newsletter", "I agree to the terms", "Send by post"]), rng.random() < 0.5
    size, width = rng.randint(13, 17), rng.randint(320, 440)
    row = size * 2.2
    image = Image.new("RGB", (width, round(row * (len(shown) + 2.6))), pale(make))
    canvas, accent = ImageDraw.Draw(image), rng.choice(list(COLOURS.values()))
    canvas.rectangle((0, 0, width, row), accent)
    title = rng.choice(["Registration form", "Membership application", "Library card", "Order form"])
    canvas.text((12, row / 2), title, ink(accent), face(size * 1.2), "lm")
    for i, field in enumerate(shown):
        y = row * (i + 1.7)
        canvas.text((12, y), f"{field}:", (60, 60, 60), face(size), "lm")
        canvas.rectangle((width * 0.38, y - row * 0.38, width - 10, y + row * 0.38), (255, 255, 255), (130, 130, 130))
        canvas.text((width * 0.38 + 6, y), fields[field], (10, 10, 90), face(size), "lm")
    y = row * (len(shown) + 1.8)
    canvas.rectangle((12, y - 7, 26, y + 7), (255, 255, 255), (60, 60, 60))
    if accepted:
        canvas.line((14, y, 18, y + 5, 25, y - 7), (10, 10, 90), 2)
    canvas.text((34, y), box, (40, 40, 40), face(size), "lm")
    field = rng.choice(shown)
    question, answer = rng.choice(
        3 * [(f"What is entered under '{field}'?", fields[field])]
        + [
            ("What is the title of the form?", title),
            (f"Is the box '{box}' ticked?", "yes" if accepted else "no"),
            ("Which fields does the form have?", f"The form asks for {join(shown)}, and has a box for '{box}'."),
        ]
    )
    return Made(image, question, (answer,))


def table(make: Maker) -> Made:
    rng, face = make.rng, pick_face(make)
    towns, times = rng.sample(TOWNS, rng.randint(3, 6)), []
    for _ in towns:
        times.append(f"{rng.randint(6, 22):02d}:{rng.randint(0, 11) * 5:02d}")
    rows = [
        (town, time, str(platform))
        for town, time, platform in zip(towns, times, rng.sample(range(1, 13), len(towns)), strict=True)
    ]
    head = ("Destination", "Departure", "Platform")
    size = rng.randint(14, 18)
    widths, height = (size * 8, size * 7, size * 6), round(size * 2)
    image = Image.new("RGB", (sum(widths) + 20, height * (len(rows) + 1) + 20), (255, 255, 255))
    canvas, accent = ImageDraw.Draw(image), rng.choice(list(COLOURS.values()))
    for r, cells in enumerate([head, *rows]):
        for c, cell in enumerate(cells):
            x, y = 10 + sum(widths[:c]), 10 + r * height
            fill = accent if r == 0 else (244, 244, 248) if r % 2 else (255, 255, 255)
            canvas.rectangle((x, y, x + widths[c], y + height), fill, (150, 150, 150))
            canvas.text((x + 8, y + height / 2), cell, ink(fill), face(size), "lm")
    town, time, platform = rng.choice(rows)
    question, answer = rng.choice(
        [
            (f"When does the train to {town} leave?", time),
            (f"From which platform does the train to {town} leave?", platform),
            (f"Where does the train from platform {platform} go?", town),
            ("How many destinations are listed?", str(len(rows))),
            (f"Tell me about the train to {town}.", f"The train to {town} leaves at {time} from platform {platform}."),
        ]
    )
    return Made(image, question, (answer,))


SIGNS = (
    "NO PARKING", "EXIT", "ROAD WORK AHEAD", "OPEN DAILY 9 TO 5", "PLEASE KNOCK", "WET FLOOR", "SPEED LIMIT 30",
    "BUS STOP", "FRESH FISH", "KEEP OFF THE GRASS", "NO SWIMMING", "TICKETS HERE", "PUSH", "FIRE DOOR KEEP SHUT",
    "PARKING 2 HOURS",
)  # fmt: skip


def sign(make: Maker) -> Made:
    rng, face = make.rng, pick_face(make)
    text, (name, colour), size = rng.choice(SIGNS), rng.choice(list(COLOURS.items())), rng.randint(22, 40)
    image = Image.new("RGB", (800, 500), SKIES["blue"])
    canvas, font = ImageDraw.Draw(image), face(size)
    lines = wrap(canvas, text, font, size * rng.choice([5, 7, 11]))
    width = round(max(canvas.textlength(line, font) for line in lines)) + 2 * size
    height = round((len(lines) + 1) * size * 1.3)
    canvas.rectangle((20 + width / 2 - 5, 20 + height, 20 + width / 2 + 5, 500), (120, 120, 124))
    canvas.rounded_rectangle((20, 20, 20 + width, 20 + height), 10, colour, ink(colour), 3)
    for i, line in enumerate(lines):
        canvas.text((20 + width / 2, 20 + (i + 1) * size * 1.3), line, ink(colour), font, "mm")
    asked = [
        ("What does the sign say?", text),
        ("Read the text in the image.", text),
        ("What color is the sign?", name),
    ]
    question, answer = rng.choice(asked)
    return Made(image.crop((0, 0, width + 40, height + 70)), question, (answer,))


# ---- charts ----------------------------------------------------------------------------------------------------------

TOPICS = (
    ("Fruit sold", "kilograms", ("Apples", "Pears", "Plums", "Grapes", "Cherries", "Lemons")),
    ("Visitors", "people", ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat")),
    ("Rainfall", "millimetres", ("Jan", "Feb", "Mar", "Apr", "May", "Jun")),
    ("Books read", "books", ("Ana", "Boris", "Carla", "Dev", "Emma", "Finn")),
    ("Energy use", "kilowatt hours", ("Light", "Heat", "Water", "Fridge", "Oven", "Computer")),
)


def chart_questions(make: Maker, title: str, unit: str, data: dict[str, int], kind: str) -> tuple[str, str]:
    ranked, some = sorted(data, key=lambda label: -data[label]), make.rng.choice(list(data))
    top, bottom = ranked[0], ranked[-1]
    return make.rng.choice(
        [
            (f"What is the value for {some}?", str(data[some])),
            ("Which label has the highest value?", top),
            ("Which label has the lowest value?", bottom),
            ("What is the title of the chart?", title),
            (f"How much larger is {top} than {bottom}?", str(data[top] - data[bottom])),
            ("What is the sum of all values?", str(sum(data.values()))),
            (
                "Summarize the chart.",
                f"The {kind} chart '{title}' shows {unit} for {join(list(data))}. {top} is highest with {data[top]}, "
                f"and {bottom} is lowest with {data[bottom]}.",
            ),
        ]
    )


def random_data(make: Maker, low: int, high: int) -> tuple[str, str, dict[str, int]]:
    title, unit, labels = make.rng.choice(TOPICS)
    labels = labels[: make.rng.randint(3, 6)]
    return title, unit, dict(zip(labels, make.rng.sample(range(low, high), len(labels)), strict=True))


def axes(
    make: Maker, title: str, unit: str
) -> tuple[Image.Image, ImageDraw.ImageDraw, Callable[[float], ImageFont.FreeTypeFont]]:
    face = pick_face(make)
    image = Image.new(
        "RGB", (make.rng.randint(320, 460), make.rng.randint(240, 320)), make.rng.choice([(255, 255, 255), pale(make)])
    )
    canvas = ImageDraw.Draw(image)
    canvas.text((image.width / 2, 16), title, (20, 20, 20), face(18), "mm")
    if unit:
        canvas.text((8, 34), unit, (90, 90, 90), face(11), "lm")
    return image, canvas, face


def bar_chart(make: Maker) -> Made:
    title, unit, data = random_data(make, 5, 100)
    image, canvas, face = axes(make, title, unit)
    left, right, top, bottom = 44, image.width - 12, 48, image.height - 30
    for tick in range(0, 101, 20):
        y = bottom - (bottom - top) * tick / 100
        canvas.line((left, y, right, y), (205, 205, 205), 1)
        canvas.text((left - 6, y), str(tick), (60, 60, 60), face(12), "rm")
    pitch, colours = (right - left) / len(data), make.rng.sample(list(COLOURS.values()), 6)
    one = make.rng.random() < 0.5
    for i, (label, value) in enumerate(data.items()):
        x = left + i * pitch
        y = bottom - (bottom - top) * value / 100
        canvas.rectangle((x + pitch * 0.18, y, x + pitch * 0.82, bottom), colours[0 if one else i])
        canvas.text((x + pitch / 2, y - 8), str(value), (30, 30, 30), face(12), "mm")
        canvas.text((x + pitch / 2, bottom + 13), label, (30, 30, 30), face(12), "mm")
    canvas.line((left, top, left, bottom, right, bottom), (30, 30, 30), 2)
    question, answer = chart_questions(make, title, unit, data, "bar")
    return Made(image, question, (answer,))


def sideways_bar_chart(make: Maker) -> Made:
    title, unit, data = random_data(make, 5, 50)
    image, canvas, face = axes(make, title, unit)
    left, right, top, bottom = 84, image.width - 34, 46, image.height - 12
    pitch, colour = (bottom - top) / len(data), make.rng.choice(list(COLOURS.values()))
    for i, (label, value) in enumerate(data.items()):
        y, x = top + i * pitch, left + (right - left) * value / 50
        canvas.rectangle((left, y + pitch * 0.2, x, y + pitch * 0.8), colour)
        canvas.text((left - 6, y + pitch / 2), label, (30, 30, 30), face(12), "rm")
        canvas.text((x + 5, y + pitch / 2), str(value), (30, 30, 30), face(12), "lm")
    canvas.line((left, top, left, bottom), (30, 30, 30), 2)
    question, answer = chart_questions(make, title, unit, data, "bar")
    return Made(image, question, (answer,))


def line_chart(make: Maker) -> Made:
    unit, count, start = (
        make.rng.choice(["tonnes", "degrees", "members"]),
        make.rng.randint(5, 9),
        make.rng.randint(0, 3),
    )
    title = f"{make.rng.choice(TOWNS)}, {make.rng.randint(1995, 2024)}"
    data = dict(zip(MONTHS[start : start + count], make.rng.sample(range(5, 95), count), strict=True))
    image, canvas, face = axes(make, title, unit)
    left, right, top, bottom = 44, image.width - 16, 48, image.height - 30
    for tick in range(0, 101, 25):
        y = bottom - (bottom - top) * tick / 100
        canvas.line((left, y, right, y), (210, 210, 210), 1)
        canvas.text((left - 6, y), str(tick), (60, 60, 60), face(12), "rm")
    points = [
        (left + 12 + (right - left - 24) * i / (count - 1), bottom - (bottom - top) * v / 100)
        for i, v in enumerate(data.values())
    ]
    colour = make.rng.choice(list(COLOURS.values()))
    canvas.line(points, colour, 3)
    for (x, y), (label, value) in zip(points, data.items(), strict=True):
        canvas.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        canvas.text((x, y - 11), str(value), (40, 40, 40), face(11), "mm")
        canvas.text((x, bottom + 13), label, (30, 30, 30), face(12), "mm")
    canvas.line((left, top, left, bottom, right, bottom), (30, 30, 30), 2)
    question, answer = chart_questions(make, title, unit, data, "line")
    if make.rng.random() < 0.3:
        values = list(data.values())
        question, answer = "Is the last value higher than the first?", "yes" if values[-1] > values[0] else "no"
    return Made(image, question, (answer,))


def pie_chart(make: Maker) -> Made:
    title, _, labels = make.rng.choice(TOPICS)
    labels = labels[: make.rng.randint(3, 5)]
    cuts = sorted(make.rng.sample(range(1, 20), len(labels) - 1))
    shares = [5 * (high - low) for low, high in zip([0, *cuts], [*cuts, 20], strict=True)]
    image, canvas, face = axes(make, title, "")
    colours = make.rng.sample(list(COLOURS.items()), len(labels))
    r, angle = (image.height - 60) / 2, -90.0
    cx, cy = 16 + r, 42 + r
    for i, (label, share) in enumerate(zip(labels, shares, strict=True)):
        canvas.pieslice((cx - r, cy - r, cx + r, cy + r), angle, angle + 3.6 * share, colours[i][1], (255, 255, 255))
        angle += 3.6 * share
        y = 60 + 26 * i
        canvas.rectangle((2 * r + 34, y - 7, 2 * r + 48, y + 7), colours[i][1])
        canvas.text((2 * r + 55, y), f"{label} {share}%", (30, 30, 30), face(13), "lm")
    at = make.rng.randrange(len(labels))
    largest = max(range(len(labels)), key=shares.__getitem__)
    asked = [
        (f"What share does {labels[at]} have?", f"{shares[at]}%"),
        (f"What color stands for {labels[at]}?", colours[at][0]),
        ("How many parts does the pie chart have?", str(len(labels))),
        (
            "Describe the chart.",
            f"A pie chart titled '{title}' with {count_words(len(labels), 'part')}: "
            + join([f"{label} {share}%" for label, share in zip(labels, shares, strict=True)])
            + ".",
        ),
    ]
    if shares.count(max(shares)) == 1:
        asked.append(("Which part is the largest?", labels[largest]))
    question, answer = make.rng.choice(asked)
    return Made(image, question, (answer,))


# ---- counting and space ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """Shapes in the cells of a grid: (row, column) -> (colour, shape)."""

    rows: int
    columns: int
    cells: dict[tuple[int, int], tuple[str, str]]

    def count(self, colour: str | None = None, shape: str | None = None) -> int:
        return sum(colour in (None, c) and shape in (None, s) for c, s in self.cells.values())


BOARD_SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")


def random_board(rng: random.Random) -> Board:
    rows, columns = rng.randint(2, 4), rng.randint(3, 6)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    colours, shapes = rng.sample(list(COLOURS), 3), rng.sample(BOARD_SHAPES, 3)
    taken = rng.sample(places, rng.randint(4, min(12, len(places))))
    return Board(rows, columns, {place: (rng.choice(colours), rng.choice(shapes)) for place in sorted(taken)})


def draw_board(make: Maker, board: Board) -> Image.Image:
    cell, ground = (
        make.rng.randint(44, 68),
        make.rng.choice([(250, 250, 250), (230, 230, 236), (28, 28, 34), pale(make)]),
    )
    image = Image.new("RGB", (board.columns * cell, board.rows * cell), ground)
    canvas = ImageDraw.Draw(image)
    for (row, column), (colour, shape) in board.cells.items():
        x, y = (round((k + 0.5) * cell) + make.rng.randint(-4, 4) for k in (column, row))
        draw_shape(canvas, shape, (x, y), round(cell * 0.34), COLOURS[colour], ground, 1)
    return image


def question_about_board(make: Maker) -> Made:
    board = random_board(make.rng)
    colour, shape = make.rng.choice(list(board.cells.values()))
    total = len(board.cells)
    asked = [
        ("How many shapes are there?", NUMBER_WORDS[total]),
        (f"How many {plural(shape)} are there?", NUMBER_WORDS[board.count(shape=shape)]),
        (f"How many {colour} shapes are there?", NUMBER_WORDS[board.count(colour=colour)]),
        (f"How many {colour} {plural(shape)} are there?", NUMBER_WORDS[board.count(colour, shape)]),
        (
            f"Count the {plural(shape)} by color.",
            sentence(
                join(
                    [
                        count_words(board.count(c, shape), f"{c} {shape}")
                        for c in sorted({c for c, s in board.cells.values() if s == shape})
                    ]
                )
            ),
        ),
    ]
    for (row, column), (one, kind) in board.cells.items():
        if board.count(one, kind) > 1:
            continue
        if right := board.cells.get((row, column + 1)):
            asked.append((f"What is directly to the right of the {one} {kind}?", a(" ".join(right))))
        if below := board.cells.get((row + 1, column)):
            asked.append((f"What is directly below the {one} {kind}?", a(" ".join(below))))
    more = [c for c in COLOURS if 0 < board.count(colour=c) != board.count(colour=colour)]
    if more:
        pair = sorted([colour, more[0]], key=lambda c: -board.count(colour=c))
        counts = [board.count(colour=c) for c in pair]
        asked.append(
            (
                f"Are there more {colour} or more {more[0]} shapes?",
                f"There are more {pair[0]} shapes: {NUMBER_WORDS[counts[0]]} against {NUMBER_WORDS[counts[1]]}.",
            )
        )
    question, answer = make.rng.choice(asked)
    return Made(draw_board(make, board), question, (answer,))


def caption_of_board(make: Maker) -> Made:
    board = random_board(make.rng)
    while len(board.cells) > 6:
        board = random_board(make.rng)
    named = [" ".join(cell) for cell in board.cells.values()]
    counted = join([count_words(board.count(shape=s), s) for s in BOARD_SHAPES if board.count(shape=s)])
    wordings = (
        sentence(f"{NUMBER_WORDS[len(named)]} colored shapes: {counted}"),
        f"The image shows {listed(named)}.",
        f"There are {NUMBER_WORDS[len(named)]} shapes on a plain background, "
        f"among them {listed([named[0], named[-1]])}.",
    )
    return Made(draw_board(make, board), "Describe the image.", wordings)


def document_caption(make: Maker) -> Made:
    """A sign with a caption instead of a question."""
    made = sign(make)
    while made.question == "What color is the sign?":
        made = sign(make)
    text = made.answers[0]
    answers = (
        f'A sign that says "{text}".',
        f'A board on a post with the words "{text}".',
        f'The sign reads "{text}".',
    )
    return Made(made.image, "Describe the image in one sentence.", answers)


# ---- the set ---------------------------------------------------------------------------------------------------------

TEXTS = Path(__file__).with_name("texts.jsonl")
"""Text-only questions and answers, one JSON object a line."""

MAKERS: dict[str, tuple[Callable[[Maker], Made], ...]] = {
    "caption": (caption_of_landscape, caption_of_landscape, caption_of_board, document_caption),
    "vqa": (question_about_landscape,),
    "document": (receipt, letter, form, table, sign),
    "chart": (bar_chart, line_chart, pie_chart, sideways_bar_chart),
    "reasoning": (question_about_board,),
}


def counts_for(pairs: int) -> dict[str, int]:
    """How many pairs each task gets; they add up to `pairs`."""
    counts = {task: int(pairs * share) for task, share in SHARES.items()}
    counts["caption"] += pairs - sum(counts.values())
    return counts


def make_pairs(pairs: int, seed: int, fonts: tuple[str | None, ...]) -> list[tuple[str, Made]]:
    """(task, what was made), task after task; a task's makers take turns. No two pictures are equal."""
    made, seen = [], set()
    for task, count in counts_for(pairs).items():
        make = Maker(random.Random(f"{task} {seed}"), fonts)
        kept = 0
        while kept < count:
            one = MAKERS[task][kept % len(MAKERS[task])](make)
            assert one.image is not None
            pixels = (one.image.size, one.image.tobytes())
            if pixels not in seen:
                seen.add(pixels)
                made.append((task, one))
                kept += 1
    return made


def read_texts(texts: int) -> list[Made]:
    """The first `texts` of TEXTS."""
    records = [json.loads(line) for line in TEXTS.read_text(encoding="utf-8").splitlines()]
    assert texts <= len(records), f"{TEXTS} has {len(records)} texts"
    return [Made(None, record["question"], (record["answer"],)) for record in records[:texts]]


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.quantize(PALETTE_COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def fonts_here() -> tuple[str | None, ...]:
    """Pillow's own font and those of FONT_FILES that this machine has."""
    found: list[str | None] = [BUILT_IN]
    for name in FONT_FILES:
        try:
            ImageFont.truetype(name, 12)
        except OSError:
            continue
        found.append(name)
    return tuple(found)


def render(out: Path, *, pairs: int, texts: int, seed: int, fonts: tuple[str | None, ...]) -> SampleSet:
    """Write the set to `out`; `texts` at most as many as TEXTS holds."""
    samples, numbers = [], dict.fromkeys([*SHARES, "text"], 0)
    with tempfile.TemporaryDirectory() as folder:
        everything = [
            *make_pairs(pairs, seed, fonts),
            *(("text", made) for made in read_texts(texts)),
        ]
        for task, made in everything:
            sample_id = f"{task}-{numbers[task]:03d}"
            numbers[task] += 1
            images = ()
            if made.image is not None:
                images = (Path(folder) / f"{sample_id}.png",)
                images[0].write_bytes(png(made.image))
            samples.append(Sample(sample_id, task, made.question, made.answers, images))
        strata = [
            {
                "task": task,
                "asked": number,
                "got": number,
                "with_image": 0 if task == "text" else number,
                "text_only": number if task == "text" else 0,
            }
            for task, number in numbers.items()
        ]
        names = ["Pillow's built-in font (Aileron, CC0)" if name is BUILT_IN else name for name in fonts]
        manifest = {
            "name": out.name,
            "sources": ["drawn and written by calibration/render.py"],
            "licences": {
                "drawn": "Apache-2.0",
                "DejaVu fonts (in the pictures)": "Bitstream-Vera AND LicenseRef-Public-Domain",
            },
            "fonts": names,
            "strata": strata,
            "seed": seed,
        }
        return write_set(out, samples, manifest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--pairs", type=int, default=128, help="pairs with a picture")
    parser.add_argument("--texts", type=int, default=24, help="text-only samples, at most 24")
    parser.add_argument("--seed", type=int, default=7)
    chosen = parser.parse_args()
    made = render(chosen.out, pairs=chosen.pairs, texts=chosen.texts, seed=chosen.seed, fonts=fonts_here())
    print(f"{chosen.out}: {len(made.samples)} samples")


if __name__ == "__main__":
    main()
