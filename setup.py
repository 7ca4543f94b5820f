"""Packaging of pyhealth-taskaug, an overlay of contributed modules for PyHealth.

The modules live at the paths they would have inside PyHealth. Only folders are
listed, never ``pyhealth`` itself, and none of PyHealth's own folders gets an
``__init__.py`` from here, so an installed PyHealth stays as it is. The folder
``policies/`` is installed as ``pyhealth.models.policies``, files without code.
"""

from setuptools import setup

setup(
    packages=[
        "pyhealth.datasets",
        "pyhealth.datasets.configs",
        "pyhealth.tasks",
        "pyhealth.models",
        "pyhealth.models.policies",
        "pyhealth.processors",
        "pyhealth.bilevel",
        "pyhealth.bilevel.study",
    ],
    package_dir={"pyhealth.models.policies": "policies"},
    package_data={
        "pyhealth.datasets.configs": ["ptbxl.yaml", "ecg_folder.yaml"],
        "pyhealth.bilevel.study": ["report.html.jinja"],
        "pyhealth.models.policies": ["*.json", "*.md"],
    },
)
