"""train.py's settings: its defaults, then config files, then --key=value, as its configurator takes them.

nanoGPT executes its config files. Here nothing is executed: a file may assign literals, arithmetic on them and on
other settings, and what nanoGPT's own files do too (`'ft-' + str(time.time())`). As in train.py, a flag has to be one
of its settings, and a file may have names of its own. Source: train.py and configurator.py @ 3adf61e.
"""

import ast
import difflib
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from ..errors import ConversionError, join_some, show

# In train.py's order, which is that of the config in its checkpoints.
TRAIN_DEFAULTS: dict[str, Any] = {
    "out_dir": "out",
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "eval_only": False,
    "always_save_checkpoint": True,
    "init_from": "scratch",
    "wandb_log": False,
    "wandb_project": "owt",
    "wandb_run_name": "gpt2",
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600_000,
    "weight_decay": 1e-1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600_000,
    "min_lr": 6e-5,
    "backend": "nccl",
    "device": "cuda",
    "dtype": "float16",  # where the GPU computes in it, bfloat16: see complete_settings
    "compile": True,
}

_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}

# A number or a text that takes more than this to write is no setting, and may take hours to compute.
_LONGEST = 1000

# nanoGPT's own config files are below 2 KB.
_LARGEST_FILE_BYTES = 2**16


def complete_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all settings of a run: its own, and train.py's defaults for what it lacks."""
    has_bfloat16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return {**TRAIN_DEFAULTS, **({"dtype": "bfloat16"} if has_bfloat16 else {}), **config}


def read_settings(arguments: Sequence[str]) -> dict[str, Any]:
    """Reads train.py's command line: config files and --key=value, the later over the earlier.

    Returns:
        Every setting of train.py, in its order, as its checkpoints have them in `config`.

    Raises:
        ConversionError: If there is a flag that train.py does not have, a name in a file that is nearly a setting's, a
            value of another type than the default's, or a line that is more than an assignment of literals and
            arithmetic on them; every bad key at once.
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


def find_type_fault(name: str, value: Any) -> str | None:
    """Says what is wrong with the type of a setting's value, if anything is."""
    default = TRAIN_DEFAULTS[name]
    if not _is_fitting(value, default):
        kind = type(default).__name__
        return f"{name}: wrong type: expected {kind}, as train.py's default has, got {show(value)}; change it"
    if isinstance(value, Integral) and abs(int(value)) >= 2**63:
        return f"{name}: too large: expected a number below 2**63, got {show(value)}; change it"
    return None


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


def _is_fitting(value: Any, default: Any) -> bool:
    """Returns whether a value has the type of a default; a whole number is also taken for a float, and the reverse."""
    if isinstance(default, bool | str) or isinstance(value, bool):
        return type(value) is type(default)
    return isinstance(value, Integral) or (
        isinstance(value, float) and (isinstance(default, float) or value.is_integer())
    )


def _read_value(text: str, default: Any) -> Any:
    """Reads the value of a flag as train.py does: a literal, or else the text itself; a text stays one."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two of an expression that is too deep
        return text
    return text if isinstance(default, str) and not isinstance(value, str) else value


def _read_file(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the assignments of a config file: of settings, and of names that no later line uses."""
    source, body = _parse(path)
    values = dict(settings)
    found: dict[str, Any] = {}
    helpers: set[str] = set()
    for statement in body:
        where = f"{path}, line {statement.lineno}"
        if isinstance(statement, ast.Import) and [name.name for name in statement.names] == ["time"]:
            continue  # nanoGPT's finetune_shakespeare.py; what it is for is read below, and nothing is imported
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a text that explains
        name = _find_name(statement)
        if name is None:
            raise _refuse(where, source, statement)
        try:
            value = _compute(statement.value, values)  # type: ignore[attr-defined]
        except (_NotPlain, ArithmeticError, TypeError, ValueError, RecursionError) as error:
            if name not in TRAIN_DEFAULTS and _is_literal(statement.value):  # type: ignore[attr-defined]
                continue  # a list, say, which train.py's own lines never read
            raise _refuse(where, source, statement) from error
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


def _find_name(statement: ast.stmt) -> str | None:
    """Returns what a plain assignment, `name = ...`, gives a value to."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
        target = statement.target
    else:
        return None
    return target.id if isinstance(target, ast.Name) else None


class _NotPlain(Exception):  # noqa: N818 - never seen outside of this file
    """An expression is more than literals and arithmetic."""


def _compute(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """Computes an expression of literals, settings and arithmetic."""
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
            if (isinstance(op, ast.Pow) and abs(operands[1]) > 64) or any(
                len(str(part)) > _LONGEST for part in operands
            ):
                raise _NotPlain
            if isinstance(op, ast.Mult) and any(isinstance(part, str) for part in operands):
                raise _NotPlain  # a text many times over
            return _OPERATORS[type(op)](*operands)
        case ast.Call(func=ast.Name(id="str"), args=[argument], keywords=[]):
            return str(_compute(argument, values))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr="time"), args=[], keywords=[]):
            return time.time()
    raise _NotPlain


def _refuse(where: str, source: str, statement: ast.stmt) -> ConversionError:
    line = source.splitlines()[statement.lineno - 1].strip()
    return ConversionError(
        f"{where}: nothing in a config file is executed: expected name = a literal or arithmetic on literals, got "
        f"{show(line)}; write its value"
    )
