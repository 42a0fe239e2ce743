"""Runs notebooks as `nbdev-test` does, each in a fork of one process that has imported what they share.

`python run_pages.py PATH...`; the names of those that fail come last. A page may change folders, signals
and the environment: no other page sees it.
"""

import importlib
import os
import sys

from nbdev.test import test_nb

SHARED = "torch", "numba", "scipy.stats", "matplotlib.pyplot", "IPython.display", "normflow_vi.experiments"


def run(path):
    """Whether a page runs to its end, in a process of its own."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    good = False
    try:
        good = test_nb(path)[0]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0 if good else 1)


if __name__ == "__main__":
    for name in SHARED:
        importlib.import_module(name)
    sys.exit(" ".join(path for path in sys.argv[1:] if not run(path)) or 0)
