"""Records of any layout -> candidates, by rules on their keys and their content."""

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from vlmquant.calibration.samples import Sample, Turn
from vlmquant.calibration.sources.chats import (
    Chat,
    add,
    close,
    is_chat,
    json_inside,
    read_chat,
    read_marks,
    text_of,
    texts_of,
)
from vlmquant.calibration.sources.keys import (
    NAMES,
    claims_image,
    family,
    image_word,
    is_empty,
    mentions_image,
    names_file,
    names_video,
    plain,
    role_of,
)
from vlmquant.calibration.sources.places import Resolver, hides_image, is_embedded, leaves, shows_image
from vlmquant.calibration.sources.spec import (
    Candidate,
    ImageSource,
    NetworkImageError,
    Record,
    SourceSpec,
    UnusableRecordError,
)
from vlmquant.errors import shown

CAPTION_QUESTION = "Describe the image in one sentence."
"""Asked of an image that comes with captions and no question."""
CHOICE_REQUEST = "Answer with the option's letter from the given choices directly."
"""Follows the choices of a question; as in LLaVA's training data."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NAME_CHARACTERS = 100
"""Of a record's own id or task."""
NONE = (False, 0, "0", "false", "False", "no")
"""Values of a key such as has_image or num_images that say there is none."""


@dataclass(frozen=True)
class _Group:
    """Keys that hold images together (one, or image_0, image_1 and so on), and what is there."""

    keys: tuple[str, ...]
    images: tuple[ImageSource, ...]
    error: UnusableRecordError | None
    claimed: int


