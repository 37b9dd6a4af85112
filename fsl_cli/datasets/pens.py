"""Characters as small random programs for a pen: how they are invented, and how an unsteady hand draws them.

In the spirit of the generative model of Omniglot (Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through
probabilistic program induction", Science 2015): one to four strokes, straight, angular, round or closed, each free-standing or
attached to an earlier one. Lengths, tremor and ink were chosen to look like Omniglot at 28x28. If this file draws anything
differently, increase `strokes.EDITION`.
"""

from typing import NamedTuple

import numpy as np

BLOCK, CANDIDATES = 100, 5  # classes invented together, and attempts for each
STROKES, SEGMENTS, POINTS, WAVES = 4, 4, 36, 4  # strokes at most; per stroke: segments at most, points, sways
DOT, LINE, RING, PATH = range(4)
SIDE = 28  # all pixels below are those of a 28x28 image
PEN = 0.55  # standard deviation of the pen's Gaussian in pixels


class Program(NamedTuple):
    """The strokes of many classes, each array `[classes, STROKES, ...]`; angles in radians, y points down."""

    exists: np.ndarray  # which of the STROKES the class has
    heading: np.ndarray  # of the pen at the start
    lengths: np.ndarray  # [..., SEGMENTS], 0 if the segment does not exist
    turns: np.ndarray  # [..., SEGMENTS] change of heading along the segment
    corners: np.ndarray  # [..., SEGMENTS] change of heading before the segment
    sways: np.ndarray  # [..., WAVES] change of heading in sine waves along the stroke
    host: np.ndarray  # the earlier stroke that this one is attached to
    there: np.ndarray  # the joint on the host, from 0 (start) to 1 (end)
    here: np.ndarray  # the joint on this stroke, likewise
    offset: np.ndarray  # [..., 2] from there to here, 0 if they touch
    side: np.ndarray  # [classes] longer side of the character in pixels
    centre: np.ndarray  # [classes, 2] of the character in pixels


def invent(rng: np.random.Generator, most: int) -> Program:
    """Draws the programs of a block of classes: for each, the first attempt that is clear and fills its space, else attempt 0."""
    program = attempt(BLOCK * CANDIDATES, rng, most)
    points, steps = trace(program)
    low, high = bounds(points, program.exists)
    side = (high - low).max(-1)
    cells = ((points - low[:, None, None]) / side[:, None, None, None] * 7.999).astype(int)  # 8x8 of them
    cells = np.where(program.exists[..., None], cells[..., 0] * 8 + cells[..., 1], 64).reshape(len(side), -1)
    taken = np.zeros((len(side), 65), bool)
    taken[np.arange(len(side))[:, None], cells] = True
    filled, path = taken[:, :64].sum(-1), 8 * steps.sum((1, 2)) / side
    fill = np.repeat(rng.uniform(7, 30, BLOCK), CANDIDATES)  # some characters are simple, some are complex
    broad = (high - low).min(-1) > 0.45 * side
    clear = (filled > 0.9 * path) & (filled > fill) & (broad | (fill < 9))
    best = clear.reshape(BLOCK, CANDIDATES).argmax(-1) + np.arange(BLOCK) * CANDIDATES
    return Program(*(part[best] for part in program))


