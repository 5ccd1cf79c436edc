"""Sizes of images and of their grids of patches: one number where they are square, else (height, width).

A square is typed, saved and passed on as one number everywhere; who needs both numbers asks `height_width`.
"""

import math
from collections.abc import Sequence
from operator import index

Size = int | tuple[int, int]
"""Pixels, patches or units along a side of a square, or along (height, width) of a rectangle."""


def height_width(size: Size) -> tuple[int, int]:
    """Both numbers of a size."""
    return (size, size) if isinstance(size, int) else size


def as_size(numbers: int | Sequence[int]) -> Size:
    """A size as it is passed on: one number for a square, a tuple for a rectangle.

    Args:
        numbers: one, or height and width, in any sequence (JSON has lists).
    Raises:
        ValueError: there are more or less of them, or one is less than 1.
    """
    both = tuple(map(index, numbers if isinstance(numbers, Sequence) else (numbers, numbers)))
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"{numbers} is no size: wanted one number for a square or height and width, at least 1 each")
    return both[0] if both[0] == both[1] else (both[0], both[1])


def said(size: Size) -> str:
    """`32 x 48`, for messages."""
    height, width = height_width(size)
    return f"{height} x {width}"


def shown(size: Size) -> str:
    """`32²` or `32 × 48`, for the eye."""
    return f"{size}²" if isinstance(size, int) else f"{size[0]} × {size[1]}"


def typed(size: Size) -> str:
    """`32` or `32 48`: as it is typed behind a flag."""
    return str(size) if isinstance(size, int) else f"{size[0]} {size[1]}"


def divided(size: Size, by: int) -> Size:
    """How often a square of side `by` fits along each side of `size`."""
    height, width = height_width(size)
    return as_size((height // by, width // by))


def divides(by: int, size: Size) -> bool:
    """Whether squares of side `by` tile `size`."""
    return by >= 1 and not any(side % by for side in height_width(size))


def multiplied(size: Size, by: int) -> Size:
    """So many times as large along each side."""
    return size * by if isinstance(size, int) else (size[0] * by, size[1] * by)


def size_of(count: int, unit: int, known: Size | None = None) -> Size | None:
    """The size of an image of `count` squares of side `unit`: the one known, None where that has not as many.

    Where nobody knows it, the square, or, where there is none, the nearest rectangle.
    """
    if known is None:
        return multiplied(nearest_grid(count), unit) if count > 0 else None
    return known if divides(unit, known) and area(divided(known, unit)) == count else None


def nearest_grid(count: int) -> Size:
    """The square grid of so many places, or, where there is none, the rectangle with more columns that is nearest."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return as_size((rows, count // rows))


def area(size: Size) -> int:
    """Height times width."""
    height, width = height_width(size)
    return height * width
