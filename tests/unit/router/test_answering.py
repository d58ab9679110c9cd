"""What the resolver answers."""

from __future__ import annotations

from typing import Any

import pytest
from dnslib import QTYPE, RR, A, DNSHeader, DNSQuestion, DNSRecord

from falkirk.decide import rules
from falkirk.decide.rules import PolicySource, RuleSource, RuleTable
from falkirk.router import messages, name_table
from falkirk.router.answering import ALIASES, Answer, Answering, Ask
from falkirk.router.name_table import NameTable, Network, Record, Zone
from falkirk.wire.asker import Asker
from falkirk.wire.context import TunnelContext

RECORDS = [
    Record("www.corp.internal", "A", "10.1.0.2", 300),
    Record("www.corp.internal", "TXT", "x" * 300, 300),
    Record("alias.corp.internal", "CNAME", "www.corp.internal", 300),
    Record("out.corp.internal", "CNAME", "www.example.com", 300),
    Record("secret.corp.internal", "A", "10.1.0.3", 300),
    Record("tosecret.corp.internal", "CNAME", "secret.corp.internal", 300),
    Record("loop.corp.internal", "CNAME", "loop.corp.internal", 300),
    Record("_ldap._tcp.corp.internal", "SRV", "0 5 389 www.corp.internal", 300),
    *(Record(f"c{n}.corp.internal", "CNAME", f"c{n + 1}.corp.internal", 300) for n in range(20)),
]
NETWORK = Network("n1", "acme", ["100.96.0.0/12"], [("nas", ("100.96.0.7",))], [Zone("corp.internal", RECORDS, [])])
RULES = [
    RuleSource("secret", 'app.dns_name == "secret.corp.internal" && !("staff" in identity.groups)', "deny"),
    RuleSource("mail", 'app.dns_type == "MX"', "deny"),
    RuleSource("web", "net.port == 443", "allow"),
]


def table(sources: list[RuleSource]) -> RuleTable:
    loading = RuleTable.load(rules.compile([PolicySource("t1", "p", 0, sources)]))
    for _ in loading:
        pass
    assert loading.table is not None
    return loading.table


def answering(sources: list[RuleSource] = RULES) -> Answering:
    made = Answering()
    made.names = NameTable.load(name_table.encode([NETWORK]))
    made.rules = table(sources)
    return made


def asker(*groups: str, protocol: int = 17, network: str = "n1") -> Asker:
    context = TunnelContext("t1", "acme", "d1", "laptop", network, "default", (bytes(4),), groups=groups)
    return Asker(bytes(16), protocol, bytes(4), 4711, bytes([100, 96, 0, 53]), context)


def ask(name: str, kind: str = "A", who: Asker | None = None, how: Answering | None = None) -> Answer | Ask:
    data = bytes(DNSRecord(DNSHeader(id=7, rd=1), q=DNSQuestion(name, getattr(QTYPE, kind))).pack())
    return (how or answering()).ask(who or asker(), data)


def told(answer: Answer | Ask) -> tuple[str, list[str]]:
    """Response code and records."""
    assert isinstance(answer, Answer)
    reply = DNSRecord.parse(answer.reply)
    return messages.rcode_name(reply.header.rcode), [str(record.rdata) for record in reply.rr]


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("nas.acme.falkirk", "A", ("NOERROR", ["100.96.0.7"])),
        ("nas.acme.falkirk", "AAAA", ("NOERROR", [])),
        ("no.acme.falkirk", "A", ("NXDOMAIN", [])),
        ("7.0.96.100.in-addr.arpa", "PTR", ("NOERROR", ["nas.acme.falkirk."])),
        ("alias.corp.internal", "A", ("NOERROR", ["www.corp.internal.", "10.1.0.2"])),
        ("alias.corp.internal", "CNAME", ("NOERROR", ["www.corp.internal."])),
        ("_ldap._tcp.corp.internal", "SRV", ("NOERROR", ["0 5 389 www.corp.internal."])),
        ("loop.corp.internal", "A", ("SERVFAIL", ["loop.corp.internal."] * ALIASES)),
        ("www.corp.internal", "ANY", ("NOTIMP", [])),
        # Hidden: by its name, behind an alias (which goes too), by its type even where it isn't ours.
        ("secret.corp.internal", "A", ("NXDOMAIN", [])),
        ("tosecret.corp.internal", "A", ("NXDOMAIN", [])),
        ("SECRET.Corp.internal", "A", ("NXDOMAIN", [])),
        ("example.com", "MX", ("NXDOMAIN", [])),
    ],
)
def test_answers(name: str, kind: str, expected: tuple[str, list[str]]) -> None:
    assert told(ask(name, kind)) == expected


