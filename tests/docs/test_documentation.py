"""What the README, the API reference and the pages promise."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import hypergrad
from docs.links import dead_links
from docs.pictures import thousand_penalties
from hypergrad import bilevel, inner_solvers, projections, prox, solvers

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PUBLIC = {
    **{f"hypergrad.{name}": getattr(hypergrad, name) for name in hypergrad.__all__},
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (inner_solvers, prox, projections)
        for name in module.__all__
    },
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (bilevel, solvers)
        for name in module.__all__
        if name not in hypergrad.__all__
    },
}
# Those outside of the site, whose links the build of the documentation checks.
HAVE_PAGES = (ROOT, ROOT / "examples", ROOT / "reproduction")
PAGES = [page for page in sorted(ROOT.rglob("*.md")) if page.parent in HAVE_PAGES]


@pytest.mark.slow
def test_the_readme_example_prints_what_it_says_and_has_the_hypergradient(capsys):
    readme = (ROOT / "README.md").read_text()
    (output,) = re.findall(r"```text\n(.*?)```", readme, re.DOTALL)
    (single,) = re.findall(r"of a grid of 17, leaves a test loss of ([\d.]+\d)", readme)
    names, _ = thousand_penalties.run()
    assert capsys.readouterr().out == output
    assert f"{thousand_penalties.best_single(names):.1f}" == single

    x, y, x_val, y_val = (names[name].double() for name in ("x", "y", "x_val", "y_val"))

    def by_hand(log_decay):
        w = torch.linalg.solve(x.T @ x / 500 + log_decay.exp().diag(), x.T @ y / 500)
        return ((x_val @ w - y_val) ** 2).mean()

    def by_the_example(log_decay):
        w = names["fit"](torch.zeros(1000), log_decay)
        return ((names["x_val"] @ w - names["y_val"]) ** 2).mean()

    decays = torch.linspace(-2, 2, 1000)  # not those after training: the gradient is small there
    found = torch.func.grad(by_the_example)(decays)
    expected = torch.func.grad(by_hand)(decays.double()).float()
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_the_reference_lists_every_public_name():
    directive = r"^\.\. auto(?:class|exception|function):: ([\w.]+)$"
    pages = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = re.findall(directive, pages, re.MULTILINE)
    full = [name if name.startswith("hypergrad.") else f"hypergrad.{name}" for name in listed]
    assert sorted(full) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    assert doctest.DocTestParser().get_examples(PUBLIC[name].__doc__ or ""), name


def places(page):
    """The anchors that a page's headings make, as GitHub and MyST name them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue  # other sites are not fetched
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not place or place in places(target), link


def test_the_build_finds_links_that_lead_nowhere(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.html").write_text(
        '<h1 id="top">A</h1><a href="#top"></a><a href="sub/b.html#here"></a><img src="no.png">'
        '<a href="#bottom"></a><a href="https://example.org/x"></a>'
    )
    (tmp_path / "sub" / "b.html").write_text(
        '<p id="here"></p><a href="../a.html"></a><a href="../a.html#here"></a>'
        '<a href="c.html"></a>'
    )
    found = {(str(page), link) for page, link in dead_links(tmp_path)}
    assert found == {
        ("a.html", "no.png"),
        ("a.html", "#bottom"),
        ("sub/b.html", "../a.html#here"),
        ("sub/b.html", "c.html"),
    }
