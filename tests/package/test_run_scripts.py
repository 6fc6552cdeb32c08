"""Examples and benchmarks as ``make examples`` runs them: as an interpreter of their own would, none of them in vain."""

from __future__ import annotations

from tests.helpers import run_scripts

SCRIPT = """
import sys, warnings
warnings.warn("mind the gap")
print(__name__, sys.argv[1:])
"""


def test_a_script_gets_its_words_and_warns_unless_it_is_told_not_to(tmp_path, capsys):
    (tmp_path / "script.py").write_text(SCRIPT)
    assert run_scripts.main([f"{tmp_path}/script.py one 'two words'"]) == 0
    shown = capsys.readouterr().out
    assert "__main__ ['one', 'two words']" in shown
    assert "mind the gap" in shown
    assert run_scripts.main([f"-W ignore {tmp_path}/script.py"]) == 0
    shown = capsys.readouterr().out
    assert "__main__ []" in shown
    assert "mind the gap" not in shown


def test_one_that_fails_is_told_and_the_others_run(tmp_path, capsys):
    (tmp_path / "fails.py").write_text("raise SystemExit('out of paper')")
    (tmp_path / "script.py").write_text(SCRIPT)
    assert run_scripts.main([f"{tmp_path}/fails.py", f"{tmp_path}/script.py"]) == 1
    shown = capsys.readouterr().out
    assert "out of paper" in shown
    assert "exit status 1" in shown
    assert "__main__ []" in shown
