"""DNS messages, in and out."""

from __future__ import annotations

import random

import pytest
from dnslib import EDNS0, QTYPE, RR, A, DNSHeader, DNSQuestion, DNSRecord

from falkirk.router import messages
from falkirk.router.messages import FORMERR, NOERROR, NOTIMP, REFUSED, SERVFAIL, Unanswerable


def question(name: str = "www.Example.com", kind: str = "A", edns: int = 0, flags: int = messages.RD) -> bytes:
    record = DNSRecord(DNSHeader(id=0x1234, bitmap=flags), q=DNSQuestion(name, getattr(QTYPE, kind)))
    if edns:
        record.add_ar(EDNS0(udp_len=edns, flags="do"))
    return bytes(record.pack())


def changed(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


def test_a_question_is_read_whole() -> None:
    found = messages.parse(question(edns=4096))
    assert (found.id, found.name, found.type_name, found.wrong) == (0x1234, "www.example.com", "A", NOERROR)
    assert (found.edns, found.dnssec) == (4096, True)
    assert (found.limit(udp=True), found.limit(udp=False)) == (1232, 65535)
    assert messages.parse(question()).limit(udp=True) == 512


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "dns_malformed"), (bytes(11), "dns_malformed"), (question(flags=messages.QR), "dns_not_a_question")],
)
def test_some_datagrams_are_due_no_reply(data: bytes, reason: str) -> None:
    with pytest.raises(Unanswerable) as raised:
        messages.parse(data)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (question(flags=0x2800), NOTIMP),  # UPDATE
        (changed(question(), 5, 0), FORMERR),
        (changed(question(), 5, 2), FORMERR),
        (question()[:-1], FORMERR),
        (changed(question(), 12, 0xC0), FORMERR),
        # A pointer to itself.
        (question()[:12] + b"\xc0\x0c\0\1\0\1", FORMERR),
        (question(kind="AXFR"), REFUSED),
        (question()[:-1] + b"\3", REFUSED),  # class CHAOS
        (changed(question(edns=1232), len(question()) + 6, 1), messages.BADVERS),
    ],
)
def test_what_cannot_be_answered_gets_its_code(data: bytes, rcode: int) -> None:
    found = messages.parse(data)
    assert found.wrong == rcode
    reply = messages.reply(found, rcode, udp=True)
    assert reply[:2] == data[:2]
    assert messages.code(reply) == rcode & 15


def test_a_dot_in_a_label_is_not_the_end_of_one() -> None:
    """A rule that hides a domain can't be passed by writing its dots into one label, nor can a device's name be faked so."""
    wire = b"\x0bnas.acme.fk\x03com\0"
    data = question()[:12] + wire + b"\0\1\0\1"
    assert messages.parse(data).name == r"nas\.acme\.fk.com"


def test_a_reply_repeats_the_name_as_it_was_written_and_is_cut_where_it_is_too_long() -> None:
    found = messages.parse(question("wWw.eXample.com"))
    records = [RR("www.example.com", QTYPE.A, rdata=A(f"192.0.2.{last}"), ttl=1) for last in range(1, 41)]
    short = messages.reply(found, NOERROR, records[:2], udp=True)
    assert b"\3wWw\7eXample\3com\0" in short
    assert [str(record.rdata) for record in DNSRecord.parse(short).rr] == ["192.0.2.1", "192.0.2.2"]
    cut = DNSRecord.parse(messages.reply(found, NOERROR, records, udp=True))
    assert (cut.header.tc, cut.rr) == (1, [])
    assert len(DNSRecord.parse(messages.reply(found, NOERROR, records, udp=False)).rr) == 40


def answer(asked: bytes, flags: int = messages.QR | messages.RA, name: bytes | None = None) -> bytes:
    wire = asked[12 : len(asked)] if name is None else name + asked[-4:]
    return asked[:2] + flags.to_bytes(2, "big") + b"\0\1\0\0\0\0\0\0" + wire


def test_only_a_reply_to_the_very_question_fits() -> None:
    found = messages.parse(question())
    asked = messages.forwarded(found, 0xBEEF)
    assert messages.fits(asked, answer(asked))
    assert messages.fits(asked, answer(asked).replace(b"Example", b"eXAMPLE"))
    assert not messages.fits(asked, changed(answer(asked), 1, 0))
    assert not messages.fits(asked, answer(asked, flags=0))
    assert not messages.fits(asked, answer(asked, name=b"\3www\7another\3com\0"))
    assert not messages.fits(asked, changed(answer(asked), len(answer(asked)) - 3, 28))
    assert not messages.fits(asked, b"\xbe\xef")
    # A refusal needs no question, an answer does.
    empty = asked[:2] + (messages.QR | REFUSED).to_bytes(2, "big") + bytes(8)
    assert messages.fits(asked, empty)
    assert not messages.fits(asked, changed(empty, 3, NOERROR))


def test_a_reply_is_passed_on_under_the_clients_id_and_flags() -> None:
    found = messages.parse(question("wWw.example.com"))
    asked = messages.forwarded(found, 0xBEEF)
    passed = messages.passed_on(found, answer(asked.replace(b"wWw", b"www")), udp=True)
    assert passed[:2] == b"\x12\x34"
    assert b"wWw" in passed
    assert int.from_bytes(passed[2:4], "big") == messages.QR | messages.RA | messages.RD
    long = answer(asked) + bytes(600)
    assert messages.cut_short(messages.passed_on(found, long, udp=True))
    assert not messages.cut_short(messages.passed_on(found, long, udp=False))


def test_what_is_asked_of_others_tells_them_nothing_of_the_client() -> None:
    """EDNS options (client subnet, cookies) stay here."""
    record = DNSRecord(DNSHeader(id=1, rd=1), q=DNSQuestion("a.b"))
    record.add_ar(EDNS0(udp_len=4096))
    data = bytes(record.pack())
    found = messages.parse(data[:-2] + b"\0\x0c\0\x08\0\x08\0\1\x18\0\xc0\0\2\0")
    asked = messages.forwarded(found, 7)
    assert asked.endswith(b"\0\0\x29\x04\xd0\0\0\0\0\0\0")


def test_mutated_questions_never_do_more_than_be_refused() -> None:
    generator = random.Random(53)
    originals = [question(), question("a.b.c.d.example", "SRV", 1232), question("x" * 63 + ".y", "TXT", 512)]
    for _ in range(4000):
        data = bytearray(generator.choice(originals))
        for _ in range(generator.randint(1, 4)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        del data[generator.randint(1, 2 * len(data)) :]
        try:
            found = messages.parse(bytes(data))
        except Unanswerable:
            continue
        reply = messages.reply(found, found.wrong or SERVFAIL, udp=True)
        assert len(reply) <= 1232
        assert reply[:2] == bytes(data[:2])
