"""The house stays as it was drawn: floors, doors that stay shut, names. Read from the syntax trees.

Nothing here imports hybridk2; every rule is a function from parsed sources to a list of findings
("file:line: what"), so that a failing test says where, and so that the rules themselves are tested
on sources that break them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first. A unit is a module or package directly inside hybridk2; it may import units of lower
# floors, and itself. Units on one floor do not know each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("__init__",),
    ("errors", "durable_file", "timeline"),
    ("config",),
    ("checkpoint", "tokenizer", "sampling", "hardware", "device", "cuda_driver"),
    ("chat", "placement", "routing_trace", "prefill_split"),
    ("placement_changes",),
    ("planner",),
    ("experts", "kv_cache", "scheduler", "engine_stats"),
    ("model", "request"),
    ("execution", "engine_parts"),
    ("engine", "sessions"),
    ("assistant", "benchmark", "measurement"),
    ("report",),
    ("verification", "synthesis", "tuner", "server"),
    ("cli", "nano"),
    ("__main__",),
)
FLOOR_OF = {unit: number for number, units in enumerate(FLOORS) for unit in units}

# Doors that stay shut although the floor would allow them: unit -> what it must not import.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "tokenizer": ("torch",),
    "chat": ("torch",),
    "cli": ("torch", "hybridk2._native"),
    "server": ("torch", "hybridk2._native"),
    # The model sees no argv, environment, HTTP or paths.
    "model": ("os", "sys", "pathlib", "argparse", "click", "http", "urllib", "requests", "httpx"),
    # The engine speaks token ids only.
    **dict.fromkeys(
        ("engine", "execution", "request", "scheduler"), ("hybridk2.tokenizer", "hybridk2.chat")
    ),
}
# What these import when they are imported, directly or not, must not load torch: `hybridk2 --help`
# answers at once, a server listens before its model is loaded, and text can be tokenised where no
# model runs.
TORCH_FREE = ("errors", "config", "tokenizer", "chat", "server", "cli", "__main__")

EXTENSION = "hybridk2._native"
EXTENSION_DOOR = "hybridk2/experts/host.py"
CUDA_DOOR = "hybridk2/device.py"
DYNAMIC_IMPORT_DOOR = "hybridk2/cli/__init__.py"  # loads a subcommand's module when it is named
# The checkpoint's reader, and the second one that `verify` proves the first with.
TENSOR_NAMES_DOORS = ("hybridk2/checkpoint/", "hybridk2/verification/published.py")
CODE_FROM_DATA = {
    *("pickle", "_pickle", "dill", "cloudpickle"),
    *("marshal", "shelve", "joblib"),
}
CODE_RUNNERS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "os.system", "os.popen"),
}
BANNED_NAME_PARTS = {
    *("util", "utils", "helper", "helpers", "manager", "managers"),
    *("common", "base", "misc"),
}


@dataclass(frozen=True)
class Import:
    target: str  # dotted name of a module, or of a name in one
    line: int
    on_load: bool  # runs when the module is imported: not inside a function, not for type checkers


@dataclass(frozen=True)
class Module:
    path: str  # relative to the project's root
    source: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.source, self.path)

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def unit(self) -> str:
        part = self.path.split("/")[1]
        return part.removesuffix(".py")

    @cached_property
    def imports(self) -> list[Import]:
        return list(self._imports(self.tree, on_load=True))

    def _imports(self, node: ast.AST, on_load: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, on_load) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                module = self._absolute(child)
                for alias in child.names:
                    yield Import(f"{module}.{alias.name}", child.lineno, on_load)
            else:
                later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                never = isinstance(child, ast.If) and "TYPE_CHECKING" in names(child.test)
                yield from self._imports(child, on_load and not later and not never)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".")
        if not self.path.endswith("__init__.py"):
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def at(self, line: int, what: str) -> str:
        return f"{self.path}:{line}: {what}"


def names(node: ast.AST) -> set[str]:
    """Every bare name and attribute in an expression."""
    found = {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}
    return found | {child.attr for child in ast.walk(node) if isinstance(child, ast.Attribute)}


def dotted(node: ast.AST) -> str:
    """`torch.cuda.is_available` of an attribute chain that starts at a name, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def within(target: str, package: str) -> bool:
    return target == package or target.startswith(package + ".")


