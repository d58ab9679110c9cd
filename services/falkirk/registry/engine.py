"""What a write does, the same for every kind: find, judge, fill in, resolve, compare, claim, keep, tell.

`Engine` works inside one transaction of the store. The steps of a write:

1. find the tenant and the stored resource (by id where one is given, else by name); check revision and identity
2. bring the value to its canonical form (`kinds`), fill in what was left to the registry (`defaults`)
3. resolve references, given by name or id, to ids; the body shows names
4. compare with what is stored: equal changes nothing, not even the revision
5. claim what must be unique; keep body and references; note the change for watches
6. follow up: a renamed resource is renamed in the bodies of all that refer to it, in the same transaction, so that a
   watcher who resolves names by what it was told is never left with a dangling one

Within `apply`, a claim may be taken from a resource that the same request is still going to write: two routes may
swap their prefixes. Time, ids and random bytes are given in from outside.
"""

from __future__ import annotations

import re
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from falkirk.api.registry.v1 import registry_service_pb2 as registry_pb2
from falkirk.registry import defaults, fields, kinds
from falkirk.registry.kinds import BY_NAME, BY_NUMBER, KINDS, Kind, Value
from falkirk.registry.refusal import Reason, Refused
from falkirk.registry.store import Change, Writing

CREATED = registry_pb2.ApplyResponse.OUTCOME_CREATED
UPDATED = registry_pb2.ApplyResponse.OUTCOME_UPDATED
UNCHANGED = registry_pb2.ApplyResponse.OUTCOME_UNCHANGED

