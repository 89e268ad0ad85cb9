"""What a report of verify says."""

from hugging_nano_gpt import VerifyReport


def find_wrong(report: VerifyReport) -> dict[str, str]:
    """Returns the detail of every check that failed, by its name."""
    assert report.is_equal == all(check.is_equal for check in report.checks)
    return {check.name: check.detail for check in report.checks if not check.is_equal}
