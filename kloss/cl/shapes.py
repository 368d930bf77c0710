"""What JSON of a run folder must look like, and where a value departs from it."""

from typing import Any

from ..errors import UserError

# A type, of which float takes whole numbers too; None; a tuple of shapes, one of which must fit; [shape], a list of any length;
# {str: shape}, an object with any keys; {"name": shape}, an object with at least these keys, of which "name?" may be absent.
Shape = Any


def misfit(value: object, shape: Shape, path: str = "") -> str | None:
    """Return the path of the first part of a JSON value that has not the shape, None if there is none.

    >>> misfit({"runs": [{"seed": 1}, {"seed": True}]}, {"runs": [{"seed": int}]})
    'runs[1].seed'
    """
    if isinstance(shape, tuple):
        return None if any(misfit(value, allowed) is None for allowed in shape) else path or "all of it"
    parts: list[tuple[object, Shape, str]] = []
    if isinstance(shape, list) and isinstance(value, list):
        parts = [(item, shape[0], f"{path}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict) and isinstance(value, dict):
        names = dict.fromkeys(value, shape[str]) if str in shape else shape
        for name, allowed in names.items():
            key = name.removesuffix("?")
            where = f"{path}.{key}".removeprefix(".")
            if key in value:
                parts.append((value[key], allowed, where))
            elif key == name:
                return where
    elif not (value is shape is None or type(value) in ((int, float) if shape is float else (shape,))):
        return path or "all of it"
    return next((inner for part in parts if (inner := misfit(*part)) is not None), None)


def check_shape(value: object, shape: Shape) -> None:
    """Raise UserError, naming the first part of a JSON value that has not the shape."""
    where = misfit(value, shape)
    if where is not None:
        raise UserError(f"{where} is missing or of another type")
