"""Rules about files and imports that no single module can see."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dit_accel"
LIBRARY = sorted(PACKAGE.rglob("*.py"))
PRODUCT = [path for path in LIBRARY if "testing" not in path.parts]
SHIPPED = [
    *LIBRARY,
    *(path for folder in ("kernels", "pipelines", "demos") for path in sorted((ROOT / folder).rglob("*.py"))),
]
FINDING = {"find_grid.py", "route.py"}  # the way into a model
ARITHMETIC = [
    *sorted((PACKAGE / "cache").rglob("*.py")),
    *sorted((PACKAGE / "forecast").glob("*.py")),
    *sorted((PACKAGE / "weights").glob("*.py")),
    *(path for path in sorted((PACKAGE / "attention").rglob("*.py")) if path.name not in FINDING),
]

# What others keep private; a new one is fine in diffusers_bridge.py and nowhere else.
PRIVATE_NAMES = re.compile(
    r"\b(_diffusers_hook|_is_cached|_context_manager|_compiled_call_impl|_attention_backend|_hf_hook|_cache_config"
    r"|_child_registries_cache|_num_timesteps|_begin_index|_step_index|_execution_device|_internal_dict)\b"
)
# torch has no public way from an overload of an operator to the operator; flops.py needs one.
TORCH_PRIVATE = {"_overloadpacket"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def words_read(path: Path) -> Iterator[str]:
    """Names that are read from something or spelled out for `getattr` and `vars`; operators may be called anything."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "torch.ops.aten":
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


@functools.cache
def words_defined() -> frozenset[str]:
    return frozenset(word for path in LIBRARY for word in _words_defined(path))


def _words_defined(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node, ast.Attribute) else node.id


def test_no_package_marker_shadows_a_package_of_others() -> None:
    folders = [ROOT / name for name in ("kernels", "pipelines", "demos", "tests")]
    folders += [path for name in ("kernels", "pipelines") for path in (ROOT / "tests").rglob(name)]
    assert [name_of(folder) for folder in folders if (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_imports_neither_pipelines_nor_demos(path: Path) -> None:
    outer = {"pipelines", "demos", "tests", "kernels", "benchmarks"}
    assert [name for name in imports_of(path) if name.split(".")[0] in outer] == []


@pytest.mark.parametrize("path", ARITHMETIC, ids=name_of)
def test_arithmetic_knows_no_framework_but_torch(path: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "dit_accel_kernels", "safetensors"}
    names = ("attention", "cache", "forecast", "weights", "settings", "errors")
    ours = tuple(f"dit_accel.{name}" for name in names)
    assert [n for n in imports_of(path) if n.split(".")[0] not in allowed and not n.startswith(ours)] == []


@pytest.mark.parametrize("path", [path for path in PRODUCT if path.name != "diffusers_bridge.py"], ids=name_of)
def test_private_names_of_others_stay_in_the_bridge(path: Path) -> None:
    assert PRIVATE_NAMES.findall(path.read_text(encoding="utf-8")) == []
    private = re.compile(r"_[A-Za-z]\w*")
    used = {word for word in words_read(path) if private.fullmatch(word)}
    foreign = {word for word in used - words_defined() if not word.startswith("_dit_accel")}
    assert foreign <= (TORCH_PRIVATE if path.name == "flops.py" else set())


def test_the_scan_for_private_names_sees_the_bridge() -> None:
    assert PRIVATE_NAMES.findall((PACKAGE / "diffusers_bridge.py").read_text(encoding="utf-8"))
    assert {"_version", "_diffusers_hook"} <= set(words_read(PACKAGE / "diffusers_bridge.py"))


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_shipped_runs_foreign_code(path: Path) -> None:
    tree = tree_of(path)
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots.isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "torchvision"})
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [call.id for call in calls if isinstance(call, ast.Name) and call.id in {"eval", "exec"}] == []
    assert [ast.unparse(c) for c in calls if ast.unparse(c) in {"torch.load", "yaml.load", "yaml.unsafe_load"}] == []
    assert "trust_remote_code" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_the_first_line_says_what_the_module_is(path: Path) -> None:
    tree = tree_of(path)
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(tree)
    assert text.removeprefix("#!/usr/bin/env python3\n").startswith('"""')


def python(code: str) -> str:
    """What this code prints in a fresh interpreter, away from the modules that the tests have loaded."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_no_framework() -> None:
    heavy = {"torch", "diffusers", "transformers", "gradio"}
    assert python(f"import sys, dit_accel; dir(dit_accel); print({heavy} & {{*sys.modules}})") == "set()"


def test_the_arithmetic_can_be_used_without_diffusers() -> None:
    modules = [name_of(path)[:-3].replace("/", ".").removesuffix(".__init__") for path in ARITHMETIC]
    code = f"import sys, {', '.join(modules)}, dit_accel.policy, dit_accel.stats; print('diffusers' in sys.modules)"
    assert python(code) == "False"


def test_every_public_name_can_be_reached() -> None:
    import dit_accel

    assert all(getattr(dit_accel, name) is not None for name in dit_accel.__all__)
    assert set(dit_accel.__all__) <= set(dir(dit_accel))
    with pytest.raises(AttributeError, match="no attribute 'aply'"):
        _ = dit_accel.aply  # pyright: ignore[reportAttributeAccessIssue]
