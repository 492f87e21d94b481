"""Conversations as data sets have them: OpenAI, TRL, LLaVA, ShareGPT, the_cauldron, SWIFT, Anthropic, Gemini."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vlmquant.calibration.sources.keys import claims_image, is_empty, names_video, role_of
from vlmquant.calibration.sources.spec import UnusableRecordError
from vlmquant.errors import InputError, shown
from vlmquant.reading import parse_json

SPEAKERS = {
    name: role
    for role, names in {
        "user": "user human prompter",
        "assistant": "assistant gpt model bot chatgpt ai",
        "system": "system developer",
        "tool": "tool function observation function_call function_response tool_call tool_response",
    }.items()
    for name in names.split()
}
SPEAKER_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text", "parts", "message")
TEXT_KINDS = ("text", "input_text", "output_text")
IMAGE_KINDS = ("image", "image_url", "input_image")
PLACE_KEYS = (
    *("image", "image_url", "images", "url", "path", "source", "data", "bytes", "base64"),
    *("inlineData", "inline_data", "fileData", "file_data"),
)
"""Keys of a part of a message that may hold its image."""
TEXT_KEYS = ("answer", "raw", "text", "caption", "value", "content", "sentence", "en")
"""Keys of an object that stands for a text."""
MARK = re.compile(
    r"<img>(?P<place>[^<>]{0,500}?)</img>"
    r"|<img>\s*(?:<imagehere>|<img_context>\s*)+\s*</img>"
    r"|<image>(?:\./)?</image>"
    r"|<\|?(?:vision|image|img)_(?:start|bos)\|?>(?:<[^<>]{1,40}>)*?<\|?(?:vision|image|img)_(?:end|eos)\|?>"
    r"|<\|?(?:image|img)[ _-]?(?P<number>\d{1,6})\|?>"
    r"|<\|?(?:image|img)(?:[ _-]?(?:token|pad|placeholder|soft_token|context|here))?\|?>"
    r"|<start_of_image>|\[img\]",
    re.IGNORECASE,
)
"""What stands in a text where an image does; the chat template of a model puts the model's own tokens there."""
MOVING_MARK = re.compile(r"<\|?(?:video|audio)(?:_pad)?\|?>", re.IGNORECASE)


@dataclass
class Chat:
    """A record's exchanges, and what they say about images."""

    system: str | None = None
    turns: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """(question, answers)"""
    open: str | None = None
    """A last question without an answer."""
    marks: int = 0
    """Of images, in the first question, that have no number."""
    numbers: frozenset[int] = frozenset()
    """Of images that marks in the first question name."""
    slots: list[int | None] = field(default_factory=list)
    """Parts that stand for an image which the record holds elsewhere, with its number there if it is given."""
    places: list[Any] = field(default_factory=list)
    """Values that stand for an image themselves."""

    @property
    def images(self) -> int:
        """How many it says there are."""
        return max(self.marks + len(self.numbers), len(self.slots) + len(self.places))


def text_of(value: Any) -> str | None:
    """A text, number or truth value as text; the text in an object such as {"answer": text}."""
    value = _said(value)
    if is_empty(value) or not isinstance(value, str | int | float):
        return None
    return str(value).strip()


def texts_of(value: Any) -> tuple[str, ...]:
    """The texts in a value: one, or a list of such."""
    value = _said(value)
    values = value if isinstance(value, list | tuple) else [value]
    flat = [item for entry in values for item in (entry if isinstance(entry, list | tuple) else [entry])]
    return tuple(text for text in map(text_of, flat) if text)


def _said(value: Any) -> Any:
    """What an object that stands for a text says; any other value as it is."""
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in TEXT_KEYS if not is_empty(value.get(key))), None)


def json_inside(value: Any) -> Any:
    """What a table's cell holds as JSON text, a list or an object; else the value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            inner = parse_json(value, where="")
        except InputError:
            return value
        return inner if isinstance(inner, list | dict) else value
    return value


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages or turns."""
    return isinstance(value, list | tuple) and not is_empty(value) and all(isinstance(item, dict) for item in value)


@dataclass(frozen=True)
class Marked:
    """A text without its image marks, and what they were."""

    text: str
    marks: int
    """Without a number."""
    numbers: frozenset[int]
    places: tuple[str, ...]
    """That marks name."""


def read_marks(text: str) -> Marked:
    """Take the marks of images out of a text."""
    if "<" not in text and "[" not in text:
        return Marked(text.strip(), 0, frozenset(), ())
    if MOVING_MARK.search(text):
        raise UnusableRecordError("with a video or sound, which is not read")
    found = list(MARK.finditer(text))
    numbers = frozenset(int(match["number"]) for match in found if match["number"])
    places = tuple(match["place"].strip() for match in found if match["place"] and match["place"].strip())
    return Marked(MARK.sub("", text).strip(), sum(not match["number"] for match in found), numbers, places)


def read_chat(messages: Any) -> Chat:
    """A list of messages or turns as a Chat. UnusableRecordError says what in it cannot be used."""
    chat = Chat()
    messages = json_inside(messages)
    if not isinstance(messages, list | tuple):
        raise UnusableRecordError(f"with a conversation that is no list of messages: {shown(type(messages).__name__)}")
    for speaker, content in _messages(messages):
        add(chat, speaker, content)
    return chat


