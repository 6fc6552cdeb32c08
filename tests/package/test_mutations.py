"""The faults that ``make mutations`` plants; where one has been planted, this file is left out."""

from __future__ import annotations

from tests.helpers.mutations import FAULTS, PACKAGE, ROOT


def test_each_fault_can_be_planted():
    lost = [fault for fault in FAULTS if (ROOT / PACKAGE / fault.file).read_text().count(fault.right) != 1]
    assert not lost, "each text must stand once in its file"
    assert all(fault.wrong != fault.right for fault in FAULTS)
