"""What the resolver answers: a device's question against policy, the mesh's own names, and who else is to be asked. PURE.

    datagram ──parse──► question ──rules──► hidden: NXDOMAIN
                                   │ names
                                   ├─► known here: records, NODATA or NXDOMAIN, with whose authority it is (SOA)
                                   └─► elsewhere: Ask, and then `finish` with what came back

The rules of the asking device's tenant see each question as they see a flow to the resolver's address, with app.dns_name and app.dns_type
set. One that denies hides the name: it doesn't exist, as far as this device can tell. Without such a rule every name may be asked for; what
stands behind it is decided when somebody goes there. Each name of a chain of aliases is judged.

Every answer comes with what audit says of it. Limits: chains of eight aliases; no cache, so no device learns by the clock what another one has asked.
"""

from __future__ import annotations

from typing import Final

import msgspec
from dnslib import AAAA, CNAME, PTR, QTYPE, RR, SOA, SRV, TXT, A, DNSLabel

from falkirk.decide import resolver
from falkirk.decide.resolver import Query
from falkirk.decide.rules import RuleTable, Verdict
from falkirk.router import messages
from falkirk.router.messages import NOERROR, NXDOMAIN, REFUSED, SERVFAIL, Question
from falkirk.router.name_table import Elsewhere, Local, NameTable, Record
from falkirk.wire.asker import Asker
from falkirk.wire.protocol import UDP

ALIASES: Final = 8
NEGATIVE_TTL: Final = 30
"""Seconds that a client may remember that a name doesn't exist (RFC 2308 5): enrolling a device makes one exist."""
_CNAME: Final = QTYPE.CNAME
_ANY: Final = 255
_TEXT_PART: Final = 255


class Said(msgspec.Struct, omit_defaults=True):
    """What audit is told of a question."""

    query: str
    query_type: str
    rcode: str = ""
    answers: int = 0
    answered_by: str = ""
    """Who knew: device, zone, reserved, policy, forward or upstream; "error" where nobody did."""
    rule: str = ""
    """The rule that decided, as policy/rule."""
    why: str = ""


class Answer(msgspec.Struct, frozen=True):
    """A reply, and what audit says."""

    reply: bytes
    said: Said


class Ask(msgspec.Struct, frozen=True):
    """Another resolver must be asked; `finish` or `fail` ends it."""

    question: Question
    labels: tuple[bytes, ...] | None
    """The name to ask for where it isn't the client's own: the end of a chain of aliases."""
    forward_to: tuple[str, ...]
    """Which resolvers; empty for the node's own."""
    prefix: tuple[RR, ...]
    """Aliases that led there."""
    udp: bool
    said: Said


