"""Let Python import PyHealth from one folder only, in every process that sees this.

Python imports ``sitecustomize`` at its start from a folder on PYTHONPATH. An editable
install, of this project or of PyHealth, would otherwise serve a module that the folder
UPSTREAM_TREE lacks.
"""

import os
import sys
from importlib.machinery import PathFinder


class OnlyTheCopy:
    """Find ``pyhealth`` and its modules below one folder, or fail."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Return the module's spec; None if it is none of PyHealth's."""
        if name.partition(".")[0] != "pyhealth":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            raise ModuleNotFoundError(f"the copy of PyHealth has no {name}", name=name)
        # A folder without __init__.py has places instead of an origin.
        places = [spec.origin] if spec.origin else list(spec.submodule_search_locations)
        copy = os.path.join(os.path.realpath(os.environ["UPSTREAM_TREE"]), "")
        strangers = [p for p in places if not os.path.realpath(p).startswith(copy)]
        if strangers:
            raise ImportError(f"{name} is from {strangers[0]}, not from {copy}")
        return spec


sys.meta_path.insert(0, OnlyTheCopy)