def unit_of_import(target: str) -> str | None:
    """The unit of hybridk2 that a dotted name belongs to, None for everything else."""
    if not within(target, "hybridk2"):
        return None
    part = [*target.split("."), "__init__"][1]
    return "__init__" if part == "__version__" else part


# -- The rules ------------------------------------------------------------------------------------


def unknown_units(module: Module) -> list[str]:
    known = module.unit in FLOOR_OF
    return [] if known else [module.at(1, f"{module.unit} stands on no floor: add it to FLOORS")]


def upward_imports(module: Module) -> list[str]:
    findings = []
    for found in module.imports:
        target = unit_of_import(found.target)
        if target is None or target in (module.unit, "_native"):
            continue
        if target not in FLOOR_OF:
            findings.append(module.at(found.line, f"{found.target} stands on no floor"))
        elif FLOOR_OF[target] >= FLOOR_OF.get(module.unit, len(FLOORS)):
            what = f"{module.unit} imports {found.target}, which is not below it"
            findings.append(module.at(found.line, what))
    return findings


def forbidden_imports(module: Module) -> list[str]:
    return [
        module.at(found.line, f"{module.unit} must not import {found.target}")
        for found in module.imports
        for package in FORBIDDEN.get(module.unit, ())
        if within(found.target, package)
    ]


def extension_outside_its_door(module: Module) -> list[str]:
    if module.path == EXTENSION_DOOR:
        return []
    return [
        module.at(found.line, f"{found.target}: only {EXTENSION_DOOR} may import the extension")
        for found in module.imports
        if within(found.target, EXTENSION)
    ]


def cuda_outside_its_door(module: Module) -> list[str]:
    if module.path == CUDA_DOOR:
        return []
    lines = [found.line for found in module.imports if within(found.target, "torch.cuda")]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr == "cuda":
            lines.append(node.lineno)  # torch.cuda, tensor.cuda(), torch.backends.cuda
    return [module.at(line, f"cuda: only {CUDA_DOOR} may say it") for line in lines]


def environment_reads(module: Module) -> list[str]:
    words = {"environ", "environb", "getenv", "getenvb", "putenv"}
    findings = [
        module.at(found.line, found.target)
        for found in module.imports
        if found.target in {f"os.{word}" for word in words}
    ]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in words:
            findings.append(module.at(node.lineno, f"{dotted(node)}: use click's envvar="))
    return findings


def code_from_data(module: Module) -> list[str]:
    """Whatever could run code that came with a checkpoint, a session file or a request."""
    findings = [
        module.at(found.line, f"import of {found.target}")
        for found in module.imports
        if found.target.split(".")[0] in CODE_FROM_DATA or found.target == "torch.load"
    ]
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        function = dotted(node.func)
        if function in CODE_RUNNERS:
            findings.append(module.at(node.lineno, f"call of {function}"))
        if function.split(".")[-1] == "import_module" and module.path != DYNAMIC_IMPORT_DOOR:
            findings.append(module.at(node.lineno, f"call of {function}"))
        for keyword in node.keywords:
            if keyword.arg not in ("shell", "trust_remote_code", "allow_pickle"):
                continue
            if not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                findings.append(module.at(node.lineno, f"{keyword.arg} other than False"))
    return findings


def swallowed_errors(module: Module) -> list[str]:
    """Handlers and suppressions that catch everything and do nothing with it."""
    broad = {"Exception", "BaseException"}
    findings = []
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            catches_all = node.type is None or names(node.type) & broad
            if catches_all and all(_does_nothing(statement) for statement in node.body):
                findings.append(module.at(node.lineno, "a broad except that does nothing"))
        if not isinstance(node, ast.Call) or dotted(node.func).split(".")[-1] != "suppress":
            continue
        if any(names(argument) & broad for argument in node.args):
            findings.append(module.at(node.lineno, "suppress of every exception"))
    return findings


def _does_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Return):
        return statement.value is None or isinstance(statement.value, ast.Constant)
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass | ast.Continue | ast.Break)


def missing_docstring(module: Module) -> list[str]:
    return [] if ast.get_docstring(module.tree) else [module.at(1, "no module docstring")]


