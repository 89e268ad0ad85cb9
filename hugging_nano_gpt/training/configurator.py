"""train.py's command line: config files and --key=value, as its configurator.py (@ 3adf61e) reads them.

nanoGPT executes its config files. Here nothing is executed: a file may assign literals, arithmetic on them and on
other settings, and what nanoGPT's own files use too (`'ft-' + str(time.time())`). As in train.py, a flag has to be one
of its settings, and a file may define names of its own.
"""

import ast
import difflib
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConversionError, join_some, show
from .train_settings import TRAIN_DEFAULTS, complete_settings, find_type_fault

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}

# Characters of a number or a text. A longer one is no setting, and may take hours to compute.
_LONGEST = 1000

# nanoGPT's own config files are below 2 KB.
_LARGEST_FILE_BYTES = 2**16


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads train.py's command line: config files and --key=value; later ones override earlier ones.

    Returns:
        Every setting of train.py, in its order, as its checkpoints have them in `config`.

    Raises:
        ConversionError: If a flag is not a setting of train.py's, a name in a file is almost that of one, a value has
            another type than the default, or a line is more than an assignment of literals and arithmetic; all bad
            names at once.
    """
    settings = complete_settings({})
    faults = []
    for argument in arguments:
        if "=" not in argument and not argument.startswith("--"):
            found = _read_file(Path(argument), settings)
            faults += [f"{argument}: {fault}" for fault in _find_faults(found, is_file=True)]
        elif "=" in argument and argument.startswith("--"):
            name, text = argument.removeprefix("--").split("=", 1)
            found = {name: _read_value(text, TRAIN_DEFAULTS.get(name))}
            faults += [f"--{name[:_LONGEST]}: {fault}" for fault in _find_faults(found, is_file=False)]
        else:
            raise ConversionError(
                f"{argument}: not a setting: expected a config file or --key=value, got neither; write --key=value"
            )
        settings |= {name: value for name, value in found.items() if name in TRAIN_DEFAULTS}
    if faults:
        raise ConversionError(join_some(faults))
    return settings


def _find_faults(found: Mapping[str, Any], is_file: bool) -> list[str]:
    faults = []
    for name, value in found.items():
        if name in TRAIN_DEFAULTS:
            fault = find_type_fault(name, value)
            faults += [fault] if fault else []
            continue
        near = [] if is_file and name.startswith("_") else difflib.get_close_matches(name, TRAIN_DEFAULTS, 1)
        advice = f"write {near[0]}" if near else "leave it out"
        if is_file and near:
            advice += f", or _{name} for a name of your own"
        if near or not is_file:
            faults.append(f"unknown setting: expected one of train.py's, got {show(name)}; {advice}")
    return faults


def _read_value(text: str, default: Any) -> Any:
    """Reads the value of a flag as train.py does: as a literal, or else as text; a text setting stays text."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two if an expression is too deep
        return text
    return text if isinstance(default, str) and not isinstance(value, str) else value


def _read_file(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the assignments of a config file: to settings, and to names that no later line uses."""
    source, statements = _parse(path)
    values, found = dict(settings), {}
    helpers: set[str] = set()
    for statement in statements:
        match statement:
            case ast.Import(names=[ast.alias(name="time")]):
                continue  # in nanoGPT's finetune_shakespeare.py; _compute knows time.time(), and nothing is imported
            case ast.Expr(value=ast.Constant()):
                continue  # a docstring
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=expression)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as expression)
            ):
                pass
            case _:
                raise _refuse(path, source, statement)
        try:
            value = _compute(expression, values)
        except (ArithmeticError, TypeError, ValueError, RecursionError) as error:
            if name not in TRAIN_DEFAULTS and _is_literal(expression):
                continue  # such as a list, which train.py's own lines never read
            raise _refuse(path, source, statement) from error
        helpers |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)} - {name}
        values[name] = found[name] = value
    return {name: value for name, value in found.items() if name in TRAIN_DEFAULTS or name not in helpers}


def _parse(path: Path) -> tuple[str, list[ast.stmt]]:
    """Returns the text of a config file, and its statements."""
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE_BYTES + 1)
        if len(data) > _LARGEST_FILE_BYTES:
            raise ValueError(f"more than {_LARGEST_FILE_BYTES:,} bytes")
        source = data.decode("utf-8")
        return source, ast.parse(source, str(path)).body
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError) as error:
        is_deep = isinstance(error, MemoryError | RecursionError)
        reason = "an expression too long or too deep for Python" if is_deep else error
        raise ConversionError(
            f"{path}: cannot be read: expected a config file of nanoGPT's, got: {reason}; check the path"
        ) from error


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _compute(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """Computes an expression of literals, settings and arithmetic; raises ValueError for any other."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.Name(id=name) if name in values:
            return values[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
            value = _compute(operand, values)
            return -value if isinstance(sign, ast.USub) else +value
        case ast.BinOp(op=op, left=left, right=right) if type(op) in _OPERATORS:
            operands = _compute(left, values), _compute(right, values)
            is_long = any(len(str(operand)) > _LONGEST for operand in operands)
            is_power = isinstance(op, ast.Pow) and abs(operands[1]) > 64
            is_repeated = isinstance(op, ast.Mult) and any(isinstance(operand, str) for operand in operands)
            if not (is_long or is_power or is_repeated):
                return _OPERATORS[type(op)](*operands)
        case ast.Call(func=ast.Name(id="str"), args=[argument], keywords=[]):
            return str(_compute(argument, values))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]):
            return time.time()
    raise ValueError("more than literals and arithmetic")


def _refuse(path: Path, source: str, statement: ast.stmt) -> ConversionError:
    line = source.splitlines()[statement.lineno - 1].strip()
    return ConversionError(
        f"{path}, line {statement.lineno}: nothing in a config file is executed: expected name = a literal or "
        f"arithmetic on literals, got {show(line)}; write its value"
    )