def attempt(classes: int, rng: np.random.Generator, most: int) -> Program:
    """Draws the programs of many classes, of `most` strokes at most."""
    strokes, segments = (classes, STROKES), (classes, STROKES, SEGMENTS)
    first = np.arange(STROKES) == 0
    count = np.minimum(rng.choice([1, 2, 3, 4], p=[0.14, 0.32, 0.31, 0.23], size=(classes, 1)), most)
    kind = rng.choice([DOT, LINE, RING, PATH], p=[0.05, 0.35, 0.12, 0.48], size=strokes)
    kind = np.where(first & ((kind == DOT) | (count == 1)), PATH, kind)
    polygon = (kind == RING) & (rng.random(strokes) < 0.5)
    pieces = np.where(kind == PATH, rng.choice([1, 2, 3, 4], p=[0.15, 0.3, 0.3, 0.25], size=strokes), 1)
    pieces = np.where(polygon, rng.choice([3, 4], size=strokes), pieces)
    size = rng.uniform([[[0.06]], [[0.4]], [[0.9]], [[0.8]]], [[[0.06]], [[1.1]], [[2.2]], [[2.6]]], (4, *strokes))
    lengths = np.where(polygon[..., None], 1, rng.uniform(0.3, 1, segments)) * (np.arange(SEGMENTS) < pieces[..., None])
    lengths *= (np.choose(kind, size) / lengths.sum(-1))[..., None]
    # A path is angular, round or both, and tends to keep turning the same way.
    hand = rng.choice([-1, 1], size=strokes)[..., None]
    swing = hand * np.cumprod(rng.choice([-1, 1], p=[0.35, 0.65], size=segments), -1)
    style = rng.choice(3, p=[0.35, 0.35, 0.3], size=strokes)[..., None]
    loop = rng.random(segments) < 0.1
    bend = np.where(loop, rng.uniform(4.5, 6.5, segments), rng.uniform(0.6, 3.4, segments))
    bend *= rng.random(segments) < np.array([0, 0.9, 0.5])[style]
    right = rng.random(segments) < 0.6
    corner = np.where(right, rng.normal(np.pi / 2, 0.2, segments), rng.uniform(0.6, 2.8, segments))
    corner *= rng.random(segments) < np.array([1, 0.1, 0.6])[style]
    corner *= np.where(rng.random(segments) < 0.8, swing, -swing)
    path = (kind == PATH)[..., None]
    turns, corners = path * bend * swing, path * corner + (polygon * 2 * np.pi / pieces)[..., None] * hand
    turns[..., 0] += ((kind == RING) & ~polygon) * 6.2 * hand[..., 0]
    # Strokes start to the right or down more often than in other directions.
    compass = rng.choice(8, p=[0.32, 0.12, 0.34, 0.08, 0.04, 0.02, 0.05, 0.03], size=strokes)
    heading = compass * np.pi / 4 + rng.normal(0, 0.12, strokes)
    # A stroke may repeat the one before it at another place, like the bars of an E or the arches of an m.
    again = (rng.random(strokes) < 0.2) & ~first
    for k in range(1, STROKES):
        for part in (heading, lengths, turns, corners):
            part[again[:, k], k] = part[again[:, k], k - 1]
    touch = rng.choice(4, p=[0.22, 0.2, 0.33, 0.25], size=strokes)  # of the host: its start, its end, a point between, nothing
    here = np.where(rng.random(strokes) < 0.6, 0, rng.choice([1, 0.5, 0.3], size=strokes))
    return Program(
        exists=np.arange(STROKES) < count,
        heading=heading,
        lengths=lengths,
        turns=turns,
        corners=corners,
        sways=np.zeros((*strokes, WAVES)),
        host=rng.integers(0, np.maximum(np.arange(STROKES), 1), strokes),
        there=np.select([touch == 0, touch == 1, touch == 2], [0, 1, rng.uniform(0.1, 0.9, strokes)], 0.5),
        here=np.where(touch == 3, 0.5, here),
        offset=rng.uniform(-0.8, 0.8, (*strokes, 2)) * (touch == 3)[..., None],
        side=rng.normal(17.5, 2.8, classes).clip(8, 24),
        centre=rng.normal([13.3, 13.0], [0.3, 0.6], (classes, 2)),
    )


def unsteady(program: Program, rng: np.random.Generator, tremor: float) -> Program:
    """The programs as run once by an unsteady hand: with random errors in angles, lengths and joints."""
    strokes, segments = program.heading.shape, program.turns.shape
    care = tremor * np.exp(rng.normal(0, 0.3, (len(program.side), 1)))
    each = care[..., None]
    stretch = each * (rng.normal(0, 0.11, segments) + rng.normal(0, 0.08, (*strokes, 1)))
    return program._replace(
        heading=program.heading + care * rng.normal(0, 0.07, strokes),
        lengths=program.lengths * np.exp(stretch),
        turns=program.turns * (1 + each * rng.normal(0, 0.07, segments)) + each * rng.normal(0, 0.1, segments),
        corners=program.corners + each * rng.normal(0, 0.09, segments),
        sways=each * rng.normal(0, 0.12, (*strokes, WAVES)),
        there=np.clip(program.there + care * rng.normal(0, 0.03, strokes), 0, 1),
        here=program.here + care * rng.normal(0, 0.02, strokes),
        offset=program.offset + each * rng.normal(0, 0.045, (*strokes, 2)),
    )


