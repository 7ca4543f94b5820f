"""The overlay installs beside an untouched PyHealth and goes without a trace.

Nothing here uses a network. Wheel and editable install are real ones, each into a new
virtual environment that holds its own copy of PyHealth (7 MB) and sees the large
dependencies of the environment that runs the tests through links.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = "ptbxl_ecg_classification_taskaug_resnet.py"
#: Files of policies/ are installed in a folder of their own below pyhealth.
POLICIES = "pyhealth/models/policies"
OURS = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "pyhealth").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
PUBLISHED = {path.name for path in (ROOT / "policies").iterdir() if path.is_file()}
INSTALLED = OURS | {f"{POLICIES}/{name}" for name in PUBLISHED}
# "pyhealth/bilevel/__init__.py" is the module pyhealth.bilevel.
MODULES = sorted(
    path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for path in OURS
    if path.endswith(".py")
)

# Prints where each module of argv would be imported from. Packages are located but not
# run: PyHealth's own take up to ten seconds each. Only pyhealth itself is imported.
LOCATE = """
import importlib.util, json, sys
import pyhealth

def locate(name):
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        spec = locate(parent)
        if spec is None:
            return None
        sys.modules[parent] = importlib.util.module_from_spec(spec)
    return importlib.util.find_spec(name)

specs = {name: locate(name) for name in ["pyhealth.datasets", *sys.argv[1:]]}
print(json.dumps({name: spec and spec.origin for name, spec in specs.items()}))
"""


# Prints the published policies, each of which is loaded by its name.
IMPORT_AND_LOAD = """
import pyhealth.bilevel
from pyhealth.models.learned_augmentation import LearnedAugmentation
from pyhealth.models.published_policies import published_policies
for name in published_policies():
    print(LearnedAugmentation.published(name).provenance["task"])
