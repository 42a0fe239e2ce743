"""What the annotations of the public names promise to a user with a type checker."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TYPED = ROOT / "tests" / "typed"
ERROR = re.compile(r"^(.+?):(\d+): error: .*\[([a-z-]+)\]$", re.MULTILINE)

pytest.importorskip("mypy")


@pytest.fixture(scope="module")
def found():
    "What mypy refuses in the two files, `{file name: {(line, code)}}`; after `make types` it is quick."
    files = [str(TYPED / name) for name in ("use.py", "misuse.py")]
    run = subprocess.run([sys.executable, "-m", "mypy", *files], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout + run.stderr
    errors = {"use.py": set(), "misuse.py": set()}
    for path, line, code in ERROR.findall(run.stdout):
        errors.setdefault(Path(path).name, set()).add((int(line), code))
    return errors


def test_right_uses_of_the_public_names_pass(found):
    assert not found["use.py"]


def test_wrong_uses_are_refused_each_with_its_code(found):
    marked = set()
    for number, line in enumerate((TYPED / "misuse.py").read_text().splitlines(), 1):
        _, mark, codes = line.partition("# refused: ")
        marked |= {(number, code) for code in codes.split(", ") if mark}
    assert len(marked) > 20
    assert found["misuse.py"] == marked


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "normflow_vi" / "py.typed").exists()