def trace(program: Program) -> tuple[np.ndarray, np.ndarray]:
    """The points of the pen (x, y) `[classes, STROKES, POINTS, 2]`, and the length of line per point `[classes, STROKES, 1]`."""
    total = program.lengths.sum(-1, keepdims=True)
    ends = (np.cumsum(program.lengths, -1) / total)[:, :, None]
    shares = np.maximum((program.lengths / total)[:, :, None], 1e-9)
    time = (np.arange(POINTS)[:, None] + 0.5) / POINTS
    done = (time - ends) / shares + 1  # [classes, STROKES, POINTS, SEGMENTS]: < 0 before the segment, > 1 after it
    corners = np.where(np.arange(SEGMENTS) > 0, program.corners, program.heading[..., None])[:, :, None]
    angle = (np.clip(done, 0, 1) * program.turns[:, :, None] + (done >= 0) * corners).sum(-1)
    angle += program.sways @ np.sin(1.7 * np.pi * np.arange(1, WAVES + 1)[:, None] * time[:, 0])
    steps = total / POINTS
    points = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], -1) * steps[..., None], 2)
    here, there = ((POINTS * part).clip(0, POINTS - 1).astype(int) for part in (program.here, program.there))
    points -= np.take_along_axis(points, here[..., None, None], 2)
    classes = np.arange(len(points))
    for k in range(1, STROKES):
        points[:, k] += (points[classes, program.host[:, k], there[:, k]] + program.offset[:, k])[:, None]
    return points, steps * program.exists[..., None]


def bounds(points: np.ndarray, exists: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest x and y `[classes, 2]` of the strokes that exist."""
    mask = exists[..., None, None]
    return np.where(mask, points, np.inf).min((1, 2)), np.where(mask, points, -np.inf).max((1, 2))


def draw(program: Program, rng: np.random.Generator, size: int, tremor: float, noise: float) -> np.ndarray:
    """One drawing of each class, uint8 `[classes, size, size]`, ink = 255."""
    classes = len(program.side)
    points, steps = trace(unsteady(program, rng, tremor))
    spin, slant = rng.normal(0, 0.05 * tremor, classes), rng.normal(0, 0.08 * tremor, classes)
    wide, tall = np.exp(rng.normal(0, 0.06 * tremor, (2, classes)))
    rows = [wide * np.cos(spin), wide * (slant - np.sin(spin)), tall * np.sin(spin), tall * np.cos(spin)]
    points = points @ np.stack(rows, -1).reshape(classes, 1, 2, 2).swapaxes(2, 3)
    low, high = bounds(points, program.exists)
    grow = program.side * np.exp(rng.normal(0, 0.11 * tremor, classes)) / (high - low).max(-1)
    centre = program.centre + rng.normal(0, 1.4 * tremor, (classes, 2))
    half = (high - low) / 2 * grow[:, None]
    centre += np.maximum(0.5 - (centre - half), 0) - np.maximum(centre + half - (SIDE - 1.5), 0)  # stay on the paper
    points = ((points - ((low + high) / 2)[:, None, None]) * grow[:, None, None, None]) + centre[:, None, None]
    # The sum of the points' Gaussians is a ridge of height 1 along a line: above a threshold it is ink.
    x, y = points.reshape(classes, -1, 2).transpose(2, 0, 1)[..., None].astype(np.float32)
    grid = ((np.arange(size) + 0.5) * SIDE / size - 0.5).astype(np.float32)
    ink = np.broadcast_to(steps * grow[:, None, None] / (np.sqrt(2 * np.pi) * PEN), (classes, STROKES, POINTS))
    across, down = bell(x, grid), bell(y, grid) * ink.reshape(classes, -1, 1).astype(np.float32)
    height = down.swapaxes(1, 2) @ across
    radius = rng.normal(0.65, 0.08 * tremor, classes).clip(0.45, 0.95)
    inked = height > np.exp(-0.5 * np.square(radius / PEN))[:, None, None]
    if noise:
        inked ^= rng.random(inked.shape) < noise
    return np.where(inked, 255, 0).astype(np.uint8)


def bell(points: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The pen's Gaussian `[classes, points, size]` around points `[classes, points, 1]` at the grid `[size]`, float32."""
    values = (grid - points) * np.float32(np.sqrt(0.5) / PEN)
    np.multiply(values, values, out=values)
    np.minimum(values, 50, out=values)  # e^-50 is negligible; far smaller numbers are denormal, which is slow
    return np.exp(np.negative(values, out=values), out=values)
