"""A short run of tests/stress/fuzz_inputs.py: damaged files of every sort are taken or refused in one line."""

from tests.stress.fuzz_inputs import fuzz


def test_damaged_files_are_taken_or_refused():
    """A .jsonl file that holds `null` once killed the process: pyarrow crashes there without an exception."""
    outcomes, failures = fuzz(tries=200, seed=1)
    assert failures == []
    assert outcomes["taken"] > 20
    assert outcomes["refused"] > 20