def tensor_names_outside_the_checkpoint(module: Module) -> list[str]:
    """Names of published tensors in strings; docstrings may speak of them."""
    if module.path.startswith(TENSOR_NAMES_DOORS):
        return []
    prose = {
        id(node.body[0].value)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        module.at(node.lineno, f"the tensor name {node.value!r}")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and re.search(r"model\.layers\.|weight_packed|weight_scale|e_score_correction", node.value)
    ]


def banned_file_name(path: str) -> list[str]:
    found = [
        part
        for component in Path(path).with_suffix("").parts
        for part in re.split(r"[_.\-]", component.lower())
        if part in BANNED_NAME_PARTS
    ]
    return [f"{path}: says nothing of what it owns: {found[0]}"] if found else []


def loads_torch(modules: list[Module]) -> list[str]:
    """Modules of TORCH_FREE units that load torch when imported, with the chain to it."""
    by_name = {module.name: module for module in modules}

    def loaded_by(module: Module) -> Iterator[str]:
        for found in module.imports:
            if not found.on_load:
                continue
            # Importing a.b.c runs a, a.b and a.b.c; `c` may also be a name inside a.b.
            parts = found.target.split(".")
            for length in range(1, len(parts) + 1):
                yield ".".join(parts[:length])

    def chain_to_torch(module: Module, seen: set[str]) -> list[str] | None:
        seen.add(module.name)
        for target in loaded_by(module):
            if target == "torch":
                return [module.name, "torch"]
            if target in by_name and target not in seen:
                chain = chain_to_torch(by_name[target], seen)
                if chain:
                    return [module.name, *chain]
        return None

    findings = []
    for module in modules:
        if module.unit in TORCH_FREE and (chain := chain_to_torch(module, set())):
            findings.append(module.at(1, "loads torch when imported: " + " -> ".join(chain)))
    return findings


# -- The rules applied to the project -------------------------------------------------------------

MODULES = [
    Module(str(path.relative_to(ROOT)), path.read_text())
    for path in sorted((ROOT / "hybridk2").rglob("*.py"))
]
RULES: list[Callable[[Module], list[str]]] = [
    unknown_units,
    upward_imports,
    forbidden_imports,
    extension_outside_its_door,
    cuda_outside_its_door,
    environment_reads,
    code_from_data,
    swallowed_errors,
    missing_docstring,
    tensor_names_outside_the_checkpoint,
]


def report(findings: list[str]) -> None:
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_module_breaks_the_rule(rule: Callable[[Module], list[str]]) -> None:
    report([finding for module in MODULES for finding in rule(module)])


def test_text_and_command_line_do_not_load_torch() -> None:
    report(loads_torch(MODULES))


def test_file_names_say_what_they_own() -> None:
    files = [
        str(path.relative_to(ROOT))
        for folder in ("hybridk2", "csrc", "tests", "bench")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".cc", ".h", ".sh"}
    ]
    report([finding for file in files for finding in banned_file_name(file)])


@pytest.mark.parametrize("folder", ["tests", "bench"])
def test_scripts_and_tests_open_with_what_they_are_for(folder: str) -> None:
    paths = [path for path in sorted((ROOT / folder).rglob("*.py")) if path.read_text().strip()]
    modules = [Module(str(path.relative_to(ROOT)), path.read_text()) for path in paths]
    report([finding for module in modules for finding in missing_docstring(module)])


