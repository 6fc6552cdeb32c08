"""The faults that ``make mutations`` plants; where one has been planted, this file is left out."""

from __future__ import annotations

from tests.helpers.mutations import FAULTS, outdated


def test_each_fault_can_be_planted():
    assert not outdated(), "\n".join(outdated().values())
    assert all(fault.wrong != fault.right for fault in FAULTS)
