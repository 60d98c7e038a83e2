"""The README's script runs as it stands, and does what its comments say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_python_in_it_runs(tmp_path):
    script = "".join(re.findall(r"```python\n(.*?)```", README, re.S))
    steps = re.findall(r"^# (\d)\.", script, re.M)
    assert steps == ["1", "2", "4", "5", "6", "7"]                  # 3 shares a line with 2
    path = tmp_path / "seven_steps.py"
    path.write_text(script)
    out = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=300,
                         check=True).stdout
    without, with_norm, best = (float(re.search(rf"{name}: +([\d.]+)", out).group(1))
                                for name in ("without", "with", "best"))
    assert with_norm >= 0.9
    assert without <= 0.5            # three layers of sigmoids hardly move in six epochs
    assert best >= with_norm - 0.02
    assert "%1: float64[4] = cube(x)    keeps x 32 B" in out
    assert re.search(r"predicted \[(\d, ){4}\d\] true", out)


def test_the_two_commands_are_marked():
    for name in ("main", "tests"):
        assert re.search(rf"<!-- run: {name} -->\n```bash\n[^`]+```", README)


def test_every_command_in_the_table_is_there():
    from nbgrad.cli import main

    named = set(re.findall(r"^\| `nbgrad (\w+)", README, re.M))
    assert named == {"compare", "train", "eval", "doctor", "predict", "graph", "lab", "bench",
                     "info"}
    for name in named:
        with pytest.raises(SystemExit) as left:
            main([name, "--help"])
        assert left.value.code in (0, None)