# -- The rules themselves -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (unknown_units, "hybridk2/toolbox.py", ""),
        (upward_imports, "hybridk2/config.py", "from hybridk2.engine import Engine"),
        (upward_imports, "hybridk2/config.py", "def f():\n    import hybridk2.engine"),
        (upward_imports, "hybridk2/config.py", "from hybridk2 import engine"),
        (upward_imports, "hybridk2/config.py", "from . import engine"),
        (upward_imports, "hybridk2/model/k2.py", "from ..engine import Engine"),
        (upward_imports, "hybridk2/checkpoint/reader.py", "from hybridk2.device import Device"),
        (upward_imports, "hybridk2/cli/chat.py", "from hybridk2.nano import train"),
        (upward_imports, "hybridk2/cli/chat.py", "import hybridk2.toolbox"),
        (forbidden_imports, "hybridk2/cli/chat.py", "def f():\n    import torch.nn"),
        (forbidden_imports, "hybridk2/chat/parser.py", "from torch import Tensor"),
        (forbidden_imports, "hybridk2/server/app.py", "from hybridk2 import _native"),
        (forbidden_imports, "hybridk2/model/k2.py", "from pathlib import Path"),
        (forbidden_imports, "hybridk2/engine.py", "from hybridk2.tokenizer import Tokenizer"),
        (extension_outside_its_door, "hybridk2/engine.py", "from hybridk2._native import pool"),
        (extension_outside_its_door, "hybridk2/engine.py", "from hybridk2 import _native"),
        (cuda_outside_its_door, "hybridk2/engine.py", "import torch\ntorch.cuda.synchronize()"),
        (cuda_outside_its_door, "hybridk2/engine.py", "x = x.cuda()"),
        (cuda_outside_its_door, "hybridk2/engine.py", "from torch import cuda"),
        (environment_reads, "hybridk2/cli/chat.py", "import os\nos.environ['HOME']"),
        (environment_reads, "hybridk2/cli/chat.py", "from os import getenv"),
        (code_from_data, "hybridk2/sessions.py", "import pickle"),
        (code_from_data, "hybridk2/sessions.py", "from torch import load"),
        (code_from_data, "hybridk2/sessions.py", "torch.load(path)"),
        (code_from_data, "hybridk2/sessions.py", "eval(text)"),
        (code_from_data, "hybridk2/sessions.py", "subprocess.run(line, shell=True)"),
        (code_from_data, "hybridk2/sessions.py", "load(name, trust_remote_code=flag)"),
        (code_from_data, "hybridk2/sessions.py", "importlib.import_module(name)"),
        (swallowed_errors, "hybridk2/engine.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (swallowed_errors, "hybridk2/engine.py", "try:\n    f()\nexcept:\n    ..."),
        (swallowed_errors, "hybridk2/engine.py", "with suppress(Exception):\n    f()"),
        (missing_docstring, "hybridk2/engine.py", "import os"),
        (
            tensor_names_outside_the_checkpoint,
            "hybridk2/engine.py",
            'def f():\n    """Of model.layers.0."""\n    return "model.layers.0.mlp"',
        ),
    ],
)
def test_the_rule_finds_what_it_forbids(
    rule: Callable[[Module], list[str]], path: str, source: str
) -> None:
    assert len(rule(Module(path, source))) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("hybridk2/config.py", '"""."""\nfrom hybridk2.errors import ConfigError'),
        ("hybridk2/cli/chat.py", '"""."""\ndef f():\n    from hybridk2.assistant import Assistant'),
        ("hybridk2/cli/chat.py", '"""."""\nfrom hybridk2 import __version__, tuner'),
        ("hybridk2/experts/host.py", '"""."""\nfrom hybridk2 import _native'),
        ("hybridk2/device.py", '"""."""\nimport torch\ntorch.cuda.is_available()'),
        ("hybridk2/nano/train.py", '"""."""\nimport torch\nmodel.eval()'),
        ("hybridk2/engine.py", '"""."""\ntry:\n    f()\nexcept Exception:\n    raise'),
        ("hybridk2/checkpoint/layout.py", '"""."""\nNAME = "model.layers.0"'),
    ],
)
def test_the_rules_allow_what_the_design_allows(path: str, source: str) -> None:
    module = Module(path, source)
    report([finding for rule in RULES for finding in rule(module)])


def test_torch_is_found_behind_other_modules() -> None:
    modules = [
        Module("hybridk2/cli/chat.py", "from hybridk2.sampling import SamplingParams"),
        Module("hybridk2/cli/plan.py", "def f():\n    from hybridk2.sampling import Sampler"),
        Module("hybridk2/sampling.py", "import torch"),
    ]
    assert loads_torch(modules) == [
        "hybridk2/cli/chat.py:1: loads torch when imported: "
        "hybridk2.cli.chat -> hybridk2.sampling -> torch"
    ]


@pytest.mark.parametrize("path", ["hybridk2/utils.py", "csrc/amx_helpers.h", "bench/base/run.py"])
def test_a_name_that_says_nothing_is_refused(path: str) -> None:
    assert banned_file_name(path)
