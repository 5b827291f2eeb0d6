"""The command line: what it offers, what it loads, and how it fails."""

from __future__ import annotations

import subprocess
import sys

from charter import __version__


def _charter(*arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys\n{prelude}\nsys.argv = ['charter', *{arguments!r}]\nfrom charter.cli import main\nmain()"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


_BLOCK = """
import importlib.abc
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_help_lists_every_part_without_loading_any() -> None:
    heavy = {"torch", "transformers", "pyarrow", "grpc", "fastapi", "charter.bus", "charter.gateway"}
    prelude = f"import atexit; atexit.register(lambda: print('loaded', sorted({heavy!r} & set(sys.modules))))"
    done = _charter("--help", prelude=prelude)
    assert done.returncode == 0
    for part in ("run", "chat", "constitution", "keys", "topics", "dead-letters"):
        assert f" {part} " in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_the_version_is_told() -> None:
    assert _charter("--version").stdout == f"charter {__version__}\n"


_EVERY_HELP = """
import io, contextlib
from charter.cli import app
names = [command.name or command.callback.__name__ for command in app.registered_commands]
for name in names:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        app([name, "--help"], prog_name="charter")
    assert f"charter {name}" in shown.getvalue(), (name, shown.getvalue())
print(*names)
"""


def test_every_part_explains_itself() -> None:
    done = subprocess.run([sys.executable, "-c", _EVERY_HELP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"run", "chat", "constitution", "keys", "topics", "dead-letters"} < set(done.stdout.split())


def test_a_failure_is_one_sentence_and_a_status() -> None:
    done = _charter("run", "--settings", "--set", "gateway.prot=1", "--model", "org/name")
    assert done.returncode == 2
    assert done.stderr == (
        "charter: option gateway.prot: unknown key 'gateway.prot'; did you mean 'gateway.port'?\n"
    )


def test_a_missing_extra_is_named_with_how_to_install_it(tmp_path: object) -> None:
    prelude = _BLOCK.replace("{BLOCKED}", "{'torch', 'transformers'}")
    arguments = ("run", "--target", "policy", "--model", str(tmp_path), "--state", f"{tmp_path}/state")
    done = _charter(*arguments, prelude=prelude)
    assert done.returncode == 1
    assert "pip install 'charter[local]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
