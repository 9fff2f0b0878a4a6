"""The scripts of the gallery: what each must have. The build of the documentation runs them."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples/gallery").glob("*.py"))
HOWTOS = sorted((ROOT / "examples/howto").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNS = load(ROOT / "docs/gallery_runs.py")


def test_every_script_has_its_place_and_its_figures():
    assert sorted(RUNS.FIGURES) == [script.stem for script in SCRIPTS]
    howtos = [*RUNS.HOWTO_FIGURES, *RUNS.HOWTO_ELSEWHERE]
    assert sorted(howtos) == [script.stem for script in HOWTOS]
    assert [RUNS.order(f"{script}.py") for script in RUNS.ORDER] == list(range(len(RUNS.ORDER)))
    assert all(all(figures.values()) for figures in RUNS.GALLERIES.values())


def test_a_script_without_a_place_stops_the_build():
    with pytest.raises(ValueError, match="new_one"):
        RUNS.order("new_one.py")


@pytest.mark.parametrize("home", RUNS.GALLERIES)
def test_a_page_without_its_figures_stops_the_build(home):
    for script, figures in RUNS.GALLERIES[home].items():
        source = (ROOT / f"examples/{home}/{script}.py").read_text()
        assert len(RUNS.misses(script, source)) == len(figures)


def test_a_figure_out_of_its_range_stops_the_build():
    page = "best of the grid: 9 support vectors, test accuracy 0.784\n{}: 9, test accuracy {}"
    assert not RUNS.misses("svm_layer", page.format("learnt", "0.865"))
    assert len(RUNS.misses("svm_layer", page.format("learnt", "0.784"))) == 1
    assert len(RUNS.misses("svm_layer", page.format("learnt", "nan"))) == 1
    assert len(RUNS.misses("svm_layer", page.format("lernt", "0.865"))) == 1


def test_every_script_is_in_the_table_of_the_examples():
    table = (ROOT / "examples/README.md").read_text()
    listed = re.findall(r"^\| \[`(\w+)\.py`\]\(gallery/", table, re.MULTILINE)
    assert listed == list(RUNS.FIGURES)


def test_the_index_of_the_how_tos_lists_each_in_its_order():
    index = (ROOT / "examples/howto/GALLERY_HEADER.rst").read_text()
    assert re.findall(r"^\* :doc:`(\w+)`: ", index, re.MULTILINE) == [
        *RUNS.HOWTO_FIGURES,
        *RUNS.HOWTO_ELSEWHERE,
    ]


def test_a_how_to_fits_the_column_that_the_site_shows():
    for script in HOWTOS:
        lines = script.read_text().splitlines()
        assert sum(bool(line) for line in lines) <= 66, script.stem
        assert max(map(len, lines)) <= 88, script.stem


@pytest.mark.slow
def test_two_processes_print_what_one_prints():
    printed = {}
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        run = subprocess.run(
            [sys.executable, *launch, ROOT / "examples/howto/several_processes.py"],
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )
        printed[processes] = run.stdout
    assert re.search(r"at the end 0\.9\d+", printed[1])
    assert printed[1] == printed[2]


@pytest.mark.parametrize("script", [*SCRIPTS, *HOWTOS], ids=lambda script: script.stem)
class TestScript:
    def test_is_short_and_has_a_title_and_cells(self, script):
        text = script.read_text()
        title, underline = ast.get_docstring(ast.parse(text)).splitlines()[:2]
        assert underline == "=" * len(title)
        assert len(text.splitlines()) <= 150
        assert text.count("\n# %%\n") >= (2 if script in HOWTOS else 4)

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
        # How to read the info of an answer that is no success is what one page is about.
        allowed = 1 if script.stem == "few_shot" else 0
        assert len(re.findall(r"warnings|on_failure|except", text)) == allowed

    def test_is_the_same_each_time_and_ends_with_a_picture(self, script):
        text = script.read_text()
        if script.stem in RUNS.HOWTO_ELSEWHERE:  # where there is no matplotlib
            assert re.search(r"torch.manual_seed\(0\)", text)
            assert text.splitlines()[-1].startswith("#    test accuracy")
            return
        assert re.search(r"torch.manual_seed\(0\)|random_state=0", text)
        assert re.search(r"plt.show\(\)\n(distributed.destroy_process_group\(\)\n)?\Z", text)
        assert len(re.findall(r"plt\.(?:subplots|figure)\(", text)) == 1
        assert "print(" in text