"""


def run(*command, cwd, **env):
    """Run a command in a bare environment and return its output; fail with it."""
    bare = {
        "PATH": os.defpath,
        "HOME": str(cwd),  # PyHealth makes ~/.cache/pyhealth
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        # Else an import would write byte-code into the PyHealth that is compared.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=bare | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_of_the_project(target):
    """Copy what a build reads, so that it leaves nothing in the checkout."""
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, target)
    for name in OURS:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    (target / "policies").mkdir()
    for name in PUBLISHED:
        shutil.copy2(ROOT / "policies" / name, target / "policies")
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built once."""
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_project(folder / "source")
    pip_wheel = ("pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder)
    run(sys.executable, "-m", *pip_wheel, source, cwd=folder)
    (path,) = folder.glob("pyhealth_taskaug-*.whl")
    return path


@pytest.fixture(scope="module")
def record():
    """The files that PyHealth's own distribution says it installed."""
    return {path.as_posix() for path in importlib.metadata.files("pyhealth")}


def wheel_files(wheel):
    """The wheel's files that land outside its own dist-info folder."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    return {name for name in names if ".dist-info/" not in name}


def test_the_wheel_holds_every_file_of_the_overlay_and_no_other(wheel):
    assert wheel_files(wheel) == INSTALLED


def test_the_source_distribution_holds_everything_that_a_checkout_does(tmp_path):
    """All that is needed to run the tests and to make the documents again."""
    folders = ("benchmarks", "docs", "examples", "policies", "pyhealth", "tests")
    folders += ("tools",)
    files = (
        ".pre-commit-config.yaml",
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
    )
    files += ("MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
    passed_over = shutil.ignore_patterns("__pycache__", "_build", "_generated")
    for name in folders:
        shutil.copytree(ROOT / name, tmp_path / "a" / name, ignore=passed_over)
    for name in files:
        shutil.copy2(ROOT / name, tmp_path / "a")
    expected = {
        path.relative_to(tmp_path / "a").as_posix()
        for path in (tmp_path / "a").rglob("*")
        if path.is_file()
    }
    build = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
    run(sys.executable, "-c", build, cwd=tmp_path / "a")
    (path,) = (tmp_path / "dist").iterdir()
    with tarfile.open(path) as archive:
        names = [m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()]
    assert expected <= set(names)
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert set(names) - expected <= made


def test_the_citation_has_the_version_of_the_package(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {project['version']}" in lines
    assert f"license: {project['license']}" in lines
    assert wheel.name.split("-")[1] == project["version"]
    assert importlib.metadata.version("pyhealth-taskaug") == project["version"]


@pytest.mark.slow
def test_the_package_index_would_take_the_distributions(wheel, tmp_path):
    """What ``make dist`` does, without a network."""
    source = copy_of_the_project(tmp_path / "source")
    build = ("-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source)
    run(sys.executable, *build, cwd=tmp_path)
    made = sorted((tmp_path / "dist").iterdir())
    assert [path.suffix for path in made] == [".whl", ".gz"]
    assert made[0].name == wheel.name
    told = run(sys.executable, "-m", "twine", "check", "--strict", *made, cwd=tmp_path)
    assert told.count("PASSED") == 2


def test_no_file_of_the_overlay_overwrites_one_of_pyhealth(wheel, record):
    assert "pyhealth/datasets/__init__.py" in record  # the right RECORD was read
    assert not (INSTALLED | wheel_files(wheel)) & record


def test_folders_of_pyhealth_get_no_init_file(wheel, record):
    folders = {name.rpartition("/")[0] for name in record}
    inits = {
        name for name in INSTALLED | wheel_files(wheel) if name.endswith("/__init__.py")
    }
    own = {"pyhealth/bilevel", "pyhealth/bilevel/study", POLICIES}
    assert inits == {f"{folder}/__init__.py" for folder in own}
    assert not {name.rpartition("/")[0] for name in inits} & folders


def test_the_requirement_is_the_pyhealth_the_files_were_compared_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    compared = importlib.metadata.version("pyhealth")
    assert f"pyhealth=={compared}" in project["dependencies"]


def site_packages(environment):
    """The folder that packages of a virtual environment lie in."""
    base = {"base": str(environment), "platbase": str(environment)}
    return Path(sysconfig.get_path("purelib", "venv", vars=base))


def link_dependencies(site):
    """Link every installed package except PyHealth and this project into ``site``.

    Links rather than a .pth line: pip would otherwise see the editable install of this
    project in the outer environment and refuse to install a second one.
    """
    outer = [
        Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))
    ]
    for entry in (entry for folder in outer for entry in folder.iterdir()):
        ours = entry.name.startswith(("pyhealth", "__editable__"))
        start_up = entry.suffix == ".pth" or entry.name == "__pycache__"
        if not ours and not start_up and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)


@pytest.fixture
def environment(tmp_path):
    """A virtual environment with a copy of PyHealth, without this project."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    site = site_packages(folder)
    for path in importlib.metadata.files("pyhealth"):
        source = Path(path.locate())
        if ".." not in path.parts and source.is_file():
            (site / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, site / path)  # with its time: byte-code stays valid
    link_dependencies(site)
    return folder


def snapshot(site):
    """Hash every file of PyHealth's folder and of its metadata."""
    return {
        path.relative_to(site).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in ("pyhealth", "pyhealth-2.1.0.dist-info")
        for path in (site / folder).rglob("*")
        if path.is_file()
    }


def locate(python, cwd):
    """Where ``python`` would import our modules from: one path or None for each."""
    found = json.loads(run(python, "-c", LOCATE, *MODULES, cwd=cwd))
    package = Path(found.pop("pyhealth.datasets"))
    assert package.resolve().is_relative_to(site_packages(python.parents[1]).resolve())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_an_install_works_and_leaves_pyhealth_whole(
    editable, environment, wheel, tmp_path
):
    python, site = environment / "bin" / "python", site_packages(environment)
    source = copy_of_the_project(tmp_path / "source")
    before = snapshot(site)
    absent = dict.fromkeys(MODULES)
    assert locate(python, tmp_path) == absent

    what = ("--no-build-isolation", "--editable", source) if editable else (wheel,)
    run(python, "-m", "pip", "install", "--no-deps", *what, cwd=tmp_path)

    home = (source if editable else site).resolve()
    found = locate(python, tmp_path)
    assert {"pyhealth.datasets.ptbxl", "pyhealth.bilevel"} <= found.keys()
    paths = (Path(path).resolve() for path in found.values())
    places = {path.relative_to(home).as_posix() for path in paths}
    assert places == {path for path in OURS if path.endswith(".py")}
    for name in ("ptbxl.yaml", "ecg_folder.yaml"):
        assert (home / "pyhealth/datasets/configs" / name).is_file()
    assert (home / "pyhealth/bilevel/study/report.html.jinja").is_file()
    assert run(python, "-c", IMPORT_AND_LOAD, cwd=tmp_path).split() == sorted(
        name.removesuffix(".json") for name in PUBLISHED if name.endswith(".json")
    )
    # PyHealth's files are as they were, and the new ones are ours and their byte-code.
    now = snapshot(site)
    assert {name: now.get(name) for name in before} == before
    added = {name for name in now.keys() - before.keys() if "__pycache__" not in name}
    assert added == (set() if editable else INSTALLED)

    run(python, "-m", "pip", "uninstall", "--yes", "pyhealth-taskaug", cwd=tmp_path)
    assert snapshot(site) == before
    assert not (site / "pyhealth/bilevel").exists()
    assert not (site / POLICIES).exists()
    assert locate(python, tmp_path) == absent


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(environment, wheel, tmp_path):
    """Nothing of the checkout is on the path, and the example lies by itself."""
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-deps", wheel, cwd=tmp_path)
    shutil.copy2(ROOT / "examples" / DEMO, tmp_path)
    small = ("--epochs", "2", "--n_records", "100", "--base_width", "4")
    out = ("--output_dir", tmp_path / "out", "--cache_dir", tmp_path / "cache")
    told = run(python, DEMO, "--synthetic", *small, *out, cwd=tmp_path)
    assert "test records: AUROC" in told
    configuration = json.loads((tmp_path / "out/config.json").read_text())
    assert configuration["versions"]["pyhealth-taskaug"] == wheel.name.split("-")[1]
    assert (tmp_path / "out/policy.png").is_file()


@pytest.mark.parametrize(
    "start", [("-c", "import probe"), ("-m", "probe"), ("probe.py",)]
)
def test_the_checkout_on_the_path_does_not_hide_pyhealth(start, tmp_path):
    """Python started in the checkout has its pyhealth/, a mere folder, in front."""
    (tmp_path / "pyhealth/datasets").mkdir(parents=True)
    report = "import sys, pyhealth\nprint(sys.path[0])\nprint(pyhealth.__file__)\n"
    (tmp_path / "probe.py").write_text(report)
    first, origin = run(sys.executable, *start, cwd=tmp_path).splitlines()
    assert Path(tmp_path / first).resolve() == tmp_path.resolve()
    installed = importlib.metadata.distribution("pyhealth").locate_file("pyhealth")
    assert Path(origin).parent.resolve() == Path(installed).resolve()
    assert not (ROOT / "pyhealth/__init__.py").exists()
