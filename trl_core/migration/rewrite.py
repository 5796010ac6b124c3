"""Rewrite a script from TRL's names to ours."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import libcst as cst
from libcst.helpers import get_full_name_for_node

from .. import install
from . import names, options, ppo
from .bindings import Binding, Script, Text, Use, read
from .names import Home, Homeless, look_up
from .statements import import_from, import_module, last_argument, small_statements


@dataclass(frozen=True)
class Finding:
    """Something that the reader of a rewritten script should know."""

    line: int
    name: str
    why: str
    instead: str
    kind: str
    """"name", "option" or "text" is left to do by hand; "note" was done, or is only a remark."""

    @property
    def open(self) -> bool:
        """Whether it is left to do."""
        return self.kind != "note"


@dataclass
class Rewritten:
    """A script with our names, and what remains of it to be done."""

    source: str
    findings: list[Finding] = field(default_factory=list)
    distributions: set[str] = field(default_factory=set)


def rewrite(source: str) -> Rewritten:
    """A script that uses names of TRL, with our names; unchanged where there is nothing to do.

    What has no home keeps its import, so that nothing is lost.

    Raises:
        SyntaxError: it is no Python.
    """
    if not re.search(r"\btrl\b", source):
        return Rewritten(source)
    try:
        script = read(source)
    except cst.ParserSyntaxError as error:
        raise _as_python_says(source, error) from error
    plan = _Plan(script)
    plan.make()
    code = script.module.visit(_Rewriter(plan)).code
    findings = sorted(set(plan.findings), key=lambda finding: (finding.line, finding.kind == "note", finding.name))
    return Rewritten(code, findings, plan.distributions)


def _as_python_says(source: str, error: cst.ParserSyntaxError) -> SyntaxError:
    """The error with the line and the words that Python has for it, which are nearer to the cause."""
    try:
        ast.parse(source)
    except SyntaxError as said:
        return said
    return SyntaxError(error.message, ("", error.raw_line, error.raw_column, ""))


class _Plan:
    """What to change, by the node of the script."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.ppo = ppo.which(script)
        self.statements: dict[cst.CSTNode, list[cst.BaseSmallStatement]] = {}
        self.expressions: dict[cst.CSTNode, str] = {}
        self.keywords: dict[cst.Arg, str | None] = {}
        self.findings: list[Finding] = []
        self.distributions: set[str] = set()

    def make(self) -> None:
        by_statement: dict[cst.Import | cst.ImportFrom, list[Binding]] = {}
        for binding in self.script.bindings:
            by_statement.setdefault(binding.statement, []).append(binding)
        for statement, bindings in by_statement.items():
            if isinstance(statement, cst.ImportFrom):
                self._import_from(statement, bindings)
            else:
                self._import(statement, bindings)
        for binding in self.script.bindings:
            for use in binding.uses:
                self._options(use)
        for line in self.script.stars.values():
            self._add(line, "trl.*", names.STAR)
        for text in self.script.texts:
            self._text(text)
        for name, line in self.script.subclasses:
            if name.endswith("Trainer") and isinstance(look_up(name, self.ppo), Home):
                why = "methods of TRL's trainer that a class derived from it overrides are not called here"
                self._add(line, name, Homeless(why, "hooks: docs/writing-a-plugin.md"), "note")

    def _add(self, line: int, name: str, why: Homeless, kind: str = "name") -> None:
        self.findings.append(Finding(line, name, why.why, why.instead, kind))

    def _take(self, home: Home) -> Home:
        self.distributions.add(home.distribution)
        return home

    # -- imports -------------------------------------------------------------------------------------------------------
    def _import_from(self, statement: cst.ImportFrom, bindings: list[Binding]) -> None:
        homes: dict[cst.ImportAlias, Home | None] = {}
        modules: list[str] = []
        for binding in bindings:
            if binding.module:
                kept, lines = self._module(binding)
                modules += lines
                if kept:
                    homes[binding.alias] = None
                continue
            home = look_up(binding.target, self.ppo)
            if isinstance(home, Home):
                homes[binding.alias] = self._take(home)
            else:
                homes[binding.alias] = None
                self._add(binding.line, binding.target, home)
        if modules or any(homes.values()):
            self.statements[statement] = [
                *import_from(self.script.module, statement, homes),
                *(import_module(self.script.module, line) for line in dict.fromkeys(modules)),
            ]

    def _import(self, statement: cst.Import, bindings: list[Binding]) -> None:
        of_alias = {binding.alias: binding for binding in bindings}
        kept: list[cst.ImportAlias] = []
        lines: list[str] = []
        for alias in statement.names:
            keep, new = self._module(of_alias[alias]) if alias in of_alias else (True, [])
            kept += [alias] if keep else []
            lines += new
        if lines:
            remaining = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in kept]
            first = [statement.with_changes(names=remaining)] if remaining else []
            self.statements[statement] = [
                *first,
                *(import_module(self.script.module, line) for line in dict.fromkeys(lines)),
            ]

    def _module(self, binding: Binding) -> tuple[bool, list[str]]:
        """Whether the import of a module must stay, and the imports that replace it."""
        found: dict[Use, Home] = {}
        keep = False
        for use in binding.uses:
            home = _BARE if use.name is None else look_up(use.name, self.ppo)
            if isinstance(home, Home):
                found[use] = self._take(home)
            else:
                keep = True
                self._add(use.line, use.name or binding.target, home)
        if not binding.uses:
            return self._unused(binding)
        wanted = sorted({home.module for home in found.values()})
        alias = None if binding.plain else binding.local
        same = all(use.name and use.name.endswith(f".{home.name}") for use, home in found.items())
        alone = alias if len(wanted) == 1 and not keep and same else None
        for use, home in found.items():
            self._rename(use, binding, f"{alone or home.module}.{home.name}")
        return keep, [f"{module} as {alone}" if alone else module for module in wanted]

    def _rename(self, use: Use, binding: Binding, new: str) -> None:
        if isinstance(use.node, cst.SimpleString):
            before = self.expressions.get(use.node, use.node.value)
            spelling = rf"(?<![\w.]){re.escape(binding.local)}(\.\w+)*\.{str(use.name).rpartition('.')[2]}\b"
            self.expressions[use.node] = re.sub(spelling, new, before)
        else:
            self.expressions[use.node] = new

    def _unused(self, binding: Binding) -> tuple[bool, list[str]]:
        target = binding.alias.evaluated_name if binding.plain else binding.target
        home = names.module_home(target)
        if home is None:
            self._add(binding.line, target, names.why_no_module(target))
            return True, []
        self._take(Home(home, ""))
        return False, [home if binding.plain else f"{home} as {binding.local}"]

    # -- calls and strings ---------------------------------------------------------------------------------------------
    def _options(self, use: Use) -> None:
        home = look_up(use.name, self.ppo) if use.name and use.call else None
        if not isinstance(home, Home) or use.call is None or home.module.startswith("transformers"):
            return
        known = options.accepted(home)
        if known is None:
            why = f"{home.distribution} is not installed here, so options were not looked at"
            self._add(
                use.line, home.name, Homeless(why, f"{install.how(home.distribution)}, and run this again"), "note"
            )
            return
        arguments = [argument for argument in use.call.args if not argument.star]
        given = {argument.keyword.value for argument in arguments if argument.keyword}
        places = len(arguments) - len(given)
        if places > options.same_places(home):
            why = f"of arguments without keyword the first {options.same_places(home)} are where they were in TRL"
            self._add(use.line, f"{home.name}(...)", Homeless(why, "give them by keyword"), "option")
        for argument in arguments:
            if argument.keyword is None:
                continue
            option = argument.keyword.value
            line = self._line(argument, use)
            if option in known:
                self._known(argument, home, line)
            else:
                self._unknown(argument, home, known - given, line)

    def _line(self, argument: cst.Arg, use: Use) -> int:
        return self.script.lines.get(argument, use.line)

    def _known(self, argument: cst.Arg, home: Home, line: int) -> None:
        option = argument.keyword.value if argument.keyword else ""
        if option in options.CHANGED and get_full_name_for_node(argument.value) not in ("False", "None"):
            self._add(line, f"{home.name}({option}=...)", options.CHANGED[option], "note")
        if option == "args" and self._is_training_arguments(argument.value):
            config = home.name.replace("Trainer", "Config")
            why = Homeless("transformers.TrainingArguments lack the options of this trainer", f"{config}(...) instead")
            self._add(line, f"{home.name}(args=...)", why, "option")

    def _is_training_arguments(self, value: cst.BaseExpression) -> bool:
        name = get_full_name_for_node(value.func if isinstance(value, cst.Call) else value) or ""
        made = {name} if isinstance(value, cst.Call) else self.script.assigned.get(name, set())
        return any(maker.rpartition(".")[2] == "TrainingArguments" for maker in made)

    def _unknown(self, argument: cst.Arg, home: Home, free: frozenset[str], line: int) -> None:
        option = argument.keyword.value if argument.keyword else ""
        new = options.RENAMED.get(options.kind_of(home), {}).get(option)
        name = f"{home.name}({option}=...)"
        if new in free:
            self.keywords[argument] = new
        elif option in options.WITHOUT_EFFECT:
            self.keywords[argument] = None
            self._add(line, name, Homeless(f"left out: {options.WITHOUT_EFFECT[option]}", "nothing to do"), "note")
        elif get_full_name_for_node(argument.value) in ("False", "None"):
            self.keywords[argument] = None
            self._add(line, name, Homeless("left out: it is off here", "nothing to do"), "note")
        else:
            self._add(line, name, options.why_absent(option, home), "option")

    def _text(self, text: Text) -> None:
        found = None if names.is_module(text.value) else look_up(text.value, self.ppo)
        if found is names.UNKNOWN and not names.is_module(".".join(text.value.split(".")[:2])):
            return  # such as the name of a file
        here = f"{found.module}.{found.name}" if isinstance(found, Home) else names.module_home(text.value)
        instead = (
            f"{here} is its home here" if here else found.instead if isinstance(found, Homeless) else "see by hand"
        )
        self._add(text.line, f'"{text.value}"', Homeless("a name within a string is not rewritten", instead), "text")


