"""What a script imports from TRL, and where it uses that, read by libcst."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import libcst as cst
from libcst import metadata as meta
from libcst.helpers import get_full_name_for_node

from .names import is_module


@dataclass(frozen=True)
class Use:
    """A place where what was imported is used."""

    node: cst.CSTNode
    """The longest chain of attributes, `trl.trainer.DPOTrainer`, that starts there; or a string with an annotation."""
    name: str | None
    """The qualified name in TRL; None where a module itself is passed on or looked into."""
    call: cst.Call | None
    """The call whose function it is."""
    line: int


@dataclass(eq=False)
class Binding:
    """One name that an import statement binds to a module of TRL, or to something in one."""

    statement: cst.Import | cst.ImportFrom
    alias: cst.ImportAlias
    local: str
    target: str
    line: int
    uses: list[Use] = field(default_factory=list)

    @property
    def module(self) -> bool:
        """Whether it is bound to a module."""
        return isinstance(self.statement, cst.Import) or is_module(self.target)

    @property
    def plain(self) -> bool:
        """Whether it is `import trl.x`, which binds `trl`."""
        return isinstance(self.statement, cst.Import) and self.alias.asname is None


@dataclass(frozen=True)
class Text:
    """A string that names something in TRL."""

    value: str
    line: int


@dataclass(frozen=True)
class Script:
    """What was read."""

    module: cst.Module
    bindings: list[Binding]
    stars: dict[cst.ImportFrom, int]
    """Line of each `from trl import *`."""
    texts: list[Text]
    subclasses: list[tuple[str, int]]
    """Qualified name of the base and line of each class derived from one of TRL."""
    assigned: dict[str, set[str]]
    """For each variable, what was called to make it: local spelling, `PPOTrainer` or `trl.PPOTrainer`."""
    methods: dict[str, set[str]]
    """For each variable, the methods called on it."""
    lines: dict[cst.Arg, int]
    """Line of each argument of a call of something in TRL."""


_IMPORTERS = ("import_module", "__import__", "importorskip", "find_spec", "patch", "is_package_available")
_QUALIFIED = re.compile(r"trl(\.\w+)+")


def module_of(node: cst.Import | cst.ImportFrom, alias: cst.ImportAlias | None = None) -> str | None:
    """The module that a statement imports from, if it is TRL."""
    if isinstance(node, cst.ImportFrom):
        name = None if node.relative or node.module is None else get_full_name_for_node(node.module)
    else:
        name = None if alias is None else alias.evaluated_name
    return name if name is not None and name.split(".")[0] == "trl" else None


class _Reader(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (meta.PositionProvider, meta.ParentNodeProvider, meta.ScopeProvider)

    def __init__(self) -> None:
        super().__init__()
        self.bindings: list[Binding] = []
        self.stars: dict[cst.ImportFrom, int] = {}
        self.texts: list[Text] = []
        self.quoted: list[cst.SimpleString] = []
        self.classes: list[cst.ClassDef] = []
        self.assigned: dict[str, set[str]] = {}
        self.methods: dict[str, set[str]] = {}
        self._annotations = 0

    def line(self, node: cst.CSTNode) -> int:
        return int(self.get_metadata(meta.PositionProvider, node).start.line)

    def visit_Import(self, node: cst.Import) -> None:
        for alias in node.names:
            if (target := module_of(node, alias)) is not None:
                local = alias.evaluated_alias
                target = "trl" if local is None else target
                self.bindings.append(Binding(node, alias, local or "trl", target, self.line(alias)))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:
        module = module_of(node)
        if module is None:
            return
        if isinstance(node.names, cst.ImportStar):
            self.stars[node] = self.line(node)
            return
        for alias in node.names:
            name = alias.evaluated_name
            local = alias.evaluated_alias or name
            self.bindings.append(Binding(node, alias, local, f"{module}.{name}", self.line(alias)))

    def visit_Annotation(self, node: cst.Annotation) -> None:
        self._annotations += 1

    def leave_Annotation(self, original_node: cst.Annotation) -> None:
        self._annotations -= 1

    def visit_SimpleString(self, node: cst.SimpleString) -> None:
        value = node.evaluated_value
        if self._annotations:
            self.quoted.append(node)
        elif not isinstance(value, str):
            return
        elif _QUALIFIED.fullmatch(value) or (value == "trl" and self._imports(node)):
            self.texts.append(Text(value, self.line(node)))

    def _imports(self, node: cst.CSTNode) -> bool:
        argument = self.get_metadata(meta.ParentNodeProvider, node)
        call = self.get_metadata(meta.ParentNodeProvider, argument)
        name = get_full_name_for_node(call.func) if isinstance(call, cst.Call) else None
        return name is not None and name.split(".")[-1] in _IMPORTERS

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.classes.append(node)

    def visit_Assign(self, node: cst.Assign) -> None:
        for target in node.targets:
            self._assigned(target.target, node.value)

    def visit_AnnAssign(self, node: cst.AnnAssign) -> None:
        self._assigned(node.target, node.value)

    def _assigned(self, target: cst.CSTNode, value: cst.BaseExpression | None) -> None:
        variable = get_full_name_for_node(target)
        if variable and isinstance(value, cst.Call):
            self.assigned.setdefault(variable, set()).add(get_full_name_for_node(value.func) or "")

    def visit_Call(self, node: cst.Call) -> None:
        if isinstance(node.func, cst.Attribute) and (owner := get_full_name_for_node(node.func.value)):
            self.methods.setdefault(owner, set()).add(node.func.attr.value)

    # -- uses ----------------------------------------------------------------------------------------------------------
    def find_uses(self, scopes: Sequence[meta.Scope]) -> None:
        of_statement: dict[tuple[cst.CSTNode, str], list[Binding]] = {}
        for binding in self.bindings:
            of_statement.setdefault((binding.statement, binding.local), []).append(binding)
        seen: set[tuple[int, int]] = set()
        for scope in scopes:
            for access in scope.accesses:
                root: cst.CSTNode = access.node
                while isinstance(root, cst.Attribute):
                    root = root.value
                if not isinstance(root, cst.Name) or self.get_metadata(meta.ParentNodeProvider, root, None) is None:
                    continue
                statements = {r.node for r in access.referents if isinstance(r, meta.ImportAssignment)}
                for statement in statements:
                    for binding in of_statement.get((statement, root.value), []):
                        if (id(root), id(binding)) not in seen:
                            seen.add((id(root), id(binding)))
                            binding.uses.append(self._use(root, binding))
        for text in self.quoted:
            for binding in self.bindings:
                if binding.module:
                    binding.uses += self._quoted(text, binding)
        for binding in self.bindings:
            binding.uses.sort(key=lambda use: use.line)

    def _use(self, root: cst.Name, binding: Binding) -> Use:
        node: cst.CSTNode = root
        name = None if binding.module else binding.target
        qualified = binding.target
        parent = self.get_metadata(meta.ParentNodeProvider, node)
        while isinstance(parent, cst.Attribute) and parent.value is node:
            if name is not None:
                break
            node = parent
            qualified = f"{qualified}.{parent.attr.value}"
            if not is_module(qualified):
                name = qualified
            parent = self.get_metadata(meta.ParentNodeProvider, node)
        call = parent if isinstance(parent, cst.Call) and parent.func is node else None
        return Use(node, name, call, self.line(node))

    def _quoted(self, text: cst.SimpleString, binding: Binding) -> list[Use]:
        uses = []
        for match in re.finditer(rf"(?<![\w.]){re.escape(binding.local)}((?:\.\w+)+)", text.value):
            qualified = binding.target
            for part in match[1].split(".")[1:]:
                qualified = f"{qualified}.{part}"
                if not is_module(qualified):
                    uses.append(Use(text, qualified, None, self.line(text)))
                    break
        return uses


def read(source: str) -> Script:
    """Read a script.

    Raises:
        libcst.ParserSyntaxError: it is no Python.
    """
    wrapper = meta.MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    reader = _Reader()
    with reader.resolve(wrapper):
        wrapper.module.visit(reader)
        scopes = {id(scope): scope for scope in wrapper.resolve(meta.ScopeProvider).values() if scope is not None}
        reader.find_uses(list(scopes.values()))
        used = {use.node: use for binding in reader.bindings for use in binding.uses}
        calls = [use.call for binding in reader.bindings for use in binding.uses if use.call]
        lines = {argument: reader.line(argument) for call in calls for argument in call.args}
        subclasses = [
            (used[base.value].name or "", reader.line(node))
            for node in reader.classes
            for base in node.bases
            if base.value in used
        ]
    return Script(
        wrapper.module,
        reader.bindings,
        reader.stars,
        reader.texts,
        [(name, line) for name, line in subclasses if name],
        reader.assigned,
        reader.methods,
        lines,
    )
