"""What a verification finds, for people and as plain data: no comparing, no printing."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: What was compared.
        is_equal: Whether the two sides are equal in it, within `tolerance`.
        detail: What was found, in words; of a mismatch, the tensor or the layer and both values.
        largest_difference: Largest difference of two numbers, infinite where only one of them is NaN; None where the
            comparison is not one of numbers, or the shapes differ.
        tolerance: Largest difference that was accepted; 0.0 asks for the same bits, None as above.
    """

    name: str
    is_equal: bool
    detail: str
    largest_difference: float | None = None
    tolerance: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the fields in JSON's types; an infinite difference becomes None, as JSON has no such number."""
        return {**vars(self), "largest_difference": to_json_number(self.largest_difference)}


@dataclass(frozen=True)
class VerifyReport:
    """Everything that was compared between two sides.

    Args:
        left: What stands on the left, in words.
        right: What stands on the right.
        checks: The comparisons, in the order they were made.
        notes: What else one should know: what was assumed, left out, or measured without anything to compare it with.
    """

    left: str
    right: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether every check came out equal; False if nothing could be compared, as nothing is proved then."""
        return bool(self.checks) and all(check.is_equal for check in self.checks)

    def __str__(self) -> str:
        width = max([len(check.name) for check in self.checks], default=0)
        lines = [f"left:  {self.left}", f"right: {self.right}", ""]
        lines += [
            f"[{'ok' if check.is_equal else 'WRONG'}]".ljust(8) + f"{check.name:<{width}}  {check.detail}"
            for check in self.checks
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", self._conclude()])

    def to_json(self) -> dict[str, Any]:
        """Returns the same facts as a dict of plain types, for json.dumps."""
        return {
            "left": self.left,
            "right": self.right,
            "is_equal": self.is_equal,
            "checks": [check.to_json() for check in self.checks],
            "notes": list(self.notes),
        }

    def _conclude(self) -> str:
        wrong = [check.name for check in self.checks if not check.is_equal]
        if wrong:
            return f"NOT EQUAL: {len(wrong)} of {len(self.checks)} checks failed: {', '.join(wrong)}."
        if not self.checks:
            return "NOT PROVED: there was nothing to compare with."
        return f"Equal: {len(self.checks)} of {len(self.checks)} checks passed."


def to_json_number(number: float | None) -> float | None:
    """Returns a number, or None in place of what JSON does not have: infinities and NaN."""
    return number if number is not None and math.isfinite(number) else None
