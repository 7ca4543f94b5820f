"""Packaging of pyhealth-taskaug, an overlay of contributed modules for PyHealth.

The modules live at the paths they would have inside PyHealth. Only folders are
listed, never ``pyhealth`` itself, and none of PyHealth's own folders gets an
``__init__.py`` from here, so an installed PyHealth stays as it is.
"""

from setuptools import setup

setup(
    packages=[
        "pyhealth.datasets",
        "pyhealth.datasets.configs",
        "pyhealth.tasks",
        "pyhealth.models",
        "pyhealth.processors",
        "pyhealth.bilevel",
        "pyhealth.bilevel.study",
    ],
    package_data={
        "pyhealth.datasets.configs": ["ptbxl.yaml", "ecg_folder.yaml"],
        "pyhealth.bilevel.study": ["report.html.jinja"],
    },
)
