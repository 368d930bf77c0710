"""docs/refusals.md has a heading for each message that attach, its blocks, adapters and their optimiser can refuse with."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/refusals.md").read_text(encoding="utf-8")
PARTS = ["attach", "blocks", "losses", "peft_files", "settings", "stacked", "targets", "traced"]
FILES = [ROOT / "kloss/adapters.py", ROOT / "kloss/optim.py", *(ROOT / f"kloss/models/{part}.py" for part in PARTS)]
SAYING = ("_unfit", "_no_layer")  # functions that return what a message then says


def text_of(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """What a message says, with … for what varies. names: of texts that it may begin with."""
    match node:
        case ast.Name(id=name) | ast.FormattedValue(value=ast.Name(id=name)) if name in names:
            return text_of(names[name], {})
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(text_of(value, names) for value in values)
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            return text_of(left, names) + text_of(right, names)
        case ast.Call(func=ast.Attribute(attr="format", value=ast.Name(id=name))):
            return re.sub(r"\{\}", "…", CONSTANTS[name])
    return "…"


def messages(file: Path) -> set[str]:
    """Of a file: what is raised, warned of, or returned for that."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    said, names = [], dict[str, ast.expr]()
    for node in ast.walk(tree):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="UserError" | "ValueError"), args=[argument])):
                said.append(argument)
            case ast.Call(func=ast.Attribute(attr="warn"), args=[argument]):
                said.append(argument)
            case ast.Assign(targets=[ast.Name(id="complaint" | "message" as name)], value=value):
                names[name] = value
            case ast.FunctionDef(name=name) if name in SAYING:
                said += [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value is not None]
    texts = {re.sub(r"…(, …)+", "…", text_of(node, names)).strip() for node in said}
    return {text for text in texts if len(re.sub(r"\W|allowed", "", text)) > 1}


CONSTANTS = {
    target.id: ast.literal_eval(node.value)
    for file in FILES
    for node in ast.parse(file.read_text(encoding="utf-8")).body
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    for target in node.targets
    if isinstance(target, ast.Name)
}
MESSAGES = {message: file.name for file in FILES for message in messages(file)}
HEADINGS = re.findall(r"^### `(.*)`$", PAGE, re.MULTILINE)


def test_the_page_has_each_message_and_no_other():
    assert len(MESSAGES) > 60 and len(HEADINGS) == len({*HEADINGS})
    missing = [f"{file}: {message}" for message, file in MESSAGES.items() if message not in HEADINGS]
    assert not missing, missing
    assert not {*HEADINGS} - MESSAGES.keys()


def test_each_message_is_explained():
    for entry in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        heading, _, text = entry.partition("\n")
        assert len(re.sub(r"^##.*", "", text, flags=re.MULTILINE).strip()) > 10, heading


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("raise UserError('plain')", {"plain"}),
        ("raise ValueError(f'{a}: of {b!r:.60} ' + 'and more') from error", {"…: of … and more"}),
        ("warnings.warn(f'{a}, {b}, {c} are left', stacklevel=2)", {"… are left"}),
        ("def _unfit():\n    return f'is a {x}'", {"is a …"}),
        ("complaint = f'{x}: no'\nraise UserError(f'{complaint}: since {y}')", {"…: no: since …"}),
        ("raise TypeError('not ours')", set()),
    ],
)
def test_messages_are_read_from_the_code(source, wanted, tmp_path):
    (tmp_path / "file.py").write_text(source, encoding="utf-8")
    assert messages(tmp_path / "file.py") == wanted