class Answering:
    """Answers for all tenants. `names` and `rules` are replaced as they change."""

    def __init__(self) -> None:
        self.names = NameTable()
        self.rules: RuleTable | None = None
        """None until they have come: no name is told before it is known what is hidden."""

    def ask(self, asker: Asker, data: bytes) -> Answer | Ask:
        """One message of a client. Raises messages.Unanswerable where no reply is due."""
        question = messages.parse(data)
        udp = asker.protocol == UDP
        said = Said(question.name, question.type_name)
        if question.wrong:
            said.answered_by = "error"
            return self._answer(question, question.wrong, said, udp=udp)
        if question.type == _ANY:
            # RFC 8482: not to be implemented by whom it isn't useful to.
            said.answered_by, said.why = "error", "questions for ANY aren't answered (RFC 8482)"
            return self._answer(question, messages.NOTIMP, said, udp=udp)
        if self.rules is None or not self.names.knows(asker.context.virtual_network_id):
            said.answered_by, said.why = "error", "the resolver doesn't know the tenant's rules and names yet"
            return self._answer(question, SERVFAIL, said, udp=udp)
        return self._resolve(asker, self.rules, question, said, udp=udp)

    def _resolve(self, asker: Asker, rules: RuleTable, question: Question, said: Said, *, udp: bool) -> Answer | Ask:
        name, labels = question.name, None
        chain: list[RR] = []
        for _ in range(ALIASES):
            verdict = hiding(rules, asker, name, question.type_name)
            if verdict is not None:
                said.answered_by, said.rule, said.why = "policy", verdict.rule, verdict.why
                # As if it weren't there: not even the alias that led here.
                return self._answer(question, NXDOMAIN, said, (), _authority(_parent(name)), udp=udp)
            found = self.names.find(asker.context.virtual_network_id, name)
            if found is None or isinstance(found, Elsewhere):
                forward_to = found.forward_to if found is not None else ()
                said.answered_by = "forward" if forward_to else "upstream"
                return Ask(question, labels, forward_to, tuple(chain), udp, said)
            said.answered_by = found.source
            alias = next((record for record in found.records if record.type == "CNAME"), None)
            if alias is None or question.type == _CNAME:
                return self._local(question, found, chain, said, udp=udp)
            chain.append(_record(alias, question, name))
            name = alias.value
            labels = tuple(DNSLabel(name).label)
        said.answered_by, said.why = "error", f"more than {ALIASES} aliases"
        return self._answer(question, SERVFAIL, said, chain, udp=udp)

    def _local(self, question: Question, found: Local, chain: list[RR], said: Said, *, udp: bool) -> Answer:
        wanted = [
            _record(record, question, record.name) for record in found.records if record.type == question.type_name
        ]
        if question.type == QTYPE.SOA and found.exists and question.name == found.apex:
            wanted = _authority(found.apex)
        authority = [] if wanted else _authority(found.apex)
        return self._answer(
            question, NOERROR if found.exists else NXDOMAIN, said, [*chain, *wanted], authority, udp=udp
        )

    def finish(self, ask: Ask, response: bytes) -> Answer:
        """What another resolver has answered, which `messages.fits` found to be an answer."""
        said = ask.said
        if ask.prefix:
            reply = messages.joined(ask.question, ask.prefix, response, udp=ask.udp)
        else:
            reply = messages.passed_on(ask.question, response, udp=ask.udp)
        said.rcode, said.answers = messages.rcode_name(messages.code(reply)), messages.answer_count(response)
        return Answer(reply, said)

    def fail(self, ask: Ask, why: str, rcode: int = SERVFAIL) -> Answer:
        """Nobody has answered."""
        said = ask.said
        said.why = why
        return self._answer(ask.question, rcode, said, udp=ask.udp)

    def refuse(self, data: bytes, why: str, *, udp: bool) -> Answer:
        """A question that isn't looked at, as a limit is reached. Raises messages.Unanswerable."""
        question = messages.parse(data)
        said = Said(question.name, question.type_name, answered_by="error", why=why)
        return self._answer(question, question.wrong or REFUSED, said, udp=udp)

    @staticmethod
    def _answer(
        question: Question,
        rcode: int,
        said: Said,
        answers: tuple[()] | list[RR] = (),
        authority: list[RR] | None = None,
        *,
        udp: bool,
    ) -> Answer:
        reply = messages.reply(question, rcode, answers, authority or (), udp=udp)
        said.rcode, said.answers = messages.rcode_name(rcode), len(answers)
        return Answer(reply, said)


def hiding(rules: RuleTable, asker: Asker, name: str, kind: str) -> Verdict | None:
    """The verdict of a rule that hides a name from a device; None where none does."""
    verdict = rules.decide(asker.context, asker.destination, resolver.PORT, asker.protocol, query=Query(name, kind))
    return verdict if not verdict.allowed and verdict.rule else None


def _record(record: Record, question: Question, name: str) -> RR:
    """A record as dnslib writes it, under the client's own spelling where it is its name."""
    owner = DNSLabel(question.labels) if name == question.name else DNSLabel(name)
    match record.type:
        case "A":
            data = A(record.value)
        case "AAAA":
            data = AAAA(record.value)
        case "CNAME":
            data = CNAME(record.value)
        case "PTR":
            data = PTR(record.value)
        case "SRV":
            priority, weight, port, target = record.value.split()
            data = SRV(int(priority), int(weight), int(port), target)
        case _:
            raw = record.value.encode()
            data = TXT([raw[at : at + _TEXT_PART] for at in range(0, len(raw), _TEXT_PART)] or [b""])
    return RR(owner, getattr(QTYPE, record.type), rdata=data, ttl=record.ttl)


def _authority(apex: str) -> list[RR]:
    """The SOA of a domain of ours: there is nothing behind its names but what a negative answer needs (RFC 2308 3)."""
    times = (1, 3600, 600, 86_400, NEGATIVE_TTL)
    start = SOA(f"resolver.{resolver.DOMAIN}", f"hostmaster.{resolver.DOMAIN}", times)
    return [RR(DNSLabel(apex), QTYPE.SOA, rdata=start, ttl=NEGATIVE_TTL)]


def _parent(name: str) -> str:
    return name.partition(".")[2] or name
