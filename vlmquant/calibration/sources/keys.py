"""What the name of a key or column says about its content."""

import math
import re
from functools import lru_cache
from typing import Any

NAMES: dict[str, tuple[str, ...]] = {
    role: tuple(names.split())
    for role, names in {
        "conversation": (
            "messages conversations conversation contents dialog dialogue chat chats turns texts qa qas qapairs"
        ),
        "question": "question questions questiontext prompt instruction query problem user human input prefix",
        "answer": (
            "answers answer answertext response responses output solution multiplechoiceanswer directanswers label "
            "labels target completion chosen groundtruth gt reply assistant gpt suffix"
        ),
        "caption": (
            "captions caption text txt texts sentences sentence description descriptions alttext comment report"
        ),
        "choices": "choices options",
        "history": "history",
        "system": "system systemprompt systemmessage",
        "id": "id questionid sampleid uid uuid qid key index",
        "task": "task",
    }.items()
}
"""By role, as `plain` has them; the first that a record fills counts."""

_IMAGE = r"(?:images?|imgs?|pictures?|pics?|photos?|photographs?|pixels?|screenshots?|jpe?g|png|webp|figures?|visuals?)"
_FORM = (
    r"(?:paths?|filenames?|filepaths?|files?|names?|fnames?|fn|urls?|uris?|links?|bytes|base64|b64|data|values?|list|"
    r"strings?|str|src|binary|local|input|raw|encoded|decoded|query|main|original|full|rgb)"
)
CLAIM = re.compile(rf"\d*(?:pathto|{_FORM})*(?P<image>{_IMAGE})\d*{_FORM}*(?:\d*|[a-d])")
"""Names of what is an image: image, img_path, imageUrl, picture2, local_image, jpg; not image_id, image_width."""
MENTION = re.compile(r"(?<![a-z])(?:image(?!net|ry)|img|picture|photo(?!n)|pixel|screenshot|media(?!n|t))")
"""In the names of what has to do with an image: image_id, coco_img."""
FILE = re.compile(rf"(?:{_FORM}|media|\d)+")
"""Names of a file of some kind."""
MOVING = re.compile(rf"(?:{_FORM})*(?:videos?|audios?|clips?){_FORM}*\d*")


@lru_cache(maxsize=10_000)
def plain(key: str) -> str:
    """A name as it is compared: image_path, imagePath and "Image Path" are the same."""
    return "".join(character for character in key.lower() if character.isalnum())


@lru_cache(maxsize=10_000)
def claims_image(key: str) -> bool:
    """Whether a name says that its value is an image."""
    return CLAIM.fullmatch(plain(key)) is not None


@lru_cache(maxsize=10_000)
def mentions_image(key: str) -> bool:
    """Whether a name says that there is an image."""
    return claims_image(key) or MENTION.search(re.sub(r"([a-z\d])([A-Z])", r"\1_\2", key).lower()) is not None


@lru_cache(maxsize=10_000)
def names_file(key: str) -> bool:
    """Whether a name says that its value is a file of some kind."""
    return FILE.fullmatch(plain(key)) is not None


@lru_cache(maxsize=10_000)
def names_video(key: str) -> bool:
    """Whether a name says that its value is a video or a sound."""
    return MOVING.fullmatch(plain(key)) is not None


@lru_cache(maxsize=10_000)
def image_word(key: str) -> str:
    """What a name has in common with those of other forms of the same image: image of image_path and img_url."""
    if match := CLAIM.fullmatch(plain(key)):
        return match["image"].rstrip("s").replace("img", "image")
    return "file" if names_file(key) else plain(key)


@lru_cache(maxsize=10_000)
def family(key: str) -> tuple[str, int]:
    """image_0, image_1 and so on are one family, and so are image_a, image_b: (its name, number in it)."""
    lower = key.lower()
    if letter := re.fullmatch(r"(.*[_\- ])([a-d])", lower, re.DOTALL):
        return letter[1].strip("_- "), ord(letter[2])
    number = re.search(r"\d{1,9}", lower)
    return re.sub(r"[_\- .]*\d{1,9}[_\- .]*", "", lower), int(number[0]) if number else -1


def role_of(key: str) -> str | None:
    """The role of text that a name stands for."""
    return ROLE_OF.get(plain(key))


ROLE_OF = {name: role for role, names in reversed(NAMES.items()) for name in names}


def is_empty(value: Any) -> bool:
    """Whether a value holds nothing, as absent fields of tables do: null, blank text, NaN, lists and objects of it."""
    if value is None:
        return True
    if isinstance(value, (str, bytes)):
        return not value or value.isspace()
    if isinstance(value, (list, tuple)):
        return all(map(is_empty, value))
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return isinstance(value, float) and math.isnan(value)
