"""What JSON of a run folder must look like, and where a value departs from it."""

from collections.abc import Mapping
from typing import Any

from ..errors import UserError

# A type, of which float takes whole numbers too; None; a tuple of shapes, one of which must fit; [shape], a list of any length;
# {str: shape}, an object with any keys; {"name": shape}, an object with at least these keys, of which "name?" may be absent.
Shape = Any

SCORES = {
    "name": str,
    "corpus": {
        "name": str,
        "locales": [str],
        "labels": int,
        "train_utterances": {str: int},
        "test_utterances": {str: int},
        "scored?": str,
        "scored_utterances?": {str: int},
        "tokens_per_word?": ({str: float}, None),
    },
    "backbone": {"name": str, "parameters": float, "layers": int, "hidden": int, "vocabulary": int},
    "runs": [
        {
            "strategy": str,
            "label": str,
            "lr": float,
            "order": [str],
            "order_name": str,
            "seed": int,
            "diverged?": (str, None),
            "groups?": ({str: str}, None),
            "trainable_parameters": int,
            "steps": int,
            "R": [[(float, None)]],
            "curves?": [{"learner": int, "experience": int, "step": int, "counts": {str: [int]}}],
        }
    ],
    "diverged_besides?": [str],
    "choices?": [str],
}
ENVIRONMENT = {"commit?": (str, None), "command?": (str, [str]), "argv?": (str, [str])}


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


def check_scores(scores: Mapping[str, Any]) -> None:
    """Raise UserError unless the contents of scores.json can be reported."""
    if scores.get("format") != 1:
        raise UserError(f"has format {scores.get('format')!r}; only format 1 is known")
    check_shape(scores, SCORES)
    for name in ("train_utterances", "test_utterances"):
        if not scores["corpus"][name]:
            raise UserError(f"corpus.{name} is empty")
    shapes: dict[str, tuple[int, int]] = {}
    for i, run in enumerate(scores["runs"]):
        R, T = run["R"], len(run["order"])
        cells = [value for row in R for value in row if value is not None]
        if T == 0 or len(R) not in (2, T + 1) or any(len(row) != T for row in R) or not all(0 <= value <= 1 for value in cells):
            raise UserError(f"runs[{i}].R is no matrix of F1, T+1 or 2 rows by {T} languages, 0 to 1 or null")
        if shapes.setdefault(run["label"], (len(R), T)) != (len(R), T):
            raise UserError(f"runs[{i}].R is of another shape than those before it")
