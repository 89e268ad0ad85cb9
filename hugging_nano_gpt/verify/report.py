"""The result of a verification: the comparisons made, as text for people and as plain data."""

from dataclasses import asdict, dataclass
from typing import Any

from ..convert.inspect import to_json


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: What was compared.
        is_equal: Whether the two sides are equal, within `tolerance`.
        detail: What was found, in words; for a mismatch, the tensor or the layer and both values.
        largest_difference: Largest difference between two numbers, infinite if only one of them is NaN; None if no
            numbers were compared, or the shapes differ.
        tolerance: Largest difference that is accepted; 0.0 requires the same bits. None as above.
    """

    name: str
    is_equal: bool
    detail: str
    largest_difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class VerifyReport:
    """All comparisons of two sides.

    Args:
        left: What is on the left, in words.
        right: What is on the right.
        checks: The comparisons, in the order in which they were made.
        notes: What was assumed or could not be compared, a sentence each.
    """

    left: str
    right: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether all checks passed."""
        return all(check.is_equal for check in self.checks)

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        wrong = [check.name for check in self.checks if not check.is_equal]
        n_checks = len(self.checks)
        conclusion = (
            f"NOT EQUAL: {len(wrong)} of {n_checks} checks failed: {', '.join(wrong)}."
            if wrong
            else f"Equal: {n_checks} of {n_checks} checks passed."
        )
        return "\n".join(
            [
                f"left:  {self.left}",
                f"right: {self.right}",
                "",
                *(f"{'[ok]' if c.is_equal else '[WRONG]':<8}{c.name:<{width}}  {c.detail}" for c in self.checks),
                *(f"note: {note}" for note in self.notes),
                "",
                conclusion,
            ]
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the same facts as a dict for json.dumps."""
        return to_json({**asdict(self), "is_equal": self.is_equal})
