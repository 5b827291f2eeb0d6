"""The rules of the repository itself: what may be committed, what may import what, what must be in step."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "services/charter"
SERVICES = {"gateway", "policy", "sampler", "critic", "judge", "reward", "trainer", "publisher", "console"}
# Only what puts services together, and what measures them, may know several.
COMPOSERS = {"cli.py", "app", "circle", "demo", "evaluation", "redteam"}
SEED_WEIGHTS = "services/charter/seedmodel/weights/"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        return ""


# Split, so that this file does not break its own rule.
_HOSTS = [
    "py" + "pi.org", "python" + "hosted.org", "npm" + "js.org", "npm" + "js.com", "yarn" + "pkg.com",
    "maven" + ".org", "repo.maven" + ".apache", "proxy.go" + "lang.org", "crates" + ".io",
    "deb.deb" + "ian.org",
]  # fmt: skip
_HOMES = "|".join(["wo" + "rk", "ro" + "ot", "ho" + "me"])
_MACHINE_PATH = re.compile(rf"(?<![\w.~-])/(?:{_HOMES})/(?!someone\b)\w")


def test_no_registry_host_or_path_of_one_machine_is_committed() -> None:
    found = []
    for path in _tracked():
        for number, line in enumerate(_text(path).splitlines(), start=1):
            if any(host in line for host in _HOSTS) or _MACHINE_PATH.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert found == []


def test_only_the_seed_weights_are_large() -> None:
    large = [
        str(path.relative_to(ROOT))
        for path in _tracked()
        if path.stat().st_size > 3_000_000 and not str(path.relative_to(ROOT)).startswith(SEED_WEIGHTS)
    ]
    assert large == []


# What may import what -------------------------------------------------------------------------------------


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that the file imports, lazily or not, by its absolute name."""
    package = ("charter", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield node.lineno, module
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def test_a_service_is_imported_by_nobody_but_itself() -> None:
    """Services meet in protos/ and in the shared folders, which know no service either."""
    wrong = set()
    for path in PACKAGE.rglob("*.py"):
        home = path.relative_to(PACKAGE).parts[0]
        if home in COMPOSERS:
            continue
        for line, module in _imports(path):
            parts = module.split(".")
            if parts[0] == "charter" and len(parts) > 1 and parts[1] in SERVICES - {home}:
                wrong.add(f"{path.relative_to(ROOT)}:{line} imports charter.{parts[1]}")
    assert sorted(wrong) == []


# Only what measures may know the truth about the seed world; nothing that trains, labels, chooses prompts or
# decides on a roll-out may. `world` is not among these: it writes the prompts, as a file of prompts would.
_TRUTH = {"charter.seedmodel.oracle", "charter.seedmodel.kinds", "charter.seedmodel.corpus"}
_MEASURERS = {"seedmodel", "evaluation"}
_MEASURING_FILES = {"demo/measuring.py"}


def test_the_oracle_only_measures() -> None:
    wrong = set()
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] in _MEASURERS or place.as_posix() in _MEASURING_FILES:
            continue
        for line, module in _imports(path):
            # The measurements themselves are out of bounds, too; their pure statistics are not.
            measured = module.startswith("charter.evaluation.seed") and place.parts[0] not in COMPOSERS
            if measured or any(module == truth or module.startswith(f"{truth}.") for truth in _TRUTH):
                wrong.add(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert sorted(wrong) == []


_WITHOUT_EXTRAS = """
import importlib, importlib.abc, pkgutil, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import charter.cli, charter.gateway
for package in (charter.gateway,):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
print("imported", len([m for m in sys.modules if m.startswith("charter.gateway")]))
"""


def test_the_gateway_and_the_command_line_import_with_the_base_dependencies_alone() -> None:
    extras = {
        canonicalize_name(Requirement(line).name)
        for lines in PYPROJECT["project"]["optional-dependencies"].values()
        for line in lines
    }
    base = {canonicalize_name(Requirement(line).name) for line in PYPROJECT["project"]["dependencies"]}
    modules = {name.replace("-", "_") for name in extras - base - {"charter"}} | {"kafka"}
    done = subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {modules!r}\n{_WITHOUT_EXTRAS}"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("imported")


# What must be in step -------------------------------------------------------------------------------------


def _declared() -> Iterator[Requirement]:
    project = PYPROJECT["project"]
    for lines in (project["dependencies"], *project["optional-dependencies"].values()):
        for line in lines:
            requirement = Requirement(line)
            if requirement.name != project["name"]:
                yield requirement


def test_every_dependency_has_its_reason_written_beside_it() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    lists = text[text.index("dependencies = [") : text.index("[project.scripts]")]
    silent = [
        line.strip()
        for line in lists.splitlines()
        if re.match(r'\s+"(?!charter\[)[\w.-]+', line) and not re.search(r'",\s+# \w', line)
    ]
    assert silent == []


def _locked() -> dict[str, list[str]]:
    """Package → its versions in requirements.lock (one for each environment marker)."""
    versions: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", _lock_text(), flags=re.MULTILINE):
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def _lock_text() -> str:
    return (ROOT / "requirements.lock").read_text()


def test_the_lock_file_is_in_step_with_pyproject() -> None:
    locked = _locked()
    late = [
        f"{requirement} (locked: {locked.get(canonicalize_name(requirement.name))}); run make lock"
        for requirement in _declared()
        if not any(
            requirement.specifier.contains(version, prereleases=True)
            for version in locked.get(canonicalize_name(requirement.name), [])
        )
    ]
    assert late == []


def test_the_lock_file_has_hashes_and_no_addresses() -> None:
    text = _lock_text()
    assert "://" not in text
    entries = re.split(r"^(?=[A-Za-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 50
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_npm_lock_file_has_hashes_and_no_addresses() -> None:
    text = (ROOT / "package-lock.json").read_text()
    assert "://" not in text
    assert '"resolved"' not in text
    assert text.count('"integrity"') >= 2


def test_generated_protobuf_code_is_fresh(tmp_path: Path) -> None:
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    subprocess.run(
        ["make", "-s", "protos-into", f"OUT={tmp_path}", f"PY={sys.executable}"],
        cwd=ROOT, check=True, capture_output=True, env=environment,
    )  # fmt: skip
    fresh = {path.name: path.read_text() for path in (tmp_path / "charter/v1").iterdir()}
    kept = {path.name: _text(path) for path in (PACKAGE / "v1").glob("*_pb2*")}
    assert sorted(kept) == sorted(fresh), "run make protos"
    assert [name for name in fresh if kept[name] != fresh[name]] == [], "run make protos"


def test_sources_keep_the_house_style() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", "."],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def test_source_files_stay_under_500_lines() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {count}"
        for path in (*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py"))
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
        and (count := len(_text(path).splitlines())) > 500
    ]
    assert long == []


# What the documents say -----------------------------------------------------------------------------------


def _documents() -> list[Path]:
    return [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "ARCHITECTURE.md",
        *(ROOT / "docs").rglob("*.md"),
    ]


def _code(path: Path) -> str:
    """What a Markdown file shows as code, in blocks and in lines."""
    text = path.read_text()
    blocks = re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join(blocks + re.findall(r"`[^`\n]+`", text))


def test_every_make_target_in_the_documents_exists() -> None:
    makefiles = "\n".join(path.read_text() for path in (ROOT / "Makefile", *(ROOT / "mk").glob("*.mk")))
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefiles, flags=re.MULTILINE))
    unknown = {
        f"{path.name}: make {target}"
        for path in _documents()
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", _code(path))
        if target not in targets
    }
    assert unknown == set()


def test_every_command_in_the_documents_exists() -> None:
    from charter.cli import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    unknown = {
        f"{path.name}: charter {command}"
        for path in _documents()
        for command in re.findall(r"(?:^|[`$/ ])charter ([a-z][a-z-]*)", _code(path), flags=re.MULTILINE)
        if command not in known
    }
    assert unknown == set()


def test_every_relative_link_in_the_documents_leads_somewhere() -> None:
    broken = [
        f"{path.name}: {link}"
        for path in _documents()
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", path.read_text())
        if not (path.parent / link).exists()
    ]
    assert broken == []