def add(chat: Chat, speaker: str, content: Any) -> None:
    """The next message of a chat, of "user", "assistant" or "system"."""
    marked, slots, places = _content(content)
    if marked.marks or slots or places or not marked.numbers <= chat.numbers:
        if speaker != "user":
            raise UnusableRecordError(f"with an image in a message of role '{speaker}'")
        if chat.turns:
            raise UnusableRecordError("with an image after its first question")
    chat.marks += marked.marks
    chat.numbers |= marked.numbers
    chat.slots += slots
    chat.places += places
    text = marked.text
    if speaker == "system":
        chat.system = text if chat.system is None else f"{chat.system}\n{text}"
    elif speaker == "user":
        chat.open = text if chat.open is None else f"{chat.open}\n{text}"
    elif chat.open is None:
        raise UnusableRecordError("with a message of role 'assistant' out of place")
    elif not text:
        raise UnusableRecordError("with an empty answer")
    else:
        chat.turns.append((chat.open, (text,)))
        chat.open = None


def close(chat: Chat, answers: tuple[str, ...]) -> None:
    """Answer the open question of a chat, in one or more ways."""
    first, *others = answers
    add(chat, "assistant", first)
    question, texts = chat.turns.pop()
    chat.turns.append((question, (*texts, *filter(None, (read_marks(text).text for text in others)))))


def _messages(items: list[Any] | tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """(speaker, content) of messages of any shape."""
    for item in items:
        if isinstance(item, list | tuple) and len(item) == 2:
            yield from zip(("user", "assistant"), item, strict=True)
            continue
        if not isinstance(item, dict):
            raise UnusableRecordError(f"with a message that is no object: {shown(type(item).__name__)}")
        pictures, films = _shown_by(tuple(item))
        if not all(is_empty(item[key]) for key in films):
            raise UnusableRecordError("with a video or sound, which is not read")
        images = [{"type": "image", "image": item[key]} for key in pictures if not is_empty(item[key])]
        name = next((item[key] for key in SPEAKER_KEYS if not is_empty(item.get(key))), None)
        if name is None:
            question, answer = _turn(item)
            yield "user", _beside(images, question)
            yield "assistant", answer
            continue
        speaker = SPEAKERS.get(name.strip().lower()) if isinstance(name, str) else None
        if speaker is None:
            raise UnusableRecordError(f"with a message of an unknown role: {shown(name, limit=40)}")
        if speaker == "tool" or not is_empty(item.get("tool_calls")) or not is_empty(item.get("function_call")):
            raise UnusableRecordError("with a tool call, which is not read")
        content = next((item[key] for key in CONTENT_KEYS if not is_empty(item.get(key))), None)
        yield speaker, _beside(images, content)


def _beside(images: list[dict[str, Any]], content: Any) -> Any:
    """The content of a message with the images that stand under keys of their own."""
    if not images:
        return content
    return [*images, *(content if isinstance(content, list | tuple) else [content])]


@lru_cache(maxsize=1000)
def _shown_by(keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of a message that name images, and those that name videos or sounds."""
    return tuple(filter(claims_image, keys)), tuple(filter(names_video, keys))


def _turn(item: Mapping[str, Any]) -> tuple[Any, Any]:
    """Question and answer of one exchange in an object: {"user", "assistant"} or {"question", "answer"}."""
    by_role = {role_of(key): value for key, value in reversed(list(item.items())) if not is_empty(value)}
    if "question" not in by_role or "answer" not in by_role:
        raise UnusableRecordError(
            f"with a message without a role: its keys are {', '.join(shown(key, limit=30) for key in list(item)[:8])}"
        )
    return by_role["question"], by_role["answer"]


def _content(content: Any) -> tuple[Marked, list[int | None], list[Any]]:
    """Text, slots and places of a message's content: text, or parts."""
    content = json_inside(content) if isinstance(content, str) and '"type"' in content else content
    texts: list[str] = []
    slots: list[int | None] = []
    places: list[Any] = []
    for part in content if isinstance(content, list | tuple) else [content]:
        if part is None:
            continue
        if not isinstance(part, dict):
            if (text := text_of(part)) is None and not is_empty(part):
                raise UnusableRecordError(f"with a message that is no text: {shown(type(part).__name__)}")
            texts.append(text or "")
            continue
        kind = part.get("type")
        if kind in TEXT_KINDS:
            texts.append(text_of(part) or "")
            places += [part[key] for key in PLACE_KEYS[:3] if not is_empty(part.get(key))]
            continue
        place = next((part[key] for key in PLACE_KEYS if not is_empty(part.get(key))), None)
        text = text_of(part.get("text"))
        if kind not in IMAGE_KINDS and not (is_empty(kind) and (text or place is not None)):
            raise UnusableRecordError(f"with a part of a message that is no text or image: {shown(kind, limit=40)}")
        if text and is_empty(kind):
            texts.append(text)
        if place is not None:
            places.append(place)
        elif kind in IMAGE_KINDS:
            index = part.get("index")
            slots.append(index if isinstance(index, int) and not isinstance(index, bool) else None)
    marked = read_marks("\n".join(texts))
    return marked, slots, [*places, *marked.places]
