"""Messages of the commands if a package that they need is missing."""

from __future__ import annotations

from tests.helpers import forked
from tests.helpers.logs import table, write

HIDING = """
import sys
import clip_callbacks  # Lightning has imported its own requirements by now

from clip_callbacks.cli import main

for missing in ("pandas", "matplotlib", "jinja2", "yaml", "tqdm"):
    kept, sys.modules[missing] = sys.modules.get(missing), None
    for name in [name for name in sys.modules if name.startswith("clip_callbacks.html_report")]:
        del sys.modules[name]
    print(missing, main(["report", sys.argv[1]]))
    if kept:
        sys.modules[missing] = kept
    else:
        del sys.modules[missing]
"""


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / "hiding.py").write_text(HIDING)
    done = forked.run(tmp_path / "hiding.py", write(tmp_path, table()), cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.split() == ["pandas", "2", "matplotlib", "2", "jinja2", "2", "yaml", "2", "tqdm", "2"]
    assert done.stderr.count("pip install 'clip_callbacks[report]'") == 5
    assert "Traceback" not in done.stderr
