"""What is installed: the public names, and that the built-in plugins use the same door as anybody's."""

import ast
import importlib
import importlib.metadata
import inspect
import itertools
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lipconvert as lc

CORE = Path(lc.__file__).parent
CORE_MODULES = sorted(f"lipconvert.{m.name}" for m in pkgutil.walk_packages(lc.__path__) if m.name != "testing")
TESTS = Path(__file__).parent


def _plugin_directory() -> Path:
    """Where the built-in plugins are installed, found without the core's help."""
    return Path(importlib.import_module("lipconvert_plugins").__file__).parent


def _imports(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import in a file; relative ones start with dots, ``import a.b`` has the name ""."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [("." * node.level + (node.module or ""), alias.name) for alias in node.names]
    return found


PLUGIN_FILES = sorted(_plugin_directory().glob("*.py"))
CORE_FILES = sorted(CORE.rglob("*.py"))


class TestPlugins:
    def test_entry_points_files_and_registry_are_one_set(self):
        files = {path.stem for path in PLUGIN_FILES if not path.stem.startswith("_")}
        entries = {
            entry.name: entry.value
            for entry in importlib.metadata.distribution("lipconvert").entry_points
            if entry.group == "lipconvert"
        }
        loaded = {p.name for p in lc.plugins() if p.distribution == "lipconvert" and p.error is None}
        assert set(entries) == files == loaded != set()
        assert entries == {name: f"lipconvert_plugins.{name}" for name in files}

    @pytest.mark.parametrize("path", PLUGIN_FILES, ids=lambda p: p.stem)
    def test_plugins_import_public_names_only(self, path):
        for module, name in _imports(path):
            top = module.lstrip(".").split(".")[0]
            if module.startswith("."):  # their own shared files
                assert (path.parent / f"{top}.py").is_file(), (module, name)
                assert top.startswith("_"), f"{path.name} reaches into another plugin: {module}"
            elif top == "lipconvert":
                assert module == "lipconvert", f"{path.name} imports {name or 'all'} from {module}"
                assert name in lc.__all__, f"{path.name} imports {name!r}, which is not public"
            else:
                assert top not in ("lipconvert_plugins", "importlib", "sys"), (path.name, module)

    @pytest.mark.parametrize("path", CORE_FILES, ids=lambda p: str(p.relative_to(CORE)))
    def test_core_never_imports_the_plugins(self, path):
        assert [m for m, _ in _imports(path) if m.split(".")[0] == "lipconvert_plugins"] == []
        assert "lipconvert_plugins" not in path.read_text(encoding="utf-8")

    @pytest.mark.parametrize("path", CORE_FILES, ids=lambda p: str(p.relative_to(CORE)))
    def test_core_names_no_architecture(self, path):
        """Docstrings may name what a formula is true for; code may not know a layer, a class or a plugin by name."""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {p.name for p in lc.plugins() if p.distribution == "lipconvert"} - {
            "lben"
        }  # LBEN is the core's own form
        classes = "|".join(name.split("_")[-1] for name in sorted(names))  # SLLLinear, GMonDEQ, sll, --plugin sll
        words = re.compile(rf"(?<![A-Za-z])G?({classes})(?=[^a-z]|linear|conv|network|layer|$)", re.IGNORECASE)
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            said = []
            if isinstance(node, ast.Name | ast.ClassDef | ast.FunctionDef | ast.Attribute | ast.alias | ast.arg):
                said = [getattr(node, field, None) for field in ("id", "name", "attr", "arg")]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                said = [node.value]
            for text in said:
                assert not (text and words.search(text)), f"{path.name}:{node.lineno} names an architecture: {text!r}"


class TestPublicNames:
    def test_all_is_sorted_unique_and_there(self):
        def order(name):  # ruff's: all capitals, then capitalised, then the rest
            return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)

        assert lc.__all__ == sorted(set(lc.__all__), key=order)
        missing = [name for name in lc.__all__ if not hasattr(lc, name)]
        assert missing == []

    def test_all_holds_what_the_package_imports(self):
        tree = ast.parse((CORE / "__init__.py").read_text(encoding="utf-8"))
        imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
        assert imported - {"annotations"} == set(lc.__all__)

    def test_every_error_is_public_and_one_of_ours(self):
        errors = importlib.import_module("lipconvert.errors")
        defined = {n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__}
        assert defined <= set(lc.__all__)
        assert all(issubclass(getattr(lc, name), lc.LipconvertError) for name in defined)

    @pytest.mark.parametrize("module", ["lipconvert", *CORE_MODULES])
    def test_public_things_have_docstrings(self, module):
        loaded = importlib.import_module(module)
        assert (loaded.__doc__ or "").strip(), module
        for name, value in vars(loaded).items():
            if name.startswith("_") or not (inspect.isclass(value) or inspect.isfunction(value)):
                continue
            if value.__module__ == module:
                assert (value.__doc__ or "").strip(), f"{module}.{name} has no docstring"

    def test_the_core_does_not_need_the_test_extra(self):
        """pytest is imported by ``lipconvert.testing`` alone."""
        users = {p.name for p in CORE_FILES if any(m.split(".")[0] in ("pytest", "hypothesis") for m, _ in _imports(p))}
        assert users == {"testing.py"}
        importers = [
            p.name for p in CORE_FILES for m, n in _imports(p) if m.endswith("testing") or (m == "." and n == "testing")
        ]
        assert importers == []


