"""Checks of an installed wheel, beside the sdist that it came with; called by `.ci/wheel`."""

import contextlib
import doctest
import io
import re
import sys
import tarfile
import warnings
from importlib.metadata import requires, version
from pathlib import Path

MOST = 5_000_000  # bytes of the sdist
FENCE = re.compile(r"```(python|\{testcode\}|\{testoutput\})\n(.*?)```", re.DOTALL)


def check_package(work: Path) -> None:
    """Check that the package is the installed one, whole and typed, with one version."""
    import hypergrad

    home = Path(hypergrad.__file__).parent
    assert home.parent.name == "site-packages", home
    assert (home / "py.typed").is_file()
    built = {str(p.relative_to(work / "package")) for p in (work / "package").rglob("*.py")}
    installed = {str(p.relative_to(home)) for p in home.rglob("*.py")}
    assert installed == built, installed ^ built
    assert hypergrad.__version__ == version("torch-hypergrad")
    print(f"hypergrad {hypergrad.__version__} at {home}, {len(installed)} modules")


def check_dependencies(work: Path) -> None:
    """Nothing came but the package itself, and it asks for torch alone."""
    before, after = ((work / name).read_text().splitlines() for name in ("before", "after"))
    came = sorted(set(after) - set(before))
    assert len(came) == 1, came
    assert came[0].startswith("torch-hypergrad"), came
    assert set(before) <= set(after), "a package was replaced"
    asked = [r for r in requires("torch-hypergrad") or () if "extra ==" not in r]
    assert [re.split(r"[^\w-]", r)[0] for r in asked] == ["torch"], asked
    print(f"needs {asked[0]} and brings nothing; {len(before)} packages were there with torch")


def check_sdist(work: Path) -> None:
    """Check that the sdist holds files of the repository alone, and is small."""
    (archive,) = (work / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    tracked = set((work / "tracked").read_text().splitlines())
    extra = names - tracked - {"PKG-INFO"}
    assert not tracked or not extra, sorted(extra)
    assert archive.stat().st_size < MOST, archive.stat().st_size
    print(f"sdist: {len(names)} files, {archive.stat().st_size / 1e6:.1f} MB")


def run_page(page: Path) -> None:
    """Run the code of a page from top to bottom; what it prints is compared."""
    checker, names, printed, count = doctest.OutputChecker(), {}, "", 0
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for kind, block in FENCE.findall(page.read_text()):
        if kind == "{testoutput}":
            want = re.sub(r"\A(:options:.*\n)?\n*", "", block)
            assert checker.check_output(want, printed, flags), f"{page}:\n{want}\nis\n{printed}"
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, str(page), "exec"), names)
        printed, count = out.getvalue(), count + 1
    assert count, page
    print(f"{page.name}: {count} snippets run")


def main() -> None:
    """Run all checks on the folder that is given."""
    work = Path(sys.argv[1])
    check_package(work)
    check_dependencies(work)
    check_sdist(work)
    warnings.simplefilter("error", UserWarning)
    for page in ("README.md", "docs/quickstart.md"):
        run_page(work / "sdist" / page)


if __name__ == "__main__":
    main()