class RecordReader:
    """The records of one source -> candidates; notes which keys were read as what.

    defaults: roles of the keys that a format fixes; the source's own `map` goes before them.
    """

    def __init__(self, spec: SourceSpec, defaults: Mapping[str, str]) -> None:
        self._spec, self._map = spec, {**defaults, **spec.map}
        self._resolver = Resolver(allow_outside=spec.allow_outside)
        self._read_as: dict[str, dict[str, None]] = {}
        self._seen: dict[str, None] = {}
        self.images = 0
        """That the records say they have."""

    @property
    def read_as(self) -> dict[str, tuple[str, ...]]:
        """Role -> the keys it was read from."""
        return {role: tuple(keys) for role, keys in self._read_as.items()}

    @property
    def keys(self) -> list[str]:
        """All that the records have."""
        return list(self._seen)

    @property
    def unused(self) -> tuple[str, ...]:
        """Keys that nothing was read from."""
        used = {key for keys in self._read_as.values() for key in keys}
        used |= {key.partition(".")[0] for key in used}
        return tuple(key for key in self._seen if key not in used)

    def candidate(self, record: Record) -> Candidate:
        """UnusableRecordError says why a record makes no sample."""
        fields = record.fields
        self._seen |= dict.fromkeys(fields)
        groups = self._groups(record)
        claimed = groups[0].claimed if groups else 0
        try:
            chat, captioned = self._chat(fields)
            claimed = max(claimed, chat.images)
            images = self._images(record, chat, groups)
        finally:
            self.images += claimed
        *earlier, (question, answers) = chat.turns
        if not images and (captioned or not (question or earlier)):
            raise UnusableRecordError("without a question or an image")
        texts = [text for question, answers in chat.turns for text in (question, *answers)]
        sample_id = self._id(record, [*([chat.system] if chat.system else []), *texts, *map(_key, images)])
        task = next((value for _, value in self._values("task", fields) if isinstance(value, str)), None)
        default = "caption" if captioned else "vqa" if images else "text"
        return Candidate(
            Sample(
                sample_id,
                shown(task.strip(), limit=NAME_CHARACTERS) if task else default,
                question,
                answers,
                history=tuple(Turn(question, answers[0]) for question, answers in earlier),
                system=chat.system,
            ),
            images,
            record.where,
        )

    # Texts

    def _values(self, role: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(key, value) of the keys that a record fills for a role, the first choice first."""
        if role in self._map:
            keys = [self._map[role]] if self._map[role] else []
        else:
            names = _by_name(tuple(fields))
            keys = [names[name] for name in NAMES[role] if name in names]
        for key in keys:
            if not is_empty(value := _at(fields, key)):
                yield key, value

    def _texts(self, role: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts of a role, from the first key that holds any."""
        return self._keyed_texts(role, fields)[1]

    def _keyed_texts(self, role: str, fields: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
        odd: str | None = None
        for key, value in self._values(role, fields):
            if texts := texts_of(value):
                self._note(role, key)
                return key, texts
            if not _shows_image(key, value):
                odd = f"with a key for a text that holds none: '{shown(key)}' is a {type(value).__name__}"
        if odd is not None and role in ("question", "answer"):
            raise UnusableRecordError(odd)
        return "", ()

    def _note(self, role: str, *keys: str) -> None:
        self._read_as.setdefault(role, {}).update(dict.fromkeys(keys))

    def _chat(self, fields: Mapping[str, Any]) -> tuple[Chat, bool]:
        """A record's exchanges, and whether they are no more than captions."""
        messages = self._messages(fields)
        chat, captioned = (self._exchange(fields), False) if messages is None else (read_chat(messages), False)
        if chat is None:
            chat, captioned = self._captions(fields), True
        if chat.system is None and (system := self._texts("system", fields)):
            chat.system = system[0]
        if chat.open is not None and messages is not None and (answers := self._texts("answer", fields)):
            close(chat, answers)
        if not chat.turns:
            raise UnusableRecordError("without an answer or caption")
        return chat, captioned

    def _messages(self, fields: Mapping[str, Any]) -> Any:
        """The messages of a record that is a conversation, as one list or as prompt and completion."""
        if "conversation" in self._map or not {"question", "answer", "caption"} & self._map.keys():
            for key, value in self._values("conversation", fields):
                value = json_inside(value)
                if "conversation" in self._map or is_chat(value) or _is_pairs(value):
                    self._note("conversation", key)
                    return value
        for key, value in self._values("question", fields):
            if is_chat(prompt := json_inside(value)):
                self._note("question", key)
                for other, completion in self._values("answer", fields):
                    if is_chat(completion := json_inside(completion)):
                        self._note("answer", other)
                        return [*prompt, *completion]
                return prompt
        return None

    def _exchange(self, fields: Mapping[str, Any]) -> Chat | None:
        """Question and answer, or several of both; None where there is no question."""
        asked_by, questions = self._keyed_texts("question", fields)
        if not questions:
            return None
        chat = Chat()
        for key, value in self._values("history", fields):
            if _is_pairs(value := json_inside(value)):
                self._note("history", key)
                chat = read_chat(value)
        if plain(asked_by) == "instruction" and (more := text_of(fields.get("input"))):  # what it is to be followed on
            questions = (f"{questions[0]}\n{more}", *questions[1:])
            self._note("question", "input")
        answers = self._texts("answer", fields) or self._texts("caption", fields)
        if not answers:
            raise UnusableRecordError("without an answer or caption")
        if len(questions) == 1:
            question, answers = self._with_choices(fields, questions[0], answers)
            add(chat, "user", question)
            close(chat, answers)
        elif len(questions) == len(answers):
            for question, answer in zip(questions, answers, strict=True):
                add(chat, "user", question)
                close(chat, (answer,))
        else:
            raise UnusableRecordError(
                f"with questions and answers that do not pair: {len(questions)} questions, {len(answers)} answers"
            )
        return chat

    def _captions(self, fields: Mapping[str, Any]) -> Chat:
        """Captions of an image; a number is none, but a class."""
        captions = self._texts("caption", fields)
        if not captions:
            for key, value in self._values("answer", fields):
                captions = tuple(text for text in texts_of(value) if not _is_number(text))
                if captions:
                    self._note("answer", key)
                    break
        marked = [read_marks(caption) for caption in captions]
        captions = tuple(caption.text for caption in marked if caption.text)
        if not captions:
            raise UnusableRecordError("without an answer or caption")
        chat = Chat(turns=[(CAPTION_QUESTION, captions)])
        chat.marks = max(caption.marks + len(caption.numbers) for caption in marked)
        return chat

    def _with_choices(
        self, fields: Mapping[str, Any], question: str, answers: tuple[str, ...]
    ) -> tuple[str, tuple[str, ...]]:
        """A multiple-choice question with its choices, and the letter of the right one."""
        key, choices = self._choices(fields)
        if not 2 <= len(choices) <= len(LETTERS):
            return question, answers
        answer = answers[0]
        letter = answer.strip("()[]. ").upper()
        if answer in choices:
            letter = LETTERS[choices.index(answer)]
        elif answer.isdecimal() and len(answer) < 3 and int(answer) < len(choices):
            letter = LETTERS[int(answer)]
        elif len(letter) > 1 and not letter.isdecimal():  # in words of its own: an open question
            return question, answers
        elif letter not in LETTERS[: len(choices)]:
            raise UnusableRecordError(f"with an answer that is none of its choices: {shown(answer, limit=60)}")
        self._note("choices", *key)
        if not all(choice in question for choice in choices):
            lines = [f"{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=False)]
            question = "\n".join([question, *lines, CHOICE_REQUEST])
        return question, (letter,)

    def _choices(self, fields: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Keys and texts of the choices: a list (also as text), or columns A, B, C and so on."""
        for key, value in self._values("choices", fields):
            if isinstance(value, str):
                value = _literal(value)
            if isinstance(value, list | tuple | dict):
                return (key,), texts_of(value)
        columns = [name for name in LETTERS if name in fields and not is_empty(fields[name])]
        if "".join(columns) != LETTERS[: len(columns)]:
            return (), ()
        return tuple(columns), tuple(text for name in columns if (text := text_of(fields[name])))

    def _id(self, record: Record, texts: list[str]) -> str:
        """The record's own id, else one made of its content, so that it stays the same when the source grows."""
        if record.id is not None:
            return record.id
        stem = Path(self._spec.path).stem or "sample"
        for key, value in self._values("id", record.fields):
            if isinstance(value, str | int) and not isinstance(value, bool):
                self._note("id", key)
                return f"{stem}-{shown(value, limit=NAME_CHARACTERS)}"
        return f"{stem}-{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"

    # Images

    def _images(self, record: Record, chat: Chat, groups: list[_Group]) -> tuple[ImageSource, ...]:
        """The images of a record, all that it says it has. UnusableRecordError where that is not so."""
        images = self._chosen(groups)
        inline = self._resolved(record, lambda fields: self._chat(fields)[0].places) if chat.places else ()
        if images and inline and not {*map(_key, inline)} <= {*map(_key, images)}:
            raise UnusableRecordError("with images both in its messages and under a key of its own")
        images = images or inline
        if "image" not in self._map:
            _refuse_lost(record.fields, images)
        if chat.images > len(images):
            raise UnusableRecordError(
                f"with an image that is not there: its text marks {chat.images} and there are {len(images)}"
            )
        order = [slot for slot in chat.slots if slot is not None]
        if order and sorted(order) == list(range(len(images))):
            return tuple(images[index] for index in order)
        if order and not set(order) <= set(range(len(images))):
            raise UnusableRecordError(f"with an image that is not there: number {max(order, key=abs)} of {len(images)}")
        return images

    def _groups(self, record: Record) -> list[_Group]:
        """What holds images, by names of keys or else by content; the first is what the record says it has."""
        fields = record.fields
        if "image" in self._map:
            keys = tuple(key for key in self._map["image"].split("+") if key)
            return [self._group(record, keys)] if keys else []
        filled = [key for key, value in fields.items() if not is_empty(value)]
        named = [key for key in filled if claims_image(key)]
        other = [key for key in filled if not claims_image(key) and _shows_image(key, fields[key])]
        first = named or [key for key in other if names_file(key)] or other
        groups = [self._group(record, keys) for keys in _families(first)]
        groups.sort(key=lambda group: group.error is not None)
        rest = [self._group(record, (key,)) for key in other if key not in first]
        return groups + [group for group in rest if group.error is None and not groups[0].error]

    def _group(self, record: Record, keys: tuple[str, ...]) -> _Group:
        def values(fields: Mapping[str, Any]) -> list[Any]:
            return [_at(fields, key) for key in keys]

        claimed = 1
        try:
            claimed = sum(1 for _ in leaves(values(record.fields)))
            return _Group(keys, self._resolved(record, values), None, claimed)
        except UnusableRecordError as error:
            return _Group(keys, (), error, claimed)

    def _resolved(
        self, record: Record, values: Callable[[Mapping[str, Any]], Sequence[Any]]
    ) -> tuple[ImageSource, ...]:
        """The images in some values of a record; `values` finds them again in the record when it is read anew."""
        fields = record.fields
        again = record.again or (lambda: fields)
        folder = record.folder if self._spec.images is None else Path(self._spec.images)

        def read(index: int) -> Any:
            return next(islice(leaves(values(again())), index, None))

        return tuple(
            self._resolver.image(leaf, folder, partial(read, index))
            for index, leaf in enumerate(leaves(values(fields)))
        )

    def _chosen(self, groups: list[_Group]) -> tuple[ImageSource, ...]:
        """The images of the one group that is meant."""
        if not groups:
            return ()
        chosen = groups[0]
        self._note("image", *chosen.keys)
        for group in groups:
            if group.error is not None and not (chosen.error is None and _is_excused(group, chosen)):
                raise group.error
            if group.error is not None or _is_same(group, chosen):
                continue
            if not _is_same(chosen, group):
                one, other = ("+".join(shown(key, limit=60) for key in keys) for keys in (chosen.keys, group.keys))
                raise UnusableRecordError(
                    f"with images under more than one key: {one} and {other}; name the one that is meant, "
                    f"--map image={one}, or both, --map image={one}+{other}"
                )
            chosen = group
            self._note("image", *chosen.keys)
        return chosen.images


@lru_cache(maxsize=1000)
def _by_name(keys: tuple[str, ...]) -> Mapping[str, str]:
    """Names as they are compared -> the keys of a record, the first of several."""
    return {plain(key): key for key in reversed(keys)}


def _at(fields: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or of a dotted path into nested objects."""
    if key in fields:
        return fields[key]
    value: Any = fields
    for step in key.split("."):
        if isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value := json_inside(value), dict):
            value = value.get(step)
        else:
            return None
    return value


def _shows_image(key: str, value: Any) -> bool:
    """Whether the content of a key that does not name an image is one all the same; texts may talk of image files."""
    if is_chat(value):
        return False
    try:
        return shows_image(value) and (role_of(key) is None or all(map(is_embedded, leaves(value))))
    except UnusableRecordError:
        return False


def _families(keys: Sequence[str]) -> list[tuple[str, ...]]:
    """image_0, image_1 and so on belong together, in this order."""
    families: dict[str, list[str]] = {}
    for key in keys:
        families.setdefault(family(key)[0], []).append(key)
    return [tuple(sorted(members, key=lambda key: family(key)[1])) for members in families.values()]


def _is_same(group: _Group, other: _Group) -> bool:
    """Whether a group shows nothing but images of another, or the same in another form (image and image_path)."""
    if {*map(_identity, group.images)} <= {*map(_identity, other.images)}:
        return True
    one_form = {isinstance(image, Path) for image in (*group.images, *other.images)} == {True, False}
    same_word = image_word(group.keys[0]) == image_word(other.keys[0])
    return one_form and same_word and len(group.images) == len(other.images)


def _is_excused(group: _Group, chosen: _Group) -> bool:
    """Whether a group that cannot be read is no loss: an address of the chosen image, or another form of it."""
    return isinstance(group.error, NetworkImageError) or image_word(group.keys[0]) == image_word(chosen.keys[0])


def _refuse_lost(fields: Mapping[str, Any], images: tuple[ImageSource, ...]) -> None:
    """Refuse a record that shows what is not read, or says that it has an image and has none."""
    for key, value in fields.items():
        if is_empty(value) or value in NONE:
            continue
        if names_video(key):
            raise UnusableRecordError("with a video or sound, which is not read")
        if images:
            continue
        if mentions_image(key) or (role_of(key) is None and isinstance(value, dict | list) and hides_image(value)):
            raise UnusableRecordError(
                f"with an image that is not there: nothing under '{shown(key, limit=60)}' can be read as one; name "
                "what holds it with --map image=KEY, or --map image= for none"
            )


def _identity(image: ImageSource) -> str:
    return str(image) if isinstance(image, Path) else image.key


def _key(image: ImageSource) -> str:
    return image.name if isinstance(image, Path) else image.key


def _is_pairs(value: Any) -> bool:
    """Whether a value is a list of [question, answer]."""
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(item, list | tuple) and len(item) == 2 for item in value)
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("True", "False")
    return True


def _literal(text: str) -> Any:
    """A list that a table holds as text, as JSON or as Python writes it."""
    value = json_inside(text)
    if isinstance(value, str) and value.startswith("[") and len(value) < 10_000:
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
    return value