_BARE = Homeless("the module itself is passed on, or looked into while running", "use its names: trl.GRPOTrainer")


class _Rewriter(cst.CSTTransformer):
    def __init__(self, plan: _Plan) -> None:
        super().__init__()
        self.plan = plan

    def on_leave(  # type: ignore[override]
        self, original_node: cst.CSTNode, updated_node: cst.CSTNode
    ) -> cst.CSTNode | cst.RemovalSentinel | cst.FlattenSentinel[cst.CSTNode]:
        new = self.plan.expressions.get(original_node)
        if new is None:
            return super().on_leave(original_node, updated_node)
        return cst.parse_expression(new).with_changes(
            lpar=getattr(updated_node, "lpar", ()), rpar=getattr(updated_node, "rpar", ())
        )

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        if not any(argument in self.plan.keywords for argument in original_node.args):
            return updated_node
        new: list[cst.Arg] = []
        for old, argument in zip(original_node.args, updated_node.args, strict=True):
            keyword = self.plan.keywords.get(old, "")
            if keyword is None:
                if new and old is original_node.args[-1]:
                    new[-1] = last_argument(new[-1], argument)
                continue
            new.append(argument.with_changes(keyword=cst.Name(keyword)) if keyword else argument)
        return updated_node.with_changes(args=new)

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.BaseStatement]:
        body = self._body(original_node.body, updated_node.body)
        if len(original_node.body) > 1 or len(body) == 1:
            return updated_node.with_changes(body=body)
        comment = updated_node.trailing_whitespace.comment
        to_all = comment is not None and re.search(
            r"noqa|type: *ignore|pylint|isort|pragma|mypy|pyright", comment.value
        )
        plain = updated_node.trailing_whitespace.with_changes(comment=None, whitespace=cst.SimpleWhitespace(""))
        lines = [updated_node.with_changes(body=[body[0]])]
        for small in body[1:]:
            trailing = updated_node.trailing_whitespace if to_all else plain
            lines.append(cst.SimpleStatementLine([small], trailing_whitespace=trailing))
        return cst.FlattenSentinel(lines)

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.SimpleStatementSuite:
        return updated_node.with_changes(body=self._body(original_node.body, updated_node.body))

    def _body(
        self, original: Sequence[cst.BaseSmallStatement], updated: Sequence[cst.BaseSmallStatement]
    ) -> list[cst.BaseSmallStatement]:
        return small_statements(
            (self.plan.statements.get(old, [new]), new) for old, new in zip(original, updated, strict=True)
        )