def test_a_negative_answer_says_how_long_it_holds() -> None:
    answer = ask("no.acme.falkirk")
    assert isinstance(answer, Answer)
    (start,) = DNSRecord.parse(answer.reply).auth
    assert (str(start.rname), start.ttl, start.rdata.times[4]) == ("acme.falkirk.", 30, 30)


def test_who_may_see_a_name_sees_it_and_audit_names_the_rule_that_hid_it() -> None:
    assert told(ask("secret.corp.internal", who=asker("staff"))) == ("NOERROR", ["10.1.0.3"])
    hidden = ask("tosecret.corp.internal")
    assert isinstance(hidden, Answer)
    assert (hidden.said.answered_by, hidden.said.rule, hidden.said.rcode) == ("policy", "p/secret", "NXDOMAIN")


def test_without_rules_every_name_may_be_asked_for() -> None:
    assert told(ask("secret.corp.internal", how=answering([]))) == ("NOERROR", ["10.1.0.3"])


def test_before_it_knows_what_is_hidden_it_tells_nothing() -> None:
    how = answering()
    how.rules = None
    assert told(ask("nas.acme.falkirk", how=how)) == ("SERVFAIL", [])
    assert told(ask("nas.acme.falkirk", who=asker(network="n9"))) == ("SERVFAIL", [])


def reply_of(found: Any, *addresses: str) -> bytes:
    asked = DNSRecord.parse(messages.forwarded(found.question, 9, found.labels))
    reply = asked.reply()
    for address in addresses:
        reply.add_answer(RR(asked.q.qname, QTYPE.A, rdata=A(address), ttl=5))
    return bytes(reply.pack())


def test_what_others_know_is_asked_of_them() -> None:
    how = answering()
    found = ask("www.example.com", how=how)
    assert isinstance(found, Ask)
    assert (found.forward_to, found.labels, found.said.answered_by) == ((), None, "upstream")
    assert told(how.finish(found, reply_of(found, "192.0.2.1"))) == ("NOERROR", ["192.0.2.1"])
    failed = how.fail(found, "nobody answered")
    assert told(failed) == ("SERVFAIL", [])
    assert failed.said.why == "nobody answered"


def test_an_alias_that_leads_out_is_followed_for_the_client() -> None:
    how = answering()
    found = ask("out.corp.internal", how=how)
    assert isinstance(found, Ask)
    assert found.labels == (b"www", b"example", b"com")
    answer = how.finish(found, reply_of(found, "192.0.2.1"))
    assert told(answer) == ("NOERROR", ["www.example.com.", "192.0.2.1"])
    assert DNSRecord.parse(answer.reply).q.qname == "out.corp.internal"
    assert told(how.finish(found, b"\0\0\x80\0\0\0\0\1" + bytes(4) + b"\xff")) == ("SERVFAIL", [])


def test_long_text_comes_in_parts_and_whole_by_tcp() -> None:
    answer = ask("www.corp.internal", "TXT", who=asker(protocol=6))
    assert isinstance(answer, Answer)
    (record,) = DNSRecord.parse(answer.reply).rr
    assert b"".join(record.rdata.data) == b"x" * 300
