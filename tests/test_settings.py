"The settings file: sections that inherit, and the errors that name what is wrong with one."

import pytest

from normflow_vi.utils import settings as module
from normflow_vi.utils.settings import list_repeats, project_root, read_section, settings

EXAMPLE = """
[trial.quick]
updates = 1000
seeds = (0, 1)
rate = 1e-3

[trial.paper]
like = trial.quick
updates = 50000

[trial.longest]
like = trial.paper
seeds = (0, 1, 2)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    "Write a settings file into a project of its own."
    monkeypatch.setenv("NORMFLOW_VI_ROOT", str(tmp_path))

    def write(text):
        (tmp_path / "settings.ini").write_text(text)
        return tmp_path / "settings.ini"

    return write


def test_a_section_lists_its_differences(write):
    write(EXAMPLE)
    assert read_section("trial.paper") == {"updates": 50000, "seeds": (0, 1), "rate": 1e-3}
    assert settings("trial", "paper") == read_section("trial.paper")
    assert read_section("trial.longest") == {"updates": 50000, "seeds": (0, 1, 2), "rate": 1e-3}


def test_what_is_handed_out_is_a_copy(write):
    write(EXAMPLE)
    read_section("trial.paper")["updates"] = 1
    read_section("trial.quick").clear()
    assert read_section("trial.paper") == {"updates": 50000, "seeds": (0, 1), "rate": 1e-3}


@pytest.mark.parametrize(
    "text, error, words",
    [
        ("[a]\nlike = b\n", KeyError, ["no section [b]", "[a] is like it"]),
        ("[a]\nlike = a\n", ValueError, ["[a] is like itself", "a like a"]),
        ("[a]\nlike = b\n[b]\nlike = c\n[c]\nlike = a\n", ValueError, ["a like b like c like a"]),
        ("[b]\nx = 1\n", KeyError, ["no section [a]", "it has b"]),
        ("[a]\nrate = nan\n", ValueError, ["[a] rate = nan"]),
    ],
)
def test_a_wrong_file_is_named(write, text, error, words):
    write(text)
    with pytest.raises(error) as caught:
        read_section("a")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_rules_hold_for_inherited_values_too(write):
    write(EXAMPLE)
    rules = {"updates": (int, 1, 10**6), "seeds": [(int, 0, 99)], "rate": (float, 1e-2, 1.0)}
    with pytest.raises(ValueError, match=r"\[trial.paper\] rate = 0.001: allowed is float from 0.01"):
        settings("trial", "paper", rules)
    with pytest.raises(ValueError, match=r"not known are \['rate'\]"):
        settings("trial", "paper", {name: rules[name] for name in ("updates", "seeds")})


@pytest.mark.parametrize(
    "line, is_repeat",
    [("updates = 1000", True), ("rate = 0.001", True), ("updates = 1000.0", False), ("other = 1", False)],
)
def test_a_repeated_value_is_found(write, line, is_repeat):
    path = write(f"{EXAMPLE}\n[trial.smoke]\nlike = trial.quick\n{line}\n")
    assert list_repeats(path) == (["[trial.smoke] " + line.split()[0]] if is_repeat else [])


def test_no_line_of_the_file_repeats_an_inherited_value():
    path = project_root() / "settings.ini"
    assert list_repeats(path) == []
    for name in module._read_sections(path, path.stat().st_mtime_ns):
        assert read_section(name), name  # each can be read
