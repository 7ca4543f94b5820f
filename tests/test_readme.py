"""The README's code and commands are true."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_runs(corpus, cache_dir, dataset, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for published, small in (
        ('"path/to/ptbxl"', f'"{corpus}", cache_dir="{cache_dir}"'),
        ("TaskAugResNet(train)", "TaskAugResNet(train, base_width=4)"),
        ("epochs=10", "epochs=1, warmup_epochs=0"),
    ):
        assert published in code
        code = code.replace(published, small)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "'roc_auc'" in printed
    assert "lead_dropout" in printed


def test_named_files_and_targets_exist():
    root = Path(__file__).parents[1]
    makefile = (root / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (root / path).is_file()
    modules = re.findall(r"^\| `(pyhealth\.[\w.]+)` \|", README, flags=re.MULTILINE)
    assert len(modules) == 7
    for module in modules:
        path = root / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or path.is_dir()
