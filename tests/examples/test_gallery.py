"""The scripts of the gallery: what each must have. The build of the documentation runs them."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/gallery").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNS = load(ROOT / "docs/gallery_runs.py")


def test_every_script_has_its_place_and_its_figures():
    assert sorted(RUNS.ORDER) == [script.stem for script in SCRIPTS]
    assert [RUNS.order(f"{script}.py") for script in RUNS.ORDER] == list(range(len(SCRIPTS)))
    assert all(RUNS.FIGURES.values())


def test_a_script_without_a_place_stops_the_build():
    with pytest.raises(ValueError, match="new_one"):
        RUNS.order("new_one.py")


@pytest.mark.parametrize("script", RUNS.ORDER)
def test_a_page_without_its_figures_stops_the_build(script):
    source = (ROOT / f"examples/gallery/{script}.py").read_text()
    assert len(RUNS.misses(script, source)) == len(RUNS.FIGURES[script])


def test_a_figure_out_of_its_range_stops_the_build():
    page = "best of the grid: 9 support vectors, test accuracy 0.784\n{}: 9, test accuracy {}"
    assert not RUNS.misses("svm_layer", page.format("learnt", "0.865"))
    assert len(RUNS.misses("svm_layer", page.format("learnt", "0.784"))) == 1
    assert len(RUNS.misses("svm_layer", page.format("learnt", "nan"))) == 1
    assert len(RUNS.misses("svm_layer", page.format("lernt", "0.865"))) == 1


def test_every_script_is_in_the_table_of_the_examples():
    table = (ROOT / "examples/README.md").read_text()
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\(gallery/", table, re.MULTILINE)
    assert listed == RUNS.ORDER


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
class TestScript:
    def test_is_short_and_has_a_title_and_cells(self, script):
        text = script.read_text()
        title, underline = ast.get_docstring(ast.parse(text)).splitlines()[:2]
        assert underline == "=" * len(title)
        assert len(text.splitlines()) <= 150
        assert text.count("\n# %%\n") >= 4

    def test_uses_the_public_interface_alone(self, script):
        tree = ast.parse(script.read_text())
        private = [
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
        ]
        modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] + [
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        ]
        assert not private
        assert not [name for name in modules if "._" in name]
        assert any(name.split(".")[0] == "hypergrad" for name in modules)

    def test_downloads_nothing_and_hides_nothing(self, script):
        text = script.read_text()
        assert not re.findall(r"fetch_|download|urllib|requests", text)
        assert not re.findall(r"warnings|on_failure|except", text)

    def test_is_the_same_each_time_and_ends_with_a_picture(self, script):
        text = script.read_text()
        assert "torch.manual_seed(0)" in text
        assert text.endswith("plt.show()\n")
        assert len(re.findall(r"plt\.(?:subplots|figure)\(", text)) == 1
        assert "print(" in text
