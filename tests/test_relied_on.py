"""tests/relied_on.py: the table of other libraries' names is true, and make next names what a release has changed."""

import ast
import importlib
import inspect
import pkgutil
import re

import pytest
import transformers

import hugging_nano_gpt

from . import relied_on, run_next


def find_private_names():
    """Returns the names with an underscore that the package reads and does not define."""
    read, own = set(), set()
    for node in (node for tree in relied_on.parse_package() for node in ast.walk(tree)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                own.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(attr=name) if name.startswith("_") and not name.startswith("__"):
                read.add(name)
    return read - own - {"_replace"}  # of namedtuple, documented by Python


def iterate_overrides():
    """Yields the names that a class of the package and a base class in Transformers both define."""
    for module in pkgutil.walk_packages(hugging_nano_gpt.__path__, "hugging_nano_gpt."):
        try:
            classes = vars(importlib.import_module(module.name)).values()
        except ImportError:  # of an extra
            continue
        for each in classes:
            if inspect.isclass(each) and each.__module__ == module.name:
                others = [base for base in each.__mro__ if base.__module__.startswith("transformers.")]
                yield from (name for name in vars(each) if any(name in vars(base) for base in others))


def test_every_private_name_that_is_read_is_in_the_table():
    assert find_private_names() - set(relied_on.list_names()) == set()


def test_every_override_is_in_the_table():
    others = {"_abc_impl", "keys_to_ignore_at_inference"}  # Python's, and one that Trainer reads from any config
    names = {name for name in iterate_overrides() if not name.startswith("__")} - others
    assert names - set(relied_on.list_names()) == set()


def test_every_name_of_the_table_is_used():
    words = set(re.findall(r"\w+", "".join(path.read_text() for path in relied_on.PACKAGE_DIR.rglob("*.py"))))
    assert set(relied_on.list_names()) - words == set()


def test_every_name_of_the_table_is_as_the_package_needs_it():
    assert relied_on.find_changes() == {}


def rename_argument(monkeypatch):
    """Changes what a release that renames an argument changes: the function, and the message of a failing test."""

    def create_causal_mask(config, inputs_embeds, attention_mask, kv_store, position_ids=None):
        raise NotImplementedError

    monkeypatch.setattr(transformers.masking_utils, "create_causal_mask", create_causal_mask)


def remove_private_name(monkeypatch):
    monkeypatch.delattr(transformers.Trainer, "_save_rng_state")


def remove_import(monkeypatch):
    monkeypatch.delattr(transformers.utils.output_capturing, "capture_outputs")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rename_argument, ("transformers.masking_utils.create_causal_mask", "takes no past_key_values|cache")),
        (remove_private_name, ("transformers.Trainer._save_rng_state", "is gone")),
        (remove_import, ("transformers.utils.output_capturing.capture_outputs", "is not there to import")),
    ],
)
def test_what_a_release_changed_is_named_and_the_exit_status_is_1(monkeypatch, capsys, change, expected):
    change(monkeypatch)
    text = f"tests/model/test_cache.py:9: in test_it\n    call()\nE   TypeError: {expected[0]}() got another\nE   more"
    monkeypatch.setattr(run_next, "run_tests", lambda files: [(f"{file}::test_it", text) for file in files])
    assert run_next.main(["tests/model/test_cache.py", "tests/model/test_hub.py"]) == 1
    changed, failed = capsys.readouterr().out.splitlines()[-2:]
    name = expected[0].rpartition(".")[2]
    assert changed == f"| {expected[0]} | {expected[1]} | {name} |"
    error = f"TypeError: {expected[0]}() got another"
    assert failed == f"| tests/model/test_cache.py::test_it and 1 more | {error} | {name} |"


def test_nothing_broken_is_said_and_the_exit_status_is_0(monkeypatch, capsys):
    monkeypatch.setattr(run_next, "run_tests", lambda files: [])
    assert run_next.main(["tests/model/test_cache.py"]) == 0
    assert f"transformers {transformers.__version__}: nothing broken" in capsys.readouterr().out


def test_failures_of_real_tests_are_read(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\ndef test_fails():\n    raise TypeError('no _init_weights')\n\n"
        "@pytest.fixture\ndef broken():\n    raise OSError('no disk')\n\ndef test_has_none(broken):\n    pass\n\n"
        "def test_holds():\n    pass\n"
    )
    (tmp_path / "test_that.py").write_text("import no_such_module\n")
    monkeypatch.setattr(run_next, "ROOT", tmp_path)
    rows = run_next.make_table({}, run_next.run_tests(["."]))
    assert set(rows) == {
        ("test_it.py::test_fails", "TypeError: no _init_weights", "_init_weights"),
        ("test_it.py::test_has_none", "OSError: no disk", "-"),
        ("test_that.py::test_that", "ModuleNotFoundError: No module named 'no_such_module'", "-"),
    }


def test_tests_that_cannot_start_are_broken_too(tmp_path, monkeypatch):
    monkeypatch.setattr(run_next, "ROOT", tmp_path)
    [(name, text)] = run_next.run_tests(["no_such_file.py"])
    assert (name, text[:22]) == ("pytest", "ended with exit status")


def test_requirements_leave_the_newest_out():
    found = run_next.list_requirements()
    assert {"safetensors>=0.4.3", "pytest>=8"} <= set(found)
    assert not [each for each in found if each.startswith(("torch>", "transformers>"))]
