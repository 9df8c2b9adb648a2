"""The wheel: what travels in it, and that it works away from the checkout. Importing the packages stays cheap."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from shardrun.by_path import import_file

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PACKAGES = [
    name for name in ("accelerate_configs", "lessons", "shardrun", "speedrun", "strategies") if (ROOT / name).is_dir()
]


def python(*arguments: str, cwd: Path) -> str:
    """Run this Python and return what it printed; fails with its messages."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: left-overs of earlier builds in the checkout play no part."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in [*PACKAGES, "tests", "scripts"]:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    python("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("shardrun-*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_the_configs_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for suffix in ("*.py", "*.yaml", "*.md", "*.css")
        for path in (ROOT / package).rglob(suffix)
    }
    assert sources <= held, f"missing: {sorted(sources - held)}"
    assert "accelerate_configs/cpu/ddp.yaml" in held and "accelerate_configs/multi_node/zero3.yaml" in held
    assert {name.split("/")[0] for name in held} == set(PACKAGES)


@pytest.mark.slow
def test_an_installed_wheel_finds_its_configs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    python("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import importlib.resources as r, speedrun; "
        "print(speedrun.__file__); print(r.files('accelerate_configs') / 'cpu' / 'ddp.yaml')"
    )
    module, config = python("-c", code, cwd=tmp_path).splitlines()
    assert Path(module) == target / "speedrun" / "__init__.py"
    assert Path(config) == target / "accelerate_configs" / "cpu" / "ddp.yaml"
    assert Path(config).read_bytes() == (ROOT / "accelerate_configs" / "cpu" / "ddp.yaml").read_bytes()


def test_the_setup_script_asks_for_the_torch_of_pyproject() -> None:
    """The script runs before any TOML reader can be counted on, so it repeats the range."""
    (torch,) = [line.removeprefix("torch") for line in PROJECT["dependencies"] if line.startswith("torch")]
    assert f'\nTORCH = "{torch}"' in (ROOT / "scripts" / "setup.py").read_text(encoding="utf-8")


def test_ci_runs_every_python_that_pyproject_allows() -> None:
    asked = SpecifierSet(PROJECT["requires-python"])
    allowed = [f"3.{minor}" for minor in range(30) if asked.contains(f"3.{minor}")]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == allowed
    assert job["steps"][-1]["run"] == ".ci/run" and (ROOT / ".ci/run").stat().st_mode & 0o111
    assert 30 <= job["timeout-minutes"] <= 120
    actions = [step["uses"] for step in job["steps"] if "uses" in step]
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in actions)


def test_pre_commit_has_the_ruff_that_make_check_has() -> None:
    (asked,) = [r for r in map(Requirement, PROJECT["optional-dependencies"]["dev"]) if r.name == "ruff"]
    (hooks,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert asked.specifier.contains(hooks["rev"].removeprefix("v")), f"{hooks['rev']} is not {asked}"
    assert not asked.specifier.contains("0.0.1") and not asked.specifier.contains("99"), "any version would do"


def test_the_version_is_in_the_changelog() -> None:
    import speedrun

    headings = re.findall(r"^## (\d\S*)(?=,| )", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.M)
    assert headings and headings[0].rstrip(",") == speedrun.__version__


def test_importing_the_packages_loads_no_heavy_library() -> None:
    """Each of these costs a second or more, or is not installed on every machine."""
    code = (
        "import sys, speedrun, strategies, shardrun; "
        "print(*sorted({'accelerate', 'deepspeed', 'matplotlib', 'triton', 'wandb'} & set(sys.modules)))"
    )
    assert python("-c", code, cwd=ROOT).split() == []


def test_setup_does_not_empty_a_folder_that_dot_venv_is_a_link_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make` in a checkout that borrows another one's environment emptied that one."""
    setup = import_file(ROOT / "scripts" / "setup.py", "setup_script")
    theirs, link = tmp_path / "theirs", tmp_path / "here" / ".venv"
    for folder in (theirs, link.parent):
        folder.mkdir()
    (theirs / "kept").touch()
    link.symlink_to(theirs)
    monkeypatch.setattr(setup, "VENV", link)
    with pytest.raises(SystemExit, match="is a link to .*remove the link"):
        setup.make_venv(clear=True)
    assert (theirs / "kept").exists()
