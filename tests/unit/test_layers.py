"""Who may import whom: the numbers know nothing of the service, the core knows nothing of the world."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = (
    *(
        "columns",
        "duration",
        "records",
        "events",
        "policy",
        "ruleset",
        "maintenance",
        "results",
        "detector",
        "group",
        "places",
        "blobs",
        "snapshot",
        "versions",
        "sound",
        "admission",
        "inspection",
    ),
    *(
        "grid",
        "judge",
        "judged",
        "past",
        "placing",
        "waiting",
        "windows",
        "withheld",
        "incidents",
        "revision",
        "silence",
    ),
)
WORLD = {
    *("asyncio", "socket", "selectors", "ssl", "http", "urllib", "subprocess", "threading", "concurrent"),
    *("time", "logging", "os", "sys", "pathlib", "random", "secrets", "tempfile", "shutil"),
    *("aiokafka", "redis", "hiredis", "pydantic", "pydantic_settings", "typer", "rich", "pandas", "torch"),
}


class _WithoutTypes(ast.NodeTransformer):
    """Leaves out what is imported for the type checker only."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else node


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in it."""
    package = path.parent.name
    for node in ast.walk(_WithoutTypes().visit(ast.parse(path.read_text(), str(path)))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def of(package: str, names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith(f"{package}.")}


def test_the_walk_sees_imports_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "stream" / "x.py"
    path.parent.mkdir()
    path.write_text(
        "import a.b, c\nfrom . import d\ndef f():\n    from e.f import g\n    if 1:\n        import h as i\n"
    )
    assert {"a.b", "c", "stream.d", "e.f", "e.f.g", "h"} <= set(imports(path))


@pytest.mark.parametrize("path", modules("models"), ids=lambda path: path.name)
def test_models_never_import_the_service(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] in ("stream", "tests")]


@pytest.mark.parametrize("path", modules("stream"), ids=lambda path: path.name)
def test_the_service_never_imports_its_tests(path: Path) -> None:
    assert "tests" not in {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("name", CORE)
def test_the_core_touches_nothing_outside(name: str) -> None:
    found = set(imports(ROOT / "stream" / f"{name}.py"))
    assert {module.split(".")[0] for module in found}.isdisjoint(WORLD)
    assert of("stream", found) <= {*CORE, "errors"}, "the core imports itself only"
    assert of("models", found) <= {"arrays", "base", "pot", "errors"}


def test_the_core_reads_no_clock() -> None:
    calls = {"now", "utcnow", "today", "time", "monotonic", "perf_counter"}
    for name in CORE:
        for node in ast.walk(ast.parse((ROOT / "stream" / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in calls, f"{name}.py:{node.lineno}"


def test_the_arrows_of_the_core_form_no_circle() -> None:
    arrows = {name: of("stream", set(imports(ROOT / "stream" / f"{name}.py"))) & set(CORE) for name in CORE}
    while arrows:
        free = [name for name, targets in arrows.items() if not targets & set(arrows)]
        assert free, f"a circle among {sorted(arrows)}"
        for name in free:
            del arrows[name]


def test_only_what_asks_a_network_takes_the_seconds_of_torch() -> None:
    """Commands that follow events, send points, or look at rules and rejects start without it; so can the core."""
    light = [
        f"stream.{name}" for name in (*CORE, "settings", "subscribe", "replay", "rejects", "rules", "rights", "doctor")
    ]
    loaded = f"import sys, {', '.join(light)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], cwd=ROOT).returncode == 0
