"""The true caption of a drawn scene, and the way back from a caption to the facts it states.

The wording varies from clip to clip, but never at random: which phrase is chosen depends on the facts themselves
that can be seen. So a caption is a function of its clip, and accuracy can be counted fact by fact. It is no
general description of videos.
"""

import re
from dataclasses import dataclass, fields
from typing import Final

from recipes.demo.clips import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing

PROMPTS: Final = (
    "Describe the video.",
    "Describe the video in detail.",
    "What happens in this video?",
    "Please write a caption for this clip.",
    "What can be seen in the clip?",
    "Tell me what the video shows.",
)
"""Questions the models are trained on; every one has the same answer."""

_OPENINGS: Final = {
    "white": "The video shows a plain white background.",
    "black": "This clip is set against a plain black background.",
    "grey": "We see a plain grey background in this video.",
    "striped": "The whole scene has a striped background.",
    "checkered": "Behind everything there is a checkered background.",
    "dotted": "This short video is set on a dotted background.",
}
_INTRODUCTIONS: Final = {
    "circle": "{which} is a {size} {colour} circle, and it starts {place}.",
    "square": "{which} is a {size} {colour} square, which begins {place}.",
    "triangle": "{which} is a {size} {colour} triangle, first seen {place}.",
    "star": "{which} is a {size} {colour} star, and it starts {place}.",
    "ring": "{which} is a {size} {colour} ring, which begins {place}.",
    "cross": "{which} is a {size} {colour} cross, first seen {place}.",
}
_MOTIONS: Final = {
    "left": "The {colour} {shape} drifts slowly to the left and keeps its size.",
    "right": "The {colour} {shape} slides steadily to the right and keeps its size.",
    "up": "The {colour} {shape} rises slowly and moves towards the upper edge.",
    "down": "The {colour} {shape} sinks slowly and moves towards the lower edge.",
    "still": "The {colour} {shape} stays perfectly still for the whole clip.",
    "grows": "The {colour} {shape} grows bigger and bigger but stays in its place.",
    "shrinks": "The {colour} {shape} shrinks more and more but stays in its place.",
    "vanishes": "The {colour} {shape} rests for about two seconds and then vanishes.",
}
_MOTION_WORDS: Final = {
    "left": "to the left",
    "right": "to the right",
    "up": "rises",
    "down": "sinks",
    "still": "still",
    "grows": "grows",
    "shrinks": "shrinks",
    "vanishes": "vanishes",
}


@dataclass(frozen=True)
class ThingFacts:
    """What a caption says of one shape; a fact it does not state is an empty string."""

    colour: str
    shape: str
    size: str
    motion: str
    place: str


@dataclass(frozen=True)
class Facts:
    """What a caption says of a clip."""

    background: str
    things: tuple[ThingFacts, ...]
    meet: bool


FACT_KINDS: Final = ("colour", "shape", "size", "motion", "place", "background", "number", "meeting")


def caption_for(scene: Scene) -> str:
    """The one true caption of a scene."""
    sentences = [_OPENINGS[scene.background]]
    if len(scene.things) == 1:
        thing = scene.things[0]
        sentences += ["There is only one shape in the whole picture.", *_told(thing, "It")]
        sentences.append(f"Nothing else happens, and the {thing.shape} is the only thing that can be seen.")
    else:
        first, second = scene.things
        sentences += ["There are two shapes in it.", *_told(first, "The first"), *_told(second, "The second")]
        sentences.append(
            "In the end the two shapes meet and touch each other."
            if scene.meet
            else f"The {first.shape} on the left and the {second.shape} on the right never meet."
        )
    return " ".join(sentences)


def facts_of(scene: Scene) -> Facts:
    """The facts of a scene, as its true caption states them."""
    things = tuple(
        ThingFacts(t.colour, t.shape, t.size, t.motion, f"{t.row} {t.column}") for t in scene.things
    )
    return Facts(scene.background, things, scene.meet)


def facts_in(caption: str) -> Facts:
    """Read the facts back from a caption, which may be wrong or broken off."""
    sentences = [s for s in re.split(r"(?<=\.)\s+", caption.strip()) if s]
    background = _first_of(BACKGROUNDS, sentences[0]) if sentences else ""
    things: list[ThingFacts] = []
    for index, sentence in enumerate(sentences):
        if size := _first_of(tuple(SIZES), sentence):
            motion = sentences[index + 1] if index + 1 < len(sentences) else ""
            colour, shape = _first_of(tuple(COLOURS), sentence), _first_of(SHAPES, sentence)
            things.append(ThingFacts(colour, shape, size, _motion_in(motion), _place_in(sentence)))
    return Facts(background, tuple(things), any("meet and touch" in s for s in sentences))


def compare(said: Facts, true: Facts) -> dict[str, tuple[int, int]]:
    """Facts right and facts in all, by kind. A shape that is not described counts as wrong in every fact."""
    score = {
        "background": (int(said.background == true.background), 1),
        "number": (int(len(said.things) == len(true.things)), 1),
    }
    if len(true.things) == 2:
        score["meeting"] = (int(said.meet == true.meet), 1)
    nothing = ThingFacts("", "", "", "", "")
    for field in fields(ThingFacts):
        pairs = zip(true.things, (*said.things, nothing, nothing), strict=False)
        right = sum(getattr(a, field.name) == getattr(b, field.name) for a, b in pairs)
        score[field.name] = (right, len(true.things))
    return score


def fact_words() -> frozenset[str]:
    """Words that carry a fact; training weighs them more than the words between them."""
    motions = {text.split("{shape} ")[1].split()[0] for text in _MOTIONS.values()}
    places = {"top", "middle", "bottom", "left", "centre", "right", "halfway"}
    counts = {"one", "two", "meet", "never"}
    return frozenset({*BACKGROUNDS, *COLOURS, *SHAPES, *SIZES, *motions, *places, *counts})


def _told(thing: Thing, which: str) -> tuple[str, str]:
    words = {"colour": thing.colour, "shape": thing.shape, "size": thing.size}
    introduction = _INTRODUCTIONS[thing.shape].format(which=which, place=_place(thing), **words)
    return introduction, _MOTIONS[thing.motion].format(**words)


def _place(thing: Thing) -> str:
    match thing.row, thing.column:
        case "middle", "centre":
            return "exactly in the middle"
        case "middle", column:
            return f"halfway up at the {column} edge"
        case row, "centre":
            return f"at the {row} in the centre"
        case row, column:
            return f"in the {row} {column} corner"


def _place_in(sentence: str) -> str:
    middle = bool(re.search("halfway|middle", sentence))
    centre = bool(re.search("centre|middle", sentence))
    row = _first_of(("top", "bottom"), sentence) or ("middle" if middle else "")
    column = _first_of(("left", "right"), sentence) or ("centre" if centre else "")
    return f"{row} {column}"


def _motion_in(sentence: str) -> str:
    return next((motion for motion, words in _MOTION_WORDS.items() if words in sentence), "")


def _first_of(words: tuple[str, ...], sentence: str) -> str:
    found = re.search(rf"\b({'|'.join(words)})\b", sentence)
    return found.group(1) if found else ""
