"""The first ten minutes: the quickstart runs, README shows it, and what README and the pages say of installing is one story."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "examples" / "quickstart.py"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.rst")]
EXTRAS = re.findall(
    r"^([\w-]+) = \[",
    (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0],
    re.M,
)


@pytest.fixture
def printed(capsys):
    """What the quickstart prints, as {method: [(AMI, losses) of each episode]}, and AMI before training first."""

    def run():
        threads = torch.get_num_threads()
        try:
            runpy.run_path(str(QUICKSTART))
        finally:
            torch.set_num_threads(threads)
        methods = {}
        for line in capsys.readouterr().out.splitlines():
            head, rest = line.split(": AMI ")
            losses = {name: float(x) for name, x in re.findall(r"'(\w+)': ([\d.]+)", rest)}
            method = methods.setdefault(head.split(",")[0], []) if "before" in head else method  # noqa: F821
            method.append((float(re.match(r"[\d.]+", rest)[0]), losses))
        return methods

    return run


def check_run(methods, has_words):
    clip, proto = methods["CLIP"], methods["ProtoCLIP"]
    assert len(clip) == len(proto) == 9
    assert clip[:2] == proto[:2]  # the same until the warm-up ends
    for rows in (clip, proto):
        assert rows[0][1] == {}
        assert rows[0][0] < rows[-1][0] - 0.2
        assert rows[-1][1]["contrastive_loss"] < rows[1][1]["contrastive_loss"] / 4
    for number, ((_, plain), (_, ours)) in enumerate(zip(clip[1:], proto[1:], strict=True)):
        assert plain["proto_loss"] == plain["proto_external_loss"] == 0
        assert (ours["proto_loss"] > 0) == (number > 0)
        assert (ours["proto_external_loss"] > 0) == (has_words and number > 0)
    assert proto[-1][0] > clip[-1][0] + 0.03


def test_the_quickstart_groups_new_pictures_better_with_prototypes(printed):
    pytest.importorskip("sklearn")
    check_run(printed(), has_words=True)


@pytest.mark.slow
def test_the_quickstart_runs_with_torch_and_this_library_alone(printed, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("sklearn", "scipy")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("sklearn", "scipy", "matplotlib", "tqdm", "faiss"):
        monkeypatch.setitem(sys.modules, name, None)
    check_run(printed(), has_words=False)


def test_readme_shows_the_quickstart_as_it_is():
    assert f"```python\n{QUICKSTART.read_text(encoding='utf-8')}```\n" in README
    assert 60 <= QUICKSTART.read_text(encoding="utf-8").count("\n") <= 80


def test_links_of_readme_have_a_title_and_not_a_path():
    assert re.findall(r"\[(?:docs|\.)/?[\w/.]*\]\(", README) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_install_lines_do_not_contradict_each_other(page):
    """The library is installed from a clone, as "."; by its name only an extra of one that is installed already."""
    for line in re.findall(r"pip install ([^\n`&]*)", page.read_text(encoding="utf-8")):
        for name, extras in re.findall(r"(?:^|[\s'\"])(\.|protoclip[-_]losses|PATH\w*)(?:\[([\w,-]+)\])?(?=['\"\s]|$)", line):
            assert name == "." or (name == "protoclip-losses" and extras), line
            assert set(filter(None, extras.split(","))) <= {*EXTRAS}, line


def test_readme_names_every_extra():
    assert set(re.findall(r"`([a-z-]+)`", README.split("Extras add")[1].split("Coming from")[0])) == {*EXTRAS} - {"dev"}
