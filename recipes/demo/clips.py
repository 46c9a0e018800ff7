"""Clips that we draw ourselves: one or two coloured shapes that move over a background.

A clip is a pure function of its seed. `scene_for(seed)` decides every fact; `render` draws that scene at
any times and at any size, so that the same scene can train a model or be written to a video file. The
drawing is plain numpy with signed distances and soft edges. It is no simulation of real footage.
"""

import math
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 32, 36),
    "green": (36, 160, 62),
    "blue": (40, 76, 214),
    "yellow": (244, 222, 40),
    "purple": (146, 44, 180),
    "orange": (244, 136, 20),
    "cyan": (40, 206, 220),
}
SHAPES: Final = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES: Final[dict[str, float]] = {"small": 0.10, "medium": 0.15, "large": 0.215}
"""Radius as a share of sqrt(height * width)."""
MOTIONS: Final = ("left", "right", "up", "down", "still", "grows", "shrinks", "vanishes")
ROWS: Final = ("top", "middle", "bottom")
COLUMNS: Final = ("left", "centre", "right")
BACKGROUNDS: Final = ("white", "black", "grey", "striped", "checkered", "dotted")

CLIP_SECONDS: Final = 4.0
HELD_OUT_SEEDS: Final = range(300)
EXAMPLE_SEEDS: Final = range(10_000, 20_000)
HEAD_SEEDS: Final = range(100_000, 1_000_000)
"""What a head is trained on: clips that its target has not been trained on either."""
FIRST_TRAINING_SEED: Final = 1_000_000
"""Training of the demo pairs uses seeds from here on; the four sets are disjoint."""

_LOW, _MIDDLE, _HIGH = 0.24, 0.5, 0.76
_PLACES: Final = (_LOW, _MIDDLE, _HIGH)
_GROWTH: Final[dict[str, float]] = {"grows": 1.55, "shrinks": 0.5}
_FADE_SECONDS: Final = 0.3

Split = Literal["train", "head", "held-out", "examples"]

_BOUNDED: Final[dict[str, range]] = {
    "head": HEAD_SEEDS,
    "held-out": HELD_OUT_SEEDS,
    "examples": EXAMPLE_SEEDS,
}


@dataclass(frozen=True)
class Thing:
    """One shape: the facts a caption states, then the numbers the drawing needs."""

    colour: str
    shape: str
    size: str
    motion: str
    row: str
    column: str
    x: float
    y: float
    radius: float
    move_x: float
    move_y: float
    growth: float
    vanish_s: float
    tint: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """Everything that is true of one clip. Things stand from left to right."""

    background: str
    things: tuple[Thing, ...]
    meet: bool
    shade: float


def seed_for(split: Split, index: int) -> int:
    """Seed of the clip with this index in a set; the sets never share a seed."""
    return FIRST_TRAINING_SEED + index if split == "train" else _BOUNDED[split][index]


def scene_for(seed: int, one_thing_share: float = 0.4) -> Scene:
    """Decide every fact of the clip with this seed."""
    rng = np.random.default_rng(seed)
    background = str(rng.choice(BACKGROUNDS))
    meet = False
    if rng.random() < one_thing_share:
        things: tuple[Thing, ...] = (_lone_thing(rng),)
    else:
        meet = bool(rng.random() < 0.25)
        things = _meeting_things(rng) if meet else (_side_thing(rng, 0), _side_thing(rng, 2))
    return Scene(background, things, meet, float(rng.uniform(-8, 8)))


def _lone_thing(rng: np.random.Generator) -> Thing:
    row, column = int(rng.integers(3)), int(rng.integers(3))
    outward = {(0, "up"), (2, "down")}, {(0, "left"), (2, "right")}
    motions = [m for m in MOTIONS if (row, m) not in outward[0] and (column, m) not in outward[1]]
    return _thing(rng, str(rng.choice(motions)), row, column)


def _side_thing(rng: np.random.Generator, column: int) -> Thing:
    row = int(rng.integers(3))
    motions = [m for m in MOTIONS[2:] if (row, m) not in {(0, "up"), (2, "down")}]
    return _thing(rng, str(rng.choice(motions)), row, column)


def _meeting_things(rng: np.random.Generator) -> tuple[Thing, Thing]:
    """Two things in one row that move towards each other until they touch."""
    row = int(rng.integers(3))
    first, second = _thing(rng, "right", row, 0, reach=0.0), _thing(rng, "left", row, 2, reach=0.0)
    way = (second.x - first.x - 0.8 * (first.radius + second.radius)) / 2
    return _moved(first, max(way, 0.1)), _moved(second, -max(way, 0.1))


def _moved(thing: Thing, move_x: float) -> Thing:
    return Thing(**{**thing.__dict__, "move_x": move_x})


