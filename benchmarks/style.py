"""How the text of the code reads, in numbers; other installed packages can stand beside it.

.venv/bin/python benchmarks/style.py [PACKAGE ...]
"""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import statistics
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = "normflow_vi"
GENERATED = ("_modidx.py",)
POSITIONAL = 8
LOOPS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def sources(folder):
    """The Python files below `folder` that a person reads."""
    return [path for path in sorted(Path(folder).rglob("*.py")) if path.name not in GENERATED]


def lines_of(path):
    """The lines of a file that hold code or text: no empty ones, no comments on lines of their own."""
    lines = path.read_text().splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def widths(paths):
    """The width of each line of code, sorted."""
    return sorted(len(line.rstrip()) for path in paths for line in lines_of(path))


def nodes_per_line(paths):
    """Nodes of the syntax tree for each line of a file, empty ones and comments included."""
    texts = [path.read_text() for path in paths]
    nodes = sum(1 for text in texts for _ in ast.walk(ast.parse(text)))
    return nodes / sum(len(text.splitlines()) for text in texts)


def count_semicolons(path):
    """Statements that share a line with the one before them."""
    count = 0
    for node in ast.walk(ast.parse(path.read_text())):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, [])
            if not isinstance(block, list):
                continue
            pairs = zip(block, block[1:], strict=False)
            count += sum(first.end_lineno == second.lineno for first, second in pairs)
    return count


def count_nested_comprehensions(path):
    """Comprehensions inside comprehensions."""
    found = 0
    for outer in ast.walk(ast.parse(path.read_text())):
        if isinstance(outer, LOOPS):
            found += any(isinstance(inner, LOOPS) for inner in ast.walk(outer) if inner is not outer)
    return found


def functions(path):
    """All functions of a file, methods and inner ones included."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def positional(function):
    """The names of a function's positional parameters, without `self` and `cls`."""
    arguments = function.args.posonlyargs + function.args.args
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def crowded(paths):
    """Functions with more positional parameters than one keeps in mind, `file: name (count)`."""
    return [
        f"{path.name}: {function.name} ({len(positional(function))})"
        for path in paths
        for function in functions(path)
        if len(positional(function)) > POSITIONAL
    ]


def module_names(package):
    """The names of a package's modules, itself first; generated and executable ones left out."""
    found = pkgutil.walk_packages(importlib.import_module(package).__path__, package + ".")
    names = [module.name for module in found]
    return [package] + [name for name in names if name.rpartition(".")[2] not in ("_modidx", "__main__")]


def defined(module):
    """The names in a module's `__all__` that it defines itself: functions, classes and constants."""
    values = {name: getattr(module, name) for name in getattr(module, "__all__", [])}
    return [
        name
        for name, value in values.items()
        if getattr(value, "__module__", module.__name__) == module.__name__ or not callable(value)
    ]


def public_names(package=PACKAGE):
    """The public names of a package, as `module.name`: each once, where it is defined."""
    found, values = [], []
    for module in map(importlib.import_module, module_names(package)):
        for name in defined(module):
            value = getattr(module, name)
            if not inspect.ismodule(value) and not any(value is other for other in values):
                values.append(value)
                found.append(f"{module.__name__}.{name}")
    return found


def signatures(name):
    """The functions that a public name stands for, by label: itself, or a class's public methods."""
    value = pkgutil.resolve_name(name)
    if inspect.isfunction(value):
        return {name: value}
    if not isinstance(value, type):
        return {}
    own = {key: member for key, member in vars(value).items() if key == "__init__" or key[0] != "_"}
    plain = {key: getattr(member, "__func__", member) for key, member in own.items()}
    written = {key: member for key, member in plain.items() if inspect.isfunction(member)}
    return {f"{name}.{key}": m for key, m in written.items() if _is_written_here(m)}


def _is_written_here(function):
    "Not made by `dataclass` or by `Protocol`."
    return function.__code__.co_filename != "<string>" and function.__module__ != "typing"


def unannotated(name):
    """The parameters, and `return`, that lack an annotation in what a public name stands for."""
    missing = []
    for label, function in signatures(name).items():
        parameters = list(inspect.signature(function).parameters.values())
        bare = [p.name for p in parameters if p.annotation is p.empty and p.name not in ("self", "cls")]
        if "return" not in function.__annotations__ and not label.endswith("__init__"):
            bare.append("return")
        missing += [f"{label}: {parameter}" for parameter in bare]
    return missing


def depth(cls, package=PACKAGE):
    """How many classes of the package stand one upon the other in `cls`."""
    if not cls.__module__.startswith(package):
        return 0
    return 1 + max(depth(base, package) for base in cls.__bases__)


def ladders(package=PACKAGE):
    """The depth of each class of the package, `{module.name: depth}`."""
    found = {}
    for module in map(importlib.import_module, module_names(package)):
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__.startswith(package):
                found[f"{value.__module__}.{value.__qualname__}"] = depth(value, package)
    return found


def measure_text(folder):
    """The figures of the text of all files below a folder."""
    paths = sources(folder)
    width = widths(paths)
    thousand = len(width) / 1000
    return {
        "lines": len(width),
        "mean characters a line": round(statistics.fmean(width)),
        "width p50 / p90 / p99": " / ".join(str(width[int(p * len(width))]) for p in (0.5, 0.9, 0.99)),
        "lines over 100 columns": f"{sum(w > 100 for w in width) / len(width):.1%}",
        "syntax nodes a line": f"{nodes_per_line(paths):.1f}",
        "statements after `;`, per 1,000 lines": f"{sum(map(count_semicolons, paths)) / thousand:.1f}",
        "nested comprehensions per 1,000": f"{sum(map(count_nested_comprehensions, paths)) / thousand:.1f}",
        "functions with 9 or more positional parameters": len(crowded(paths)),
    }


def measure_names():
    """The figures of this package's public names and classes."""
    names = public_names()
    examples = [name for name in names if ">>>" in (pkgutil.resolve_name(name).__doc__ or "")]
    functions_of = [label for name in names for label in signatures(name)]
    incomplete = {entry.partition(":")[0] for name in names for entry in unannotated(name)}
    deepest = Counter(ladders()).most_common(1)[0]
    return {
        "public names": len(names),
        "docstrings with an example": len(examples),
        "public functions and methods, all annotated": f"{len(functions_of) - len(incomplete)} of "
        f"{len(functions_of)}",
        "deepest class": f"{deepest[1]} ({deepest[0]})",
    }


def main(packages):
    """Print the table: this package, its tests and benchmarks, then other packages."""
    folders = {"package": ROOT / PACKAGE, "tests": ROOT / "tests", "benchmarks": ROOT / "benchmarks"}
    for name in packages:
        folders[name] = Path(importlib.util.find_spec(name).origin).parent
    columns = {name: measure_text(folder) for name, folder in folders.items()}
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for row in columns["package"]:
        print(f"| {row} | " + " | ".join(str(column[row]) for column in columns.values()) + " |")
    print()
    for row, value in measure_names().items():
        print(f"{row}: {value}")


if __name__ == "__main__":
    main(sys.argv[1:])
