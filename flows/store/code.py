"""The digest of a step's code: its function, and all code of this project that the function can reach by name.

A list of modules written by hand becomes wrong without notice. A digest of whole files would repeat a long training
because of a changed comment. So the reachable code is found in the syntax tree. Comments, docstrings, annotations of
signatures and layout do not change the digest; a changed constant five calls away does. Code that only runs by
reflection (getattr, registries) is not found: for that, a step has a version number.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("medad", "zsad")
"""Packages whose code is digested. All others are libraries, identified by their version."""
PARSING = threading.Lock()
"""Lock for the parser: CPython 3.11 sometimes fails with a SystemError if two threads build syntax trees at once."""
TRIES = 20
VALUES_IN_KEY = frozenset(
    {
        "medad.config.anomalies",
        "medad.config.liver",
        "medad.config.training",
        "medad.base.errors",
        "medad.base.private",
        "medad.base.settings",
        "zsad.config.run",
    }
)
"""Modules that are not digested: settings are in the key by value, and texts of errors do not affect artifacts."""


@dataclass(frozen=True)
class Module:
    """The top-level definitions of a module, and the targets of its imports."""

    definitions: dict[str, tuple[ast.stmt, ...]]
    imports: dict[str, tuple[str, str | None]]
    """Local name -> (module, name in it). The second is None for the module itself."""


class _Strip(ast.NodeTransformer):
    """A transformer that removes docstrings and the annotations of signatures."""

    def _body(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        body = getattr(node, "body", [])
        # a bare string is the docstring of a function or of the attribute above it
        statements = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        node.body = statements or [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = _function  # noqa: N815 - ast's names
    visit_ClassDef = visit_Module = _body  # noqa: N815


def _imports(node: ast.AST) -> dict[str, tuple[str, str | None]]:
    found: dict[str, tuple[str, str | None]] = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            for alias in part.names:
                # `import a.b` binds a; a dotted name is resolved by its longest prefix, see _reach
                found[alias.asname or alias.name] = (alias.name, None)
        elif isinstance(part, ast.ImportFrom) and part.module and not part.level:
            for alias in part.names:
                found[alias.asname or alias.name] = (part.module, alias.name)
    return found


def _bound_names(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [statement.name]
    names = [part.id for part in ast.walk(statement) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
    # definitions inside a top-level `if` or `try`
    return names + [part.name for part in ast.walk(statement) if isinstance(part, ast.FunctionDef | ast.ClassDef)]


def _file(name: str) -> Path | None:
    """Return the source file of a module of this project, without importing it."""
    top, *below = name.split(".")
    spec = find_spec(top)
    if spec is None:
        return None
    if not below:
        return None if spec.origin is None else Path(spec.origin)
    paths = [Path(folder, *below) for folder in spec.submodule_search_locations or ()]
    candidates = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _syntax_tree(source: str) -> ast.Module:
    """Return the syntax tree of a module. Threads of libraries parse, too, and do not take the lock."""
    for _ in range(TRIES):
        with PARSING, contextlib.suppress(SystemError):
            return ast.parse(source)
        time.sleep(0.01)
    return ast.parse(source)


@functools.cache
def _parse(name: str) -> Module | None:
    file = _file(name)
    if file is None:
        return None
    tree = _Strip().visit(_syntax_tree(file.read_text(encoding="utf-8")))
    definitions: dict[str, tuple[ast.stmt, ...]] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    for statement in tree.body:
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            imports |= _imports(statement)
        for bound in _bound_names(statement):
            definitions[bound] = (*definitions.get(bound, ()), statement)
    return Module(definitions, imports)


def _is_ours(module: str) -> bool:
    return module.split(".", maxsplit=1)[0] in PACKAGES and module not in VALUES_IN_KEY


def _as_module(module: str, name: str | None) -> str | None:
    """Return the module that an import refers to (`import a.b`, `from a import b`), or None."""
    whole = module if name is None else f"{module}.{name}"
    return whole if _is_ours(whole) and _parse(whole) is not None else None


def _targets(module: str, name: str | None) -> list[tuple[str, str]]:
    """Resolve an import to definitions. A module that is used as a value counts with all its definitions."""
    whole = _as_module(module, name)
    if whole is not None:
        parsed = _parse(whole)
        return [(whole, each) for each in parsed.definitions] if parsed else []
    return [(module, name)] if name is not None and _is_ours(module) else []


class _Reach(ast.NodeVisitor):
    """A visitor that collects the definitions that a statement refers to."""

    def __init__(self, module: str, parsed: Module, imports: dict[str, tuple[str, str | None]]) -> None:
        self.module, self.parsed, self.imports = module, parsed, imports
        self.found: set[tuple[str, str]] = set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        origin = self.imports.get(ast.unparse(node.value))
        module = None if origin is None else _as_module(*origin)
        if module is None:
            self.generic_visit(node)
        else:
            self.found.add((module, node.attr))

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in self.imports:
            self.found.update(_targets(*self.imports[node.id]))
        elif node.id in self.parsed.definitions:
            self.found.add((self.module, node.id))


def _reach(module: str, statements: tuple[ast.stmt, ...], parsed: Module) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for statement in statements:
        visitor = _Reach(module, parsed, parsed.imports | _imports(statement))
        visitor.visit(statement)
        found |= visitor.found
    return found


@functools.cache
def closure(function: str) -> dict[str, str]:
    """Return all code of this project that `package.module:function` can reach: name -> sha256 of its syntax tree.

    The function's module counts even if it is in another package. Raises LookupError if the function does not exist,
    since otherwise a wrong name would give a constant key.
    """
    start_module, _, start_name = function.partition(":")
    parsed = _parse(start_module)
    if parsed is None or start_name not in {*parsed.definitions, *parsed.imports}:
        raise LookupError(f"no {start_name!r} in module {start_module!r}")
    pending = [(start_module, start_name)]
    seen: dict[tuple[str, str], str] = {}
    while pending:
        module, name = pending.pop()
        if (module, name) in seen or not (_is_ours(module) or module == start_module):
            continue
        parsed = _parse(module)
        if parsed is None:
            continue
        statements = parsed.definitions.get(name, ())
        if not statements and name in parsed.imports:  # re-exported
            pending += _targets(*parsed.imports[name])
            continue
        tree = "\n".join(ast.dump(statement) for statement in statements)
        seen[module, name] = hashlib.sha256(tree.encode()).hexdigest()
        pending += _reach(module, statements, parsed) - seen.keys()
    return {f"{module}:{name}": digest for (module, name), digest in sorted(seen.items())}


def code_digest(*functions: str) -> str:
    """Return one sha256 over the closures of these functions."""
    parts = sorted(set().union(*(closure(function).items() for function in functions)))
    return hashlib.sha256(repr(parts).encode()).hexdigest()