R = TypeVar("R")

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_ORDER = {kind.number: position for position, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the engine may not fetch for itself."""

    now_ns: Callable[[], int]
    """Wall-clock time in nanoseconds since 1970."""
    new_id: Callable[[], str]
    """A fresh UUID in text."""
    random: Callable[[int], bytes]
    """So many random bytes, fit for RFC 4193 section 3.2.2."""


@dataclass(slots=True)
class Engine:
    """Writes of one transaction."""

    writing: Writing
    surroundings: Surroundings
    pending: set[str] = field(default_factory=set)
    """Ids that this transaction is still going to write: their claims may be taken."""
    _bereft: set[str] = field(default_factory=set)
    """Those whose claims were taken."""
    _tenants: dict[str, tuple[str, str]] = field(default_factory=dict)
    _targets: dict[tuple[int, str, str], tuple[str, str]] = field(default_factory=dict)

    # -- what service asks for

    def create(self, kind: Kind, value: Value) -> Value:
        """Make one. Raises `Refused`."""
        for name in ("id", "revision", "tenant_id"):
            fields.empty(getattr(value.metadata, name), f"metadata.{name}")
        for name in ("create_time", "update_time"):
            fields.empty(value.metadata.HasField(name), f"metadata.{name}")
        self.enter_tenant(kind, value)
        return self.put(kind, value, None)[0]

    def update(self, kind: Kind, value: Value) -> Value:
        """Replace one, found by id, else by name. Raises `Refused`."""
        self.enter_tenant(kind, value)
        stored = self._stored_for(kind, value)
        if stored is None:
            raise not_found(kind, value.metadata.name or value.metadata.id, value.metadata.tenant)
        self._same_tenant(kind, value, stored)
        return self.put(kind, value, stored)[0]

    def delete(self, kind: Kind, tenant: str, name: str, revision: int) -> None:
        """Remove one; `revision` 0 removes whatever is there. Raises `Refused`."""
        stored = find(self.connection, kind, self._tenant(tenant)[1] if kind.scoped else "", name)
        if stored is None:
            raise not_found(kind, name, tenant)
        _check_revision(kind, stored, revision)
        defaults.check_delete(stored)
        self._check_unused(kind, stored)
        defaults.before_delete(self, stored)
        self.remove(kind, stored)

    def apply(
        self, resources: Sequence[registry_pb2.Resource]
    ) -> tuple[list[tuple[Kind, Value]], list[registry_pb2.ApplyResponse.Outcome]]:
        """Create or update all by name. Raises `Refused` with `index`, the position of the one at fault."""
        count = len(resources)
        results: list[tuple[Kind, Value] | None] = [None] * count
        outcomes = [UNCHANGED] * count
        work: list[tuple[int, Kind, Value]] = []
        for index, resource in enumerate(resources):
            with_index(index, lambda resource=resource, index=index: work.append((index, *kinds.unwrap(resource))))  # type: ignore[misc]
        work.sort(key=lambda item: _ORDER[item[1].number])
        self._expect(work)
        seen: dict[str, int] = {}
        for index, kind, value in work:
            stored, outcome = with_index(index, lambda kind=kind, value=value: self._apply_one(kind, value))  # type: ignore[misc]
            first = seen.setdefault(stored.metadata.id, index)
            if first != index:
                again = f"{kind.label} {stored.metadata.name} is given twice, as resources {first + 1} and {index + 1}"
                raise Refused(Reason.DUPLICATE, again, index=str(index), field="metadata.name")
            results[index], outcomes[index] = (kind, stored), outcome
        return self._final([result for result in results if result is not None], outcomes)

    # -- steps, also used by defaults

    @property
    def connection(self) -> sqlite3.Connection:
        """The store's writer."""
        return self.writing.connection

    def put(self, kind: Kind, value: Value, stored: Value | None) -> tuple[Value, registry_pb2.ApplyResponse.Outcome]:
        """Steps 2 to 6 for a value whose tenant has been entered. The stored form, and what happened. Raises `Refused`."""
        if stored is not None:
            _check_revision(kind, stored, value.metadata.revision)
        kinds.judge_metadata(kind, value)
        kind.judge(value)
        if stored is not None:
            self._identify(value, stored)
        else:
            self._identify_new(value)
        defaults.fill(self, value, stored)
        references = self._resolve(kind, value)
        if stored is not None and _equal(value, stored):
            if stored.metadata.id in self._bereft:
                self._claim(kind, value, references)
            self.pending.discard(stored.metadata.id)
            return stored, UNCHANGED
        self._stamp(value, stored)
        self._claim(kind, value, references)
        self._keep(kind, value, stored, references)
        defaults.after_write(self, value, stored)
        if stored is not None and stored.metadata.name != value.metadata.name:
            self._rename(kind, value)
        return value, UPDATED if stored is not None else CREATED

    def remove(self, kind: Kind, stored: Value) -> None:
        """Take a resource, its references and its claims away, unasked."""
        key = stored.metadata.id
        self.connection.execute("DELETE FROM resource WHERE id = ?", (key,))
        self.connection.execute("DELETE FROM reference WHERE source = ?", (key,))
        self.connection.execute("DELETE FROM claim WHERE holder = ?", (key,))
        self._note(kind, stored, None)

    def enter_tenant(self, kind: Kind, value: Value) -> None:
        """Set the value's tenant, given by name or id, to its name and id. Raises `Refused`."""
        if not kind.scoped:
            fields.empty(value.metadata.tenant, "metadata.tenant")
            return
        given = value.metadata.tenant_id or value.metadata.tenant
        if not given:
            raise Refused(
                Reason.INVALID_FIELD, f"metadata.tenant: a {kind.label} lives in a tenant", field="metadata.tenant"
            )
        key, name = self._tenant(given)
        if value.metadata.tenant not in ("", key, name):
            raise Refused(
                Reason.INVALID_FIELD, "metadata.tenant: isn't the one of metadata.tenant_id", field="metadata.tenant"
            )
        value.metadata.tenant, value.metadata.tenant_id = name, key

    def resave(self, kind: Kind, value: Value) -> None:
        """Keep a stored value whose body was changed by another's write."""
        self._stamp(value, value)
        self.connection.execute(
            "UPDATE resource SET tenant = ?, name = ?, body = ? WHERE id = ?",
            (value.metadata.tenant, value.metadata.name, kinds.serialise(value), value.metadata.id),
        )
        self._note(kind, value, value)

    # -- inside

    def _apply_one(self, kind: Kind, value: Value) -> tuple[Value, registry_pb2.ApplyResponse.Outcome]:
        self.enter_tenant(kind, value)
        stored = self._stored_for(kind, value)
        if stored is None and value.metadata.id:
            raise not_found(kind, value.metadata.id, value.metadata.tenant)
        if stored is not None:
            self._same_tenant(kind, value, stored)
        return self.put(kind, value, stored)

    def _final(
        self, results: list[tuple[Kind, Value]], outcomes: list[registry_pb2.ApplyResponse.Outcome]
    ) -> tuple[list[tuple[Kind, Value]], list[registry_pb2.ApplyResponse.Outcome]]:
        """What was written early may have been changed by what was written later: a rename, a moved default mark."""
        for position, (kind, value) in enumerate(results):
            change = self.writing.changes.get(value.metadata.id)
            if change is not None and change.body is not None:
                results[position] = (kind, kinds.parse(kind, change.body))
                outcomes[position] = outcomes[position] if outcomes[position] != UNCHANGED else UPDATED
        return results, outcomes

    def _expect(self, work: Sequence[tuple[int, Kind, Value]]) -> None:
        """Note who is going to be written, as far as it exists already."""
        tenants = dict(
            self.connection.execute("SELECT id, name FROM resource WHERE kind = ?", (registry_pb2.KIND_TENANT,))
        )
        for _, kind, value in work:
            if kind.claims is None:
                continue
            tenant = tenants.get(value.metadata.tenant, value.metadata.tenant)
            row = self.connection.execute(
                "SELECT id FROM resource WHERE kind = ? AND tenant = ? AND name = ?",
                (kind.number, tenant, value.metadata.name),
            ).fetchone()
            if value.metadata.id or row:
                self.pending.add(value.metadata.id or row[0])

    def _tenant(self, given: str) -> tuple[str, str]:
        """(id, name) of a tenant given by either."""
        found = self._tenants.get(given)
        if found is None:
            tenant = BY_NAME["tenant"]
            stored = find(self.connection, tenant, "", given)
            if stored is None:
                raise not_found(tenant, given)
            found = self._tenants[given] = (stored.metadata.id, stored.metadata.name)
        return found

    def _stored_for(self, kind: Kind, value: Value) -> Value | None:
        if value.metadata.id:
            return by_id(self.connection, kind, value.metadata.id)
        return find(self.connection, kind, value.metadata.tenant, value.metadata.name)

    @staticmethod
    def _same_tenant(kind: Kind, value: Value, stored: Value) -> None:
        if stored.metadata.tenant_id != value.metadata.tenant_id:
            # Said like an unknown id: nothing of another tenant shows.
            raise not_found(kind, value.metadata.id, value.metadata.tenant)

    def _identify(self, value: Value, stored: Value) -> None:
        value.metadata.id = stored.metadata.id
        value.metadata.revision = stored.metadata.revision
        value.metadata.create_time.CopyFrom(stored.metadata.create_time)
        value.metadata.update_time.CopyFrom(stored.metadata.update_time)

    def _identify_new(self, value: Value) -> None:
        value.metadata.id = self.surroundings.new_id()

    def _resolve(self, kind: Kind, value: Value) -> dict[str, str]:
        """Ids by field; the fields show names afterwards."""
        found: dict[str, str] = {}
        for reference in kind.references:
            given = reference.given(value)
            if not given:
                continue
            target = BY_NAME[reference.kind]
            cached = (target.number, value.metadata.tenant_id, given)
            pair = self._targets.get(cached)
            if pair is None:
                stored = find(self.connection, target, value.metadata.tenant, given)
                if stored is None:
                    missing = not_found(target, given, value.metadata.tenant)
                    raise Refused(
                        missing.reason, f"{reference.field}: {missing.message}", field=reference.field, **missing.about
                    )
                pair = self._targets[cached] = (stored.metadata.id, stored.metadata.name)
            found[reference.field] = pair[0]
            reference.show(value, pair[1])
        return found

    def _stamp(self, value: Value, stored: Value | None) -> None:
        now = Timestamp()
        now.FromNanoseconds(self.surroundings.now_ns())
        value.metadata.revision = self.writing.revision
        value.metadata.update_time.CopyFrom(now)
        if stored is None:
            value.metadata.create_time.CopyFrom(now)

    def _claim(self, kind: Kind, value: Value, references: Mapping[str, str]) -> None:
        if kind.claims is None:
            return
        key = value.metadata.id
        self.pending.discard(key)
        claims = kind.claims(value, references)
        self.connection.execute("DELETE FROM claim WHERE holder = ?", (key,))
        for claim in claims:
            row = self.connection.execute(
                "SELECT holder FROM claim WHERE scope = ? AND key = ?", (claim.scope, claim.key)
            ).fetchone()
            if row is not None:
                # From one that is still to be written; the default mark always, since `defaults` takes it off the other.
                if row[0] not in self.pending and claim.taken is not Reason.IS_DEFAULT:
                    raise Refused(claim.taken, claim.message, **claim.about)
                self._bereft.add(row[0])
            self.connection.execute(
                "INSERT OR REPLACE INTO claim (scope, key, holder) VALUES (?, ?, ?)", (claim.scope, claim.key, key)
            )

    def _keep(self, kind: Kind, value: Value, stored: Value | None, references: Mapping[str, str]) -> None:
        metadata = value.metadata
        row = (kind.number, metadata.tenant_id, metadata.tenant, metadata.name, kinds.serialise(value), metadata.id)
        try:
            if stored is None:
                self.connection.execute(
                    "INSERT INTO resource (kind, tenant_id, tenant, name, body, id) VALUES (?, ?, ?, ?, ?, ?)", row
                )
            else:
                self.connection.execute(
                    "UPDATE resource SET kind = ?, tenant_id = ?, tenant = ?, name = ?, body = ? WHERE id = ?", row
                )
        except sqlite3.IntegrityError as error:
            if "resource.name" not in str(error):
                raise
            where = f" in tenant {metadata.tenant}" if kind.scoped else ""
            raise Refused(
                Reason.NAME_TAKEN,
                f"there is a {kind.label} called {metadata.name}{where} already",
                field="metadata.name",
                kind=kind.name,
                name=metadata.name,
            ) from None
        if stored is not None and kind.references:
            self.connection.execute("DELETE FROM reference WHERE source = ?", (metadata.id,))
        for name, target in references.items():
            self.connection.execute(
                "INSERT INTO reference (source, field, target) VALUES (?, ?, ?)", (metadata.id, name, target)
            )
        self._note(kind, value, value)

    def _note(self, kind: Kind, value: Value, now: Value | None) -> None:
        # Both are in the memory of many changes, and of who is present.
        key, tenant_id = sys.intern(value.metadata.id), sys.intern(value.metadata.tenant_id)
        body = kinds.serialise(now) if now is not None else None
        self.writing.changes[key] = Change(kind.number, key, tenant_id, body)

    def _rename(self, kind: Kind, value: Value) -> None:
        """Show the new name wherever the old one was shown."""
        self._tenants.clear()
        self._targets.clear()
        key, name = value.metadata.id, value.metadata.name
        if kind.holds_others:
            rows = self.connection.execute("SELECT kind, body FROM resource WHERE tenant_id = ?", (key,)).fetchall()
            for number, body in rows:
                inner = kinds.parse(BY_NUMBER[number], body)
                inner.metadata.tenant = name
                self.resave(BY_NUMBER[number], inner)
            return
        rows = self.connection.execute(
            "SELECT kind, body, field FROM reference JOIN resource ON resource.id = reference.source WHERE target = ?",
            (key,),
        ).fetchall()
        for number, body, field_name in rows:
            source = kinds.parse(BY_NUMBER[number], body)
            next(r for r in BY_NUMBER[number].references if r.field == field_name).show(source, name)
            self.resave(BY_NUMBER[number], source)

    def _check_unused(self, kind: Kind, stored: Value) -> None:
        key = stored.metadata.id
        counts: dict[str, int] = {}
        for number, count in self.connection.execute(
            "SELECT kind, count(*) FROM reference JOIN resource ON resource.id = reference.source WHERE target = ? GROUP BY kind",
            (key,),
        ):
            counts[BY_NUMBER[number].plural] = count
        if kind.holds_others:
            for number, count in self.connection.execute(
                "SELECT kind, count(*) FROM resource WHERE tenant_id = ? GROUP BY kind", (key,)
            ):
                counts[BY_NUMBER[number].plural] = count
            defaults.discount(counts)
        if counts:
            left = ", ".join(
                f"{count} {plural if count != 1 else _singular(plural)}".replace("_", " ")
                for plural, count in sorted(counts.items())
            )
            examples = ", ".join(self._examples(kind, key))
            raise Refused(
                Reason.IN_USE,
                f"{kind.label} {stored.metadata.name} still has {left}: {examples}",
                kind=kind.name,
                name=stored.metadata.name,
                left=",".join(f"{plural}={count}" for plural, count in sorted(counts.items())),
            )

    def _examples(self, kind: Kind, key: str, limit: int = 5) -> list[str]:
        """Some of those that keep a resource from being removed, as kind/name."""
        if not kind.holds_others:
            query = "SELECT DISTINCT kind, name FROM reference JOIN resource ON resource.id = reference.source WHERE target = ? ORDER BY kind, name LIMIT ?"
        else:
            query = """SELECT kind, name FROM resource WHERE tenant_id = ?
                AND id NOT IN (SELECT holder FROM claim WHERE scope = 'default:' || tenant_id) ORDER BY kind, name LIMIT ?"""
        rows = self.connection.execute(query, (key, limit + 1)).fetchall()
        shown = [f"{BY_NUMBER[number].name}/{name}" for number, name in rows[:limit]]
        return [*shown, "…"] if len(rows) > limit else shown


def with_index(index: int, work: Callable[[], R]) -> R:
    """Run a step; what it refuses says which resource of the request was at fault."""
    try:
        return work()
    except Refused as refused:
        raise Refused(refused.reason, refused.message, **{**refused.about, "index": str(index)}) from refused


def find(connection: sqlite3.Connection, kind: Kind, tenant: str, given: str) -> Value | None:
    """One by name or id, in the tenant of that name ('' for tenants)."""
    row = connection.execute(
        "SELECT body FROM resource WHERE kind = ? AND tenant = ? AND name = ?", (kind.number, tenant, given)
    ).fetchone()
    if row is None and _UUID.match(given):
        row = connection.execute(
            "SELECT body FROM resource WHERE id = ? AND kind = ? AND tenant = ?", (given, kind.number, tenant)
        ).fetchone()
    return kinds.parse(kind, row[0]) if row is not None else None


def by_id(connection: sqlite3.Connection, kind: Kind, key: str) -> Value | None:
    """One by id, in whatever tenant."""
    row = connection.execute("SELECT body FROM resource WHERE id = ? AND kind = ?", (key, kind.number)).fetchone()
    return kinds.parse(kind, row[0]) if row is not None else None


def not_found(kind: Kind, given: str, tenant: str = "") -> Refused:
    """The refusal for something that isn't there."""
    where = f" in tenant {tenant}" if tenant else ""
    return Refused(Reason.NOT_FOUND, f"there is no {kind.label} called {given!r}{where}", kind=kind.name, name=given)


def _check_revision(kind: Kind, stored: Value, revision: int) -> None:
    if revision and revision != stored.metadata.revision:
        raise Refused(
            Reason.REVISION_CONFLICT,
            f"{kind.label} {stored.metadata.name} changed at revision {stored.metadata.revision}, after {revision} was read",
            kind=kind.name,
            name=stored.metadata.name,
            current=str(stored.metadata.revision),
        )


def _equal(value: Value, stored: Value) -> bool:
    return kinds.serialise(value) == kinds.serialise(stored)


def _singular(plural: str) -> str:
    return next(kind.name for kind in KINDS if kind.plural == plural)