class TestVersions:
    """constraints.txt, by which everything is installed, and .ci/lowest, against pyproject.toml."""

    ROOT = TESTS.parent

    def declared(self):
        project = tomllib.loads((self.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        extras = project["optional-dependencies"].values()
        given = [Requirement(r) for r in (*project["dependencies"], *itertools.chain(*extras))]
        return [r for r in given if r.name != "lipconvert"]

    def pinned(self, text):
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        found = {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
        assert len(found) == len(lines)
        for requirement in found.values():
            assert requirement.url is None
            assert [s.operator for s in requirement.specifier] == ["=="]
        return {name: next(iter(r.specifier)).version for name, r in found.items()}

    def test_constraints_are_versions_that_are_declared(self):
        pinned = self.pinned((self.ROOT / "constraints.txt").read_text(encoding="utf-8"))
        for requirement in self.declared():
            name = canonicalize_name(requirement.name)
            if name in pinned:
                assert requirement.specifier.contains(pinned[name]), requirement
        assert {canonicalize_name(r.name) for r in self.declared()} - set(pinned) <= {"tensorboard"}

    def test_the_lowest_ones_are_those_declared(self):
        script = self.ROOT / ".ci" / "lowest"
        if not script.exists():
            pytest.skip("not in a source distribution")
        lowest = self.pinned(
            subprocess.run([sys.executable, script], check=True, capture_output=True, text=True).stdout
        )
        for requirement in self.declared():
            (specifier,) = requirement.specifier
            if specifier.operator == ">=":
                assert lowest.pop(canonicalize_name(requirement.name)) == specifier.version
            else:
                assert specifier.operator == "=="
        assert lowest == {}


class TestDistribution:
    def test_typed(self):
        assert (CORE / "py.typed").is_file()
        assert (_plugin_directory() / "py.typed").is_file()

    def test_metadata(self):
        metadata = importlib.metadata.metadata("lipconvert")
        assert re.fullmatch(r"\d+\.\d+\.\d+", metadata["Version"])
        assert metadata["License-Expression"] == "MIT"
        assert set(metadata.get_all("Provides-Extra")) >= {"test"}
        requires = importlib.metadata.requires("lipconvert")
        hard = {re.split(r"[^A-Za-z0-9_-]", r)[0] for r in requires if "extra ==" not in r}
        assert not hard & {"pytest", "hypothesis", "ruff", "pyright"}

    def test_every_third_party_import_is_declared(self):
        """What the core and the plugins import is among the requirements, so a plain install runs."""
        provided = importlib.metadata.packages_distributions()
        requires = importlib.metadata.requires("lipconvert")
        hard = {re.split(r"[^A-Za-z0-9_-]", r)[0].lower() for r in requires if "extra ==" not in r}
        for path in (*CORE_FILES, *PLUGIN_FILES):
            for module, _ in _imports(path):
                top = module.split(".")[0]
                if module.startswith(".") or top in ("lipconvert", "__future__") or path.name == "testing.py":
                    continue
                owners = {name.lower() for name in provided.get(top, [])}
                assert not owners or owners & hard, f"{path.name} imports {top} of {owners}, not among the requirements"

    def test_version_is_that_of_the_changelog(self):
        changelog = (TESTS.parent / "CHANGELOG.md").read_text(encoding="utf-8")
        released = re.search(r"^## (\d+\.\d+\.\d+)", changelog, re.MULTILINE)
        assert released is not None
        assert released[1] == importlib.metadata.version("lipconvert")

    def test_the_console_script_points_at_something_callable(self):
        scripts = importlib.metadata.distribution("lipconvert").entry_points.select(group="console_scripts")
        assert [s.name for s in scripts] == ["lipconvert"]
        assert callable(next(iter(scripts)).load())