def _thing(rng: np.random.Generator, motion: str, row: int, column: int, reach: float = 1.0) -> Thing:
    colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
    size = str(rng.choice(list(SIZES)))
    x, y = _PLACES[column] + rng.uniform(-0.03, 0.03), _PLACES[row] + rng.uniform(-0.03, 0.03)
    move_x = move_y = 0.0
    if motion in ("left", "right"):
        way = rng.uniform(0.9, 1.1) * (0.32 if column == 1 else 0.5)
        move_x = reach * (way if motion == "right" else -way)
    elif motion in ("up", "down"):
        way = rng.uniform(0.9, 1.1) * (0.32 if row == 1 else 0.5)
        move_y = reach * (way if motion == "down" else -way)
    red, green, blue = rng.uniform(-10, 10, 3)
    return Thing(
        colour=colour,
        shape=shape,
        size=size,
        motion=motion,
        row=ROWS[row],
        column=COLUMNS[column],
        x=float(x),
        y=float(y),
        radius=float(SIZES[size] * rng.uniform(0.95, 1.05)),
        move_x=float(move_x),
        move_y=float(move_y),
        growth=_GROWTH.get(motion, 1.0),
        vanish_s=float(rng.uniform(1.6, 2.4)) if motion == "vanishes" else math.inf,
        tint=(float(red), float(green), float(blue)),
    )


def state_at(thing: Thing, times_s: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    """Centre x, centre y, radius and opacity of a thing, each [F], in shares of the picture."""
    done = np.clip(times_s / CLIP_SECONDS, 0, 1).astype(np.float32)
    radius = thing.radius * (1 + (thing.growth - 1) * done)
    opacity = np.clip((thing.vanish_s - times_s) / _FADE_SECONDS, 0, 1).astype(np.float32)
    return thing.x + thing.move_x * done, thing.y + thing.move_y * done, radius, opacity


def render(
    scene: Scene, times_s: NDArray[np.float32], height: int, width: int, softness: float = 1.0
) -> NDArray[np.uint8]:
    """Draw the scene at the given times [F] -> uint8 [F, height, width, 3]."""
    picture = _background(scene, height, width)
    frames = np.repeat(picture[None], len(times_s), axis=0)
    for thing in scene.things:
        _draw(frames, thing, times_s, softness)
    drawn: NDArray[np.uint8] = np.clip(frames + 0.5, 0, 255).astype(np.uint8)
    return drawn


def _background(scene: Scene, height: int, width: int) -> NDArray[np.float32]:
    """One picture [height, width, 3] in neutral tones, which no shape has."""
    unit = math.sqrt(height * width)
    y = ((np.arange(height, dtype=np.float32) + 0.5) / unit)[:, None]
    x = ((np.arange(width, dtype=np.float32) + 0.5) / unit)[None, :]
    flat = np.zeros((height, width), np.float32)
    tone: NDArray[np.float32]
    if scene.background == "striped":
        tone = flat + np.where((x * 6) % 1 < 0.5, 205, 160).astype(np.float32)
    elif scene.background == "checkered":
        tone = flat + np.where(((x * 6) % 1 < 0.5) ^ ((y * 6) % 1 < 0.5), 108, 70).astype(np.float32)
    elif scene.background == "dotted":
        away = np.hypot((x * 8) % 1 - 0.5, (y * 8) % 1 - 0.5)
        tone = flat + np.where(away < 0.25, 110, 190).astype(np.float32)
    else:
        tone = flat + {"white": 240.0, "black": 18.0, "grey": 132.0}[scene.background]
    return np.repeat((tone + scene.shade)[..., None], 3, axis=2)


def _draw(frames: NDArray[np.float32], thing: Thing, times_s: NDArray[np.float32], softness: float) -> None:
    """Blend one thing into the frames, touching only the box around it."""
    height, width = frames.shape[1:3]
    unit = math.sqrt(height * width)
    colour = np.asarray(COLOURS[thing.colour], np.float32) + np.asarray(thing.tint, np.float32)
    for frame, x, y, radius, opacity in zip(frames, *state_at(thing, times_s), strict=True):
        reach = radius * unit + 2
        left, right = max(0, int(x * width - reach)), min(width, int(x * width + reach) + 1)
        top, bottom = max(0, int(y * height - reach)), min(height, int(y * height + reach) + 1)
        if opacity == 0 or left >= right or top >= bottom:
            continue
        across = ((np.arange(left, right, dtype=np.float32) + 0.5 - x * width) / (radius * unit))[None, :]
        down = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - y * height) / (radius * unit))[:, None]
        outside = _distance(thing.shape, across, down) * radius * unit
        inside = np.clip(0.5 - outside / softness, 0, 1) * opacity
        box = frame[top:bottom, left:right]
        box += inside[..., None] * (colour - box)


def _distance(shape: str, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Signed distance to the edge of a shape of radius 1 about the origin; y points down."""
    distance: NDArray[Any]
    across, down, away = np.abs(x), np.abs(y), np.hypot(x, y)
    match shape:
        case "circle":
            distance = away - 0.95
        case "square":
            distance = np.maximum(across, down) - 0.82
        case "triangle":
            distance = np.maximum(across * 0.894 - y * 0.447 - 0.45, y - 0.8)
        case "star":
            distance = _star(x, y)
        case "ring":
            distance = np.abs(away - 0.74) - 0.21
        case _:
            upright = np.maximum(across - 0.3, down - 0.92)
            distance = np.minimum(upright, np.maximum(across - 0.92, down - 0.3))
    return distance


def _star(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Five points up: fold the plane into half a point, then take one straight edge."""
    fifth = 2 * math.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)
    away = np.hypot(x, y)
    inner_x, inner_y = 0.42 * math.cos(fifth / 2), 0.42 * math.sin(fifth / 2)
    normal_x, normal_y = inner_y, 1.05 - inner_x
    edge = (away * np.cos(angle) - 1.05) * normal_x + away * np.sin(angle) * normal_y
    return np.asarray(edge / math.hypot(normal_x, normal_y))
