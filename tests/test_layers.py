"""The rooms of the package: which may import which, the files of its root, and the size of its files."""

import ast
from pathlib import Path

import pytest

import hugging_nano_gpt

PACKAGE_DIR = Path(hugging_nano_gpt.__file__).parent

# From low to high. A room imports from itself and from the rooms below it: not from above, and not from its own layer.
LAYERS = [
    {"errors", "model"},
    {"data", "files"},
    {"checkpoint", "tokenization"},
    {"convert"},
    {"training", "export", "verify", "evaluate", "prepare"},
    {"demo"},
    {"sample"},
    {"serve"},
    {"__init__", "__main__"},
]
HEIGHTS = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
MODULES = sorted(PACKAGE_DIR.rglob("*.py"))


def get_room(path):
    return path.relative_to(PACKAGE_DIR).parts[0].removesuffix(".py")


def list_imports(path, source):
    """Lists what a file imports from this package, as dotted names below it."""
    package = [PACKAGE_DIR.name, *path.relative_to(PACKAGE_DIR).parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else ())]
            found += [[*module, alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name.split(".") for alias in node.names]
    return [".".join(name[1:]) for name in found if name[0] == PACKAGE_DIR.name]


def find_faults(path, source):
    """Finds the imports of a file that do not point downwards; a name outside the rooms is the package's own."""
    room = get_room(path)
    names = [name.partition(".")[0] for name in list_imports(path, source)]
    rooms = [name if name in HEIGHTS else "__init__" for name in names]
    return [other for other in rooms if other != room and HEIGHTS[other] >= HEIGHTS[room]]


def find_circle(room, sources):
    """Finds modules of a room that import each other in a circle: each the next one, and the last one the first.

    Args:
        room: Name of the room.
        sources: The path and the source of each module of the package. Imports within functions and for type checking
            count too.
    """
    modules = {
        ".".join(path.relative_to(PACKAGE_DIR).with_suffix("").parts).removesuffix(".__init__"): (path, source)
        for path, source in sources.items()
        if get_room(path) == room
    }
    imports = {
        name: {each if each in modules else each.rpartition(".")[0] for each in list_imports(*module)}
        for name, module in modules.items()
    }

    def follow(chain):
        if chain[-1] in chain[:-1]:
            return chain[chain.index(chain[-1]) : -1]
        following = sorted((imports[chain[-1]] & imports.keys()) - {chain[-1]})
        return next((found for name in following if (found := follow([*chain, name]))), [])

    return next((found for name in sorted(imports) if (found := follow([name]))), [])


def test_imports_point_downwards():
    assert {path: faults for path in MODULES if (faults := find_faults(path, path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "from ..verify.report import Check",
        "from .. import verify",
        "from ..tokenization.find import load_tokenizer",
        "from hugging_nano_gpt.convert import nanogpt",
        "import hugging_nano_gpt.training.trainer",
        "from hugging_nano_gpt import NanoGPTLMHeadModel",
        "def later():\n    from ..convert.nanogpt import make_model",
    ],
)
def test_import_that_does_not_point_downwards_is_found(source):
    assert find_faults(PACKAGE_DIR / "checkpoint" / "faults.py", source)
    assert not find_faults(PACKAGE_DIR / "__init__.py", source)


@pytest.mark.parametrize("room", sorted(HEIGHTS))
def test_modules_of_a_room_do_not_import_each_other_in_a_circle(room):
    assert find_circle(room, {path: path.read_text() for path in MODULES}) == []


@pytest.mark.parametrize(
    ("source", "circle"),
    [
        ("from .other import z\nfrom ..files import first", []),
        ("from .first import x", ["first", "second", "third"]),
        (
            "if typing.TYPE_CHECKING:\n    from .first import x",
            ["first", "second", "third"],
        ),
        ("def later():\n    from . import second", ["second", "third"]),
        ("import hugging_nano_gpt.verify.second", ["second", "third"]),
    ],
)
def test_modules_that_import_each_other_in_a_circle_are_found(source, circle):
    sources = {"first": "from .second import y", "second": "from .third import z", "third": source, "other": ""}
    paths = {PACKAGE_DIR / "verify" / f"{name}.py": text for name, text in sources.items()}
    assert find_circle("verify", paths) == [f"verify.{name}" for name in circle]


def test_every_room_has_a_layer_and_every_layer_rooms():
    assert {get_room(path) for path in MODULES} == HEIGHTS.keys()


def test_root_of_the_package_has_three_modules():
    assert sorted(path.name for path in PACKAGE_DIR.iterdir() if path.is_file()) == [
        "__init__.py",
        "__main__.py",
        "errors.py",
        "py.typed",
    ]


def test_no_file_is_longer_than_350_lines():
    commands = (PACKAGE_DIR.parent / "hugging_nano_gpt_cli").glob("*.py")
    lengths = {path.name: len(path.read_text().splitlines()) for path in (*MODULES, *commands)}
    assert [name for name, n_lines in lengths.items() if n_lines > 350] in ([], ["modeling_nano_gpt.py"])
