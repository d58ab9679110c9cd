"""Rules: may this flow exist, and how high is it lifted. PURE: the policy service, the registry and every packet worker run this.

A tenant's policies are read in ascending priority, then by name; their rules in the order written. The first rule whose
expression (`falkirk.decide.cel`) is true decides; where none is, the flow is denied. A tenant's rules see only its own
flows.

Errors while evaluating (a posture fact that isn't there) fail closed: an allow rule that errs doesn't match, a deny rule
that errs does. A rule that doesn't even compile (it should never get here: the registry refuses it) is treated alike.

    owner    Compiler().compile(policies) -> bytes      10,000 rules: 0.6 s; unchanged rules are remembered
    worker   loading = RuleTable.load(bytes); next(loading) once a turn until it ends; then loading.table
             table.decide(context, destination, port, protocol) -> Verdict

Loading does all work that can be done ahead, in steps of about a millisecond; deciding is an index look-up
(`falkirk.decide.index`) and the evaluation of the few rules that guards don't settle. Worst case: 10,000 rules without any
guard (`device.name.endsWith("x")`) are each evaluated, at 2 us. Limit: an expression that needs evaluation takes about 7 kB a process; exact ones none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from falkirk.decide import cel, snapshot
from falkirk.decide.destination import NO_DEVICE, DestinationDevice
from falkirk.decide.guards import MISSING, NOTHING, Guards, guards
from falkirk.decide.index import Question, RuleIndex
from falkirk.decide.resolver import NO_QUERY, Query
from falkirk.wire.context import TunnelContext

_WARM_STEP = 12
"""Expressions deserialised and planned between two yields, 40 us each."""
_WHY_EXPRESSION = 160
"""Characters of an expression shown in a verdict."""


class RuleSource(msgspec.Struct, frozen=True):
    """A rule as written. `treatment` is "l3", "l4", "http", "ssh" or "" (the protocol's default)."""

    name: str
    when: str
    action: Literal["allow", "deny"] = "allow"
    treatment: str = ""


class PolicySource(msgspec.Struct, frozen=True):
    """A policy as written; disabled ones are left out by the caller."""

    tenant_id: str
    policy: str
    priority: int
    rules: Sequence[RuleSource]


class RuleError(msgspec.Struct, frozen=True):
    """Why a rule is refused; line and column count from 1."""

    rule: str
    line: int
    column: int
    message: str


class Verdict(msgspec.Struct, frozen=True):
    """What a decision came to. `rule` is policy/rule, "" for the default deny; `treatment` as in RuleSource."""

    allowed: bool
    rule: str
    why: str
    treatment: str = ""


class RuleTrace(msgspec.Struct, frozen=True):
    """What became of a rule: `outcome` is matched, no_match, error, not_reached or skipped_by_index. A deny rule that errs decides,
    with outcome error."""

    rule: str
    outcome: str
    when: str
    error: str = ""


def check(rules: Sequence[RuleSource]) -> list[RuleError]:
    """What is wrong with the rules of one policy, in order; empty where all compile and names are unique."""
    errors: list[RuleError] = []
    names: set[str] = set()
    for rule in rules:
        if rule.name in names:
            errors.append(RuleError(rule.name, 1, 1, "another rule of this policy has this name"))
        names.add(rule.name)
        try:
            guards(rule.when, cel.compile_expression(rule.when))
        except cel.InvalidExpression as invalid:
            errors += [RuleError(rule.name, d.line, d.column, d.message) for d in invalid.diagnostics]
    return errors


class _Predicate(msgspec.Struct, frozen=True):
    """An expression, compiled: `serialized` is empty for one that needs no evaluation."""

    guards: Guards
    serialized: bytes = b""
    problem: str = ""


class Compiler:
    """Compiles policies, and remembers expressions from one time to the next. Not safe for two threads at once."""

    def __init__(self) -> None:
        self._known: dict[str, _Predicate] = {}
        self.errors: list[RuleError] = []
        """Rules of the last `compile` that didn't compile; `rule` is policy/rule."""

    def compile(self, policies: Sequence[PolicySource]) -> bytes:
        """A snapshot for `RuleTable.load`."""
        known: dict[str, _Predicate] = {}
        numbers: dict[bytes, int] = {}
        tenants: dict[str, list[snapshot.Guarded]] = {}
        self.errors = []
        for policy in sorted(policies, key=lambda policy: (policy.tenant_id, policy.priority, policy.policy)):
            for rule in policy.rules:
                predicate = known.get(rule.when) or self._known.get(rule.when) or _compile_one(rule.when)
                known[rule.when] = predicate
                label = f"{policy.policy}/{rule.name}"
                if predicate.problem:
                    expression = snapshot.BROKEN
                    self.errors.append(RuleError(label, 1, 1, predicate.problem))
                elif predicate.serialized:
                    expression = numbers.setdefault(predicate.serialized, len(numbers))
                else:
                    expression = snapshot.EXACT
                allowed = {variable: sorted(values, key=str) for variable, values in predicate.guards.values.items()}
                allow = rule.action == "allow"
                compiled = snapshot.Rule(label, rule.when, allow, rule.treatment, expression, predicate.problem)
                tenants.setdefault(policy.tenant_id, []).append((compiled, allowed))
        self._known = known
        return snapshot.write(list(numbers), tenants)


def compile(policies: Sequence[PolicySource]) -> bytes:
    """A snapshot for `RuleTable.load`; see Compiler for repeated use."""
    return Compiler().compile(policies)


def _compile_one(when: str) -> _Predicate:
    try:
        compiled = cel.compile_expression(when)
        found = guards(when, compiled)
    except cel.InvalidExpression as invalid:
        return _Predicate(NOTHING, problem=str(invalid))
    return _Predicate(found, b"" if found.exact else compiled.serialized)


class _Tenant:
    __slots__ = ("index", "rules")

    def __init__(self) -> None:
        self.rules: list[snapshot.Rule] = []
        self.index = RuleIndex()


class Loading:
    """Iterator over the steps of loading; `table` is there once it has ended. Raises UnreadableRules from any step."""

    def __init__(self, data: bytes) -> None:
        self.table: RuleTable | None = None
        self._steps = self._load(data)

    def __iter__(self) -> Iterator[None]:
        return self

    def __next__(self) -> None:
        next(self._steps)

    def _load(self, data: bytes) -> Iterator[None]:
        serialized: list[bytes] = []
        tenants: dict[str, _Tenant] = {}
        for frame in snapshot.read(data):
            if isinstance(frame, snapshot.Expressions):
                serialized += frame.serialized
            elif isinstance(frame, snapshot.Rules):
                tenant = tenants.setdefault(frame.tenant_id, _Tenant())
                for rule, allowed in zip(frame.rules, frame.guards, strict=True):
                    if rule.expression >= len(serialized) or rule.expression < snapshot.BROKEN:
                        raise snapshot.UnreadableRules(f"rule {rule.label} names an expression that isn't there")
                    tenant.rules.append(rule)
                    if rule.allow:
                        # An allow rule that errs doesn't match, so it needn't be evaluated to find that a key is missing.
                        allowed = {name: [one for one in values if one != MISSING] for name, values in allowed.items()}
                    try:
                        tenant.index.add(allowed)
                    except ValueError as error:
                        raise snapshot.UnreadableRules(f"rule {rule.label} has a guard that can't be one") from error
            yield
        expressions: list[cel.Expression] = []
        nobody = cel.activation(TunnelContext("", "", "", "", "", "", ()), bytes(4), 0, 0)
        for number, data_of_one in enumerate(serialized):
            try:
                expression = cel.Expression(data_of_one)
            except ValueError as error:
                raise snapshot.UnreadableRules(str(error)) from error
            expression.evaluate(nobody)  # plans it
            expressions.append(expression)
            if number % _WARM_STEP == _WARM_STEP - 1:
                yield
        for number, tenant in enumerate(tenants.values()):
            yield from tenant.index.seal()
            if number % _WARM_STEP == _WARM_STEP - 1:
                yield
        self.table = RuleTable(tenants, expressions)


class RuleTable:
    """The rules in force. Immutable but for `errors`."""

    def __init__(self, tenants: dict[str, _Tenant], expressions: list[cel.Expression]) -> None:
        self._tenants = tenants
        self._expressions = expressions
        self.errors: dict[str, int] = {}
        """Evaluations that ended in an error, by rule."""

    @classmethod
    def load(cls, data: bytes) -> Loading:
        """Starts loading a snapshot: iterate, then take `.table`. No work is done before the first step."""
        return Loading(data)

    @classmethod
    def empty(cls) -> RuleTable:
        """No rules: everything is denied."""
        return cls({}, [])

    def count(self, tenant_id: str) -> int:
        """Rules in force for a tenant."""
        tenant = self._tenants.get(tenant_id)
        return len(tenant.rules) if tenant else 0

    def tenants(self) -> list[str]:
        """Ids of tenants that have rules."""
        return list(self._tenants)

    def decide(
        self,
        context: TunnelContext,
        destination: bytes,
        port: int,
        protocol: int,
        device: DestinationDevice = NO_DEVICE,
        query: Query = NO_QUERY,
    ) -> Verdict:
        """The verdict on one flow; `destination` packed, `protocol` the IANA number, `port` 0 where there is none, `device` whom
        its route leads to; or, with `query`, on one question to the tenant's resolver."""
        tenant = self._tenants.get(context.tenant_id)
        if tenant is None:
            return _default(context)
        candidates = tenant.index.candidates(_question(context, destination, port, protocol, device, query))
        activation: cel.Activation | None = None
        while candidates:
            lowest = candidates & -candidates
            candidates ^= lowest
            rule = tenant.rules[lowest.bit_length() - 1]
            outcome: bool | str = True
            if rule.expression >= 0:
                if activation is None:
                    activation = cel.activation(context, destination, port, protocol, device, query)
                outcome = self._expressions[rule.expression].evaluate(activation)
            elif rule.expression == snapshot.BROKEN:
                outcome = rule.problem
            if outcome is False:
                continue
            if outcome is not True:
                self.errors[rule.label] = self.errors.get(rule.label, 0) + 1
            verdict = _verdict(rule, outcome)
            if verdict is not None:
                return verdict
        return _default(context)

    def explain(
        self,
        context: TunnelContext,
        destination: bytes,
        port: int,
        protocol: int,
        device: DestinationDevice = NO_DEVICE,
        limit: int = 1000,
    ) -> tuple[Verdict, list[RuleTrace]]:
        """The same verdict, and what became of the tenant's first `limit` rules."""
        tenant = self._tenants.get(context.tenant_id)
        if tenant is None:
            return _default(context), []
        candidates = tenant.index.candidates(_question(context, destination, port, protocol, device))
        activation = cel.activation(context, destination, port, protocol, device)
        verdict: Verdict | None = None
        traces: list[RuleTrace] = []
        result: bool | str
        for number, rule in enumerate(tenant.rules):
            error = ""
            if verdict is not None:
                outcome = "not_reached"
            elif not candidates >> number & 1:
                outcome = "skipped_by_index"
                if rule.allow and rule.expression >= 0 and len(traces) < limit:
                    # Passed over it is like one that errs; people want to know which it is.
                    result = self._expressions[rule.expression].evaluate(activation)
                    outcome, error = ("error", result) if isinstance(result, str) else (outcome, "")
            else:
                result = True
                if rule.expression >= 0:
                    result = self._expressions[rule.expression].evaluate(activation)
                elif rule.expression == snapshot.BROKEN:
                    result = rule.problem
                error = result if isinstance(result, str) else ""
                outcome = "error" if error else "matched" if result else "no_match"
                verdict = _verdict(rule, result)
            if len(traces) < limit:
                traces.append(RuleTrace(rule.label, outcome, rule.when, error))
            elif verdict is not None:
                break
        return verdict or _default(context), traces


def _question(
    context: TunnelContext,
    destination: bytes,
    port: int,
    protocol: int,
    device: DestinationDevice,
    query: Query = NO_QUERY,
) -> Question:
    """In the order of `guards.GROUP_LISTS`, `guards.SCALARS` and `guards.MAPS`."""
    return Question(
        destination,
        (context.groups, device.groups),
        (
            port,
            cel.PROTOCOL_NAMES.get(protocol, "other"),
            protocol,
            4 if len(destination) == 4 else 6,
            context.device,
            context.user,
            context.virtual_network,
            context.tenant,
            device.device,
            device.user,
            query.name,
            query.type,
        ),
        port,
        (context.posture, context.attributes),
    )


def _verdict(rule: snapshot.Rule, outcome: bool | str) -> Verdict | None:
    """What a rule's outcome comes to; None where it doesn't decide."""
    if outcome is False:
        return None
    when = (
        rule.when if len(rule.when) <= _WHY_EXPRESSION else rule.when[: _WHY_EXPRESSION - 1] + "\N{HORIZONTAL ELLIPSIS}"
    )
    if outcome is True:
        return Verdict(
            rule.allow, rule.label, f"{'allowed' if rule.allow else 'denied'} by {rule.label}: {when}", rule.treatment
        )
    if rule.allow:
        return None
    return Verdict(False, rule.label, f"denied by {rule.label}, which could not be evaluated (fail closed): {outcome}")


def _default(context: TunnelContext) -> Verdict:
    return Verdict(False, "", f"no rule of tenant {context.tenant} matched (default deny)")
