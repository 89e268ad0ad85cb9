"""The rooms of the package: which may import which, the shape of its root, and the size of its files."""

import ast
from pathlib import Path

import pytest

import hugging_nano_gpt

PACKAGE_DIR = Path(hugging_nano_gpt.__file__).parent

# From low to high. A room imports from itself and from the rooms below it: not from above, and not from its own layer.
LAYERS = [
    {"errors", "model"},
    {"files", "pickles"},
    {"checkpoint", "tokenization"},
    {"convert"},
    {"training", "export", "verify"},
    {"demo"},
    {"sample"},
    {"serve", "evaluate"},
    {"__init__"},
]
HEIGHTS = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))


def get_room(path):
    return path.relative_to(PACKAGE_DIR).parts[0].removesuffix(".py")


def list_imports(path, source):
    """Lists the parts of this package that a file imports, as dotted names below it; "" is the package itself."""
    parts = path.relative_to(PACKAGE_DIR).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*parts[: len(parts) - node.level + 1], *(node.module.split(".") if node.module else ())]
            found += [".".join(base)] if base else [alias.name for alias in node.names]
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [name.partition(".")[2] for name in names if name.partition(".")[0] == PACKAGE_DIR.name]
    return found


def find_faults(path, source):
    """Finds the imports of a file that do not point downwards."""
    room = get_room(path)
    rooms = [name.partition(".")[0] or "__init__" for name in list_imports(path, source)]
    return [other for other in rooms if other != room and HEIGHTS[other] >= HEIGHTS[room]]


def test_imports_point_downwards():
    assert {path: faults for path in MODULES if (faults := find_faults(path, path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ..verify.report import Check",
        "from .. import verify",
        "from ..tokenization.find import load_tokenizer",
        "from hugging_nano_gpt.convert import nanogpt",
        "import hugging_nano_gpt.training.data",
        "from hugging_nano_gpt import NanoGPTLMHeadModel",
        "def later():\n    from ..convert.nanogpt import make_model",
    ],
)
def test_import_that_does_not_point_downwards_is_found(source):
    assert find_faults(PACKAGE_DIR / "checkpoint" / "check.py", source)
    assert not find_faults(PACKAGE_DIR / "__init__.py", source)


def test_every_room_has_a_layer_and_every_layer_rooms():
    assert {get_room(path) for path in MODULES} == HEIGHTS.keys()


def test_root_of_the_package_holds_four_modules():
    assert sorted(path.name for path in PACKAGE_DIR.iterdir() if path.is_file()) == [
        "__init__.py",
        "errors.py",
        "files.py",
        "pickles.py",
        "py.typed",
    ]


def test_no_file_is_longer_than_350_lines():
    lengths = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert [name for name, n_lines in lengths.items() if n_lines > 350] in ([], ["modeling_nano_gpt.py"])
