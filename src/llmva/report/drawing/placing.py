"""Where to write the names of points in a chart, so that they cover neither each other nor the points.

Every name tries places around its point, near ones first, and takes the cheapest; a few rounds let early names make way
for late ones. Nothing is drawn at random, so the same points have the same picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # left, top, right, bottom
Segment = tuple[float, float, float, float]  # x1, y1, x2, y2
DISTANCES = (5.0, 12.0, 20.0, 30.0, 42.0, 56.0, 72.0, 90.0, 110.0, 135.0, 165.0)
DIRECTIONS = 16
ROUNDS = 4
LEADER = 10.0  # from this distance on, a line leads from the name to its point


@dataclass(frozen=True)
class Name:
    """A name to be placed: its point, and the size of its box."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Place:
    """The box that a name got, and the line from it to the point; None if the name is close enough without."""

    box: Box
    leader: Segment | None


def place(names: Sequence[Name], bounds: Box, taken: Sequence[Box] = ()) -> list[Place]:
    """A place for every name.

    Args:
        names: with the centres of their points.
        bounds: boxes stay inside if they fit.
        taken: boxes that names should not cover, such as the marks of the points.
    """
    chosen: list[Place | None] = [None] * len(names)
    crowd = [sum(math.dist((a.x, a.y), (b.x, b.y)) < 60 for b in names) for a in names]
    order = sorted(range(len(names)), key=lambda i: (-crowd[i], i))
    for _ in range(ROUNDS):
        before = list(chosen)
        for i in order:
            others = [other for j, other in enumerate(chosen) if j != i and other is not None]
            chosen[i] = _cheapest(names[i], bounds, taken, others)
        if chosen == before:
            break
    return [each for each in chosen if each is not None]


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return across * down if across > 0 and down > 0 else 0.0


def _cheapest(name: Name, bounds: Box, taken: Sequence[Box], others: Sequence[Place]) -> Place:
    best, lowest = _at(name, 0.0, DISTANCES[0], bounds), math.inf
    for distance in DISTANCES:
        if distance * 0.5 >= lowest:
            break  # no place further out can be cheaper
        for step in range(DIRECTIONS):
            angle = 2 * math.pi * step / DIRECTIONS
            candidate = _at(name, angle, distance, bounds)
            cost = distance * 0.5 + 0.6 * abs(math.sin(angle)) + 0.3 * (math.cos(angle) < 0)
            cost += _cost(candidate, taken, others)
            if cost < lowest:
                best, lowest = candidate, cost
    return best


def _at(name: Name, angle: float, distance: float, bounds: Box) -> Place:
    """The place in a direction from the point, pushed back into the bounds."""
    x = name.x + math.cos(angle) * (distance + name.width / 2)
    y = name.y + math.sin(angle) * (distance + name.height / 2)
    x = max(bounds[0] + name.width / 2, min(bounds[2] - name.width / 2, x))
    y = max(bounds[1] + name.height / 2, min(bounds[3] - name.height / 2, y))
    box = (x - name.width / 2, y - name.height / 2, x + name.width / 2, y + name.height / 2)
    nearest = max(box[0], min(box[2], name.x)), max(box[1], min(box[3], name.y))
    far = math.dist(nearest, (name.x, name.y)) >= LEADER
    end = box[0] if x >= name.x else box[2]  # the middle of the nearer side
    return Place(box, (name.x, name.y, end, y) if far else None)


def _cost(placed: Place, taken: Sequence[Box], others: Sequence[Place]) -> float:
    cost = 0.0
    for other in others:
        cost += _covering(placed.box, other.box, 60)
        if other.leader is not None:
            cost += 15 * _crosses(other.leader, placed.box)
            if placed.leader is not None:
                cost += 25 * _meet(placed.leader, other.leader)
        if placed.leader is not None:
            cost += 15 * _crosses(placed.leader, other.box)
    cost += sum(_covering(placed.box, box, 20) for box in taken)
    if placed.leader is not None:
        x, y = placed.leader[:2]
        strange = (box for box in taken if not (box[0] <= x <= box[2] and box[1] <= y <= box[3]))
        cost += sum(12 * _crosses(placed.leader, box) for box in strange)
    return cost


def _covering(a: Box, b: Box, minimum: float) -> float:
    """The cost of two boxes that share an area: `minimum` for any overlap, and more by its size."""
    area = overlap(a, b)
    return minimum + 3 * area if area else 0.0


def _crosses(line: Segment, box: Box) -> bool:
    """Does any part of a segment lie in a box? (Liang and Barsky's clipping.)"""
    x, y, dx, dy = line[0], line[1], line[2] - line[0], line[3] - line[1]
    first, last = 0.0, 1.0
    for slope, room in ((-dx, x - box[0]), (dx, box[2] - x), (-dy, y - box[1]), (dy, box[3] - y)):
        if slope == 0:
            if room < 0:
                return False
        elif slope < 0:
            first = max(first, room / slope)
        else:
            last = min(last, room / slope)
    return first < last


def _meet(a: Segment, b: Segment) -> bool:
    """Do two segments cross?"""

    def side(line: Segment, x: float, y: float) -> float:
        return (line[2] - line[0]) * (y - line[1]) - (line[3] - line[1]) * (x - line[0])

    return side(a, b[0], b[1]) * side(a, b[2], b[3]) < 0 and side(b, a[0], a[1]) * side(b, a[2], a[3]) < 0
