"""Loads warmfork's agent where a program was started by warmfork, and then the sitecustomize that this one stands before.

It runs at the start of every Python program that has this directory on PYTHONPATH: nothing here may break one, or cost one
that has nothing to do with warmfork. It is read by Python 2 too.
"""
import os
import sys


def _start_agent():
    # What cannot have an agent, and what has none to speak to, goes on as if this file were not there.
    if sys.version_info < (3, 9) or sys.implementation.name != "cpython" or not os.environ.get("WARMFORK_SOCKET"):
        return
    try:
        import warmfork  # noqa: F401
    except Exception as error:
        try:
            sys.stderr.write("warmfork: this program goes on without its agent: %r\n" % (error,))
        except Exception:
            pass


def _load_shadowed():
    """Runs the sitecustomize that would have been found had this directory not been on the path: Debian's, a venv's."""
    here = os.path.dirname(os.path.abspath(__file__))
    entries = [os.path.abspath(entry) for entry in sys.path]
    # Only behind this one, so that two of these, of two versions, do not load each other for ever.
    at = entries.index(here) if here in entries else -1
    path = [entry for entry, full in zip(sys.path[at + 1 :], entries[at + 1 :]) if full != here]
    if sys.version_info < (3, 4):
        import imp

        try:
            found = imp.find_module("sitecustomize", path)
        except ImportError:
            return
        imp.load_module("sitecustomize", *found)
        return
    # Not `importlib`: its modules cost a start 3 ms, and the frozen one is there already.
    machinery = sys.modules["_frozen_importlib_external"]
    spec = machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is None or spec.loader is None:
        return
    module = sys.modules["_frozen_importlib"].module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


_start_agent()
_load_shadowed()
