"""The default calibration set, and calibration/render.py that draws it."""

import importlib.util
import random
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from vlmquant.calibration.sets import load_set
from vlmquant.demo import scenes

CALIBRATION = Path(__file__).parents[1] / "calibration"
PAIRS = 128
BYTES_LIMIT = 4_000_000
NEAR = 12  # largest difference in a colour channel by which a pixel still has a colour


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", CALIBRATION / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["render"] = module
    spec.loader.exec_module(module)
    return module


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def written(render: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are written on pictures, in order."""
    texts: list[str] = []
    text = render.ImageDraw.ImageDraw.text

    def note(canvas: object, where: object, what: str, *rest: object) -> None:
        texts.append(what)
        text(canvas, where, what, *rest)

    monkeypatch.setattr(render.ImageDraw.ImageDraw, "text", note)
    return texts


def blobs(image: Image.Image, colour: tuple[int, int, int]) -> int:
    """Connected patches of a colour that are larger than anti-aliasing leaves behind."""
    close = (np.abs(np.asarray(image.convert("RGB")).astype(int) - colour).max(-1) <= NEAR).tolist()
    height, width, found = len(close), len(close[0]), 0
    for start in ((y, x) for y in range(height) for x in range(width)):
        stack, size = [start], 0
        while stack:
            y, x = stack.pop()
            if 0 <= y < height and 0 <= x < width and close[y][x]:
                close[y][x] = False
                size += 1
                stack += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        found += size >= 30
    return found


def test_the_default_set_is_whole_and_small() -> None:
    samples = load_set(CALIBRATION / "default").samples  # checks every hash
    tasks = Counter(sample.task for sample in samples)
    assert set(tasks) == {"caption", "vqa", "document", "chart", "reasoning", "text"}
    assert sum(count for task, count in tasks.items() if task != "text") == PAIRS
    assert min(tasks.values()) >= 16
    assert all(len(sample.images) == (sample.task != "text") for sample in samples)
    assert len({path for sample in samples for path in sample.images}) == PAIRS
    files = [path for path in (CALIBRATION / "default").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= BYTES_LIMIT


def test_the_manifest_counts_what_is_there() -> None:
    default = load_set(CALIBRATION / "default")
    assert default.manifest is not None
    tasks = Counter(sample.task for sample in default.samples)
    assert {row["task"]: row["got"] for row in default.manifest["strata"]} == tasks
    assert all(row["with_image"] + row["text_only"] == row["got"] for row in default.manifest["strata"])


def test_pictures_answers_and_captions_vary() -> None:
    samples = load_set(CALIBRATION / "default").samples
    sizes = {size_of(sample.images[0]) for sample in samples if sample.images}
    assert len(sizes) > PAIRS // 2
    lengths = [len(answer.split()) for sample in samples for answer in sample.answers]
    assert min(lengths) == 1
    assert max(lengths) >= 30
    captions = [sample.answers for sample in samples if sample.task == "caption"]
    assert all(len(set(answers)) == len(answers) >= 3 for answers in captions)


def test_equal_seeds_draw_equal_sets(render: ModuleType, tmp_path: Path) -> None:
    def drawn(name: str, seed: int) -> dict[str, bytes]:
        out = tmp_path / name
        render.render(out, pairs=24, texts=2, seed=seed, fonts=(render.BUILT_IN,))
        return {
            str(path.relative_to(out)): path.read_bytes()
            for path in out.rglob("*")
            if path.is_file() and path.name != "manifest.yaml"  # it holds the folder's name
        }

    first = drawn("first", 3)
    assert drawn("second", 3) == first
    assert drawn("third", 4) != first


@pytest.mark.parametrize("pairs", [1, 7, 24, 128])
def test_counts_add_up(render: ModuleType, pairs: int) -> None:
    assert sum(render.counts_for(pairs).values()) == pairs


def test_counted_shapes_are_in_the_picture(render: ModuleType) -> None:
    for seed in range(8):
        make = render.Maker(random.Random(seed), (render.BUILT_IN,))
        board = render.random_board(make.rng)
        image = render.draw_board(make, board)
        for colour, rgb in scenes.COLOURS.items():
            assert blobs(image, rgb) == board.count(colour=colour), (seed, colour)


def test_the_total_of_a_receipt_is_the_sum_of_its_lines(render: ModuleType, written: list[str]) -> None:
    checked = 0
    for seed in range(30):
        written.clear()
        made = render.receipt(render.Maker(random.Random(seed), (render.BUILT_IN,)))
        if "total" not in made.question:
            continue
        amounts = [round(100 * float(what[1:])) for what in written if what[0] in "$€£"]
        assert sum(amounts[:-1]) == amounts[-1]
        assert made.answers == (written[written.index("TOTAL") + 1],)
        checked += 1
    assert checked


def test_answers_about_charts_follow_from_the_written_numbers(render: ModuleType, written: list[str]) -> None:
    checked = set()
    for seed in range(60):
        written.clear()
        made = render.sideways_bar_chart(render.Maker(random.Random(seed), (render.BUILT_IN,)))
        labels, values = written[2::2], [int(what) for what in written[3::2]]  # after the title and the unit
        expected = {
            "Which label has the highest value?": labels[values.index(max(values))],
            "Which label has the lowest value?": labels[values.index(min(values))],
            "What is the sum of all values?": str(sum(values)),
        }
        if made.question in expected:
            assert made.answers == (expected[made.question],)
            checked.add(made.question)
    assert len(checked) == 3


def test_demo_bars_are_ranked_by_their_height_in_the_picture() -> None:
    for seed in range(10):
        scene = scenes.random_bars(random.Random(seed))
        pixels = np.asarray(scenes.draw(scene)).astype(int)
        heights = {
            colour: int((np.abs(pixels - scenes.COLOURS[colour]).max(-1) <= NEAR).any(1).sum())
            for colour, _ in scene.bars
        }
        answers = {question.text: question.answer for question in scenes.questions(scene)}
        assert answers["Which bar is the tallest?"] == max(heights, key=heights.__getitem__)
        assert answers["Which bar is the shortest?"] == min(heights, key=heights.__getitem__)


def test_demo_questions_have_one_answer_each() -> None:
    for seed in range(50):
        scene = scenes.random_scene(random.Random(seed))
        asked: dict[str, str] = {}
        for question in scenes.questions(scene):
            assert asked.setdefault(question.text, question.answer) == question.answer


def test_demo_relations_agree_with_where_things_are_drawn() -> None:
    centre = scenes.Thing.centre.fget
    assert centre is not None
    directions = {"above": (1, -1), "below": (1, 1), "to the left of": (0, -1), "to the right of": (0, 1)}
    for seed in range(50):
        things = scenes.random_objects(random.Random(seed)).things
        for one in things:
            for two in things:
                for relation in scenes.relations(one, two) if one != two else []:
                    axis, side = directions[relation]
                    assert (centre(one)[axis] - centre(two)[axis]) * side > 0
