"""DNS messages as the resolver reads and writes them: questions in, replies out, on dnslib. PURE.

A question is parsed whole, so that nothing that is malformed goes on to anybody; what is asked of another resolver is a message made anew (the name
byte for byte, whose case some resolvers check), and its reply is passed on as it came but for the id, so that record types nobody here
knows pass unharmed.

Truncation: a reply by UDP is at most what the client says it takes (RFC 6891 6.2.3; 512 bytes where it doesn't), and never more than
`LARGEST_UDP`, which fits into one unfragmented packet on any path; what is longer is cut to its question, with TC set, and the client asks again
by TCP (RFC 7766).

Limits: one question a message, class IN; no zone transfers, updates or notifications; EDNS version 0, whose options aren't passed on
(RFC 7871 6: whose client it is, is nobody's business out there).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from dnslib import EDNS0, QTYPE, RCODE, RR, DNSError, DNSHeader, DNSQuestion, DNSRecord

HEADER: Final = struct.Struct("!HHHHHH")
LARGEST_UDP: Final = 1232
"""Bytes: IPv6's smallest MTU less headers, as the DNS flag day of 2020 agreed."""
PLAIN_UDP: Final = 512
"""RFC 1035 4.2.1."""
LARGEST: Final = 65_535
QR, AA, TC, RD, RA, AD, CD = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = range(6)
BADVERS: Final = 16
_IN: Final = 1
_OPT: Final = 41
_DO: Final = 0x8000
_TRANSFERS: Final = (251, 252)
"""IXFR and AXFR."""


class Unanswerable(ValueError):
    """A datagram to which no reply is due; `reason` is what counters name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Question:
    """A client's question; immutable once made."""

    __slots__ = ("checking_disabled", "dnssec", "edns", "flags", "id", "labels", "name", "type", "wire", "wrong")

    def __init__(self, identity: int, flags: int) -> None:
        self.id = identity
        self.flags = flags
        self.name = ""
        """In lower case, without the last dot; what isn't printable or is a dot inside a label is escaped (RFC 1035 5.1)."""
        self.type = 0
        self.labels: tuple[bytes, ...] = ()
        self.wire = b""
        """The question section as it came: name, type, class."""
        self.edns = 0
        """Bytes that the client takes by UDP; 0 where it doesn't speak EDNS."""
        self.dnssec = False
        """It wants signatures (DO)."""
        self.checking_disabled = bool(flags & CD)
        self.wrong = NOERROR
        """The response code that is all the answer; NOERROR for a question that can be answered."""

    @property
    def type_name(self) -> str:
        """Such as AAAA, or TYPE65280 (RFC 3597 5)."""
        return type_name(self.type)

    def limit(self, *, udp: bool) -> int:
        """Bytes of the longest reply."""
        return min(max(self.edns, PLAIN_UDP), LARGEST_UDP) if udp else LARGEST


def type_name(number: int) -> str:
    """Such as AAAA, or TYPE65280."""
    return str(QTYPE.forward.get(number, f"TYPE{number}"))


def rcode_name(number: int) -> str:
    """Such as NXDOMAIN."""
    return str(RCODE.forward.get(number, f"RCODE{number}"))


def parse(data: bytes) -> Question:
    """A client's message. Raises Unanswerable where it is too short for a header or is itself a reply: to answer those makes loops."""
    if len(data) < HEADER.size:
        raise Unanswerable("dns_malformed")
    identity, flags, questions, *_ = HEADER.unpack_from(data)
    if flags & QR:
        raise Unanswerable("dns_not_a_question")
    question = Question(identity, flags)
    if flags & 0x7800:
        question.wrong = NOTIMP
        return question
    if questions != 1:
        question.wrong = FORMERR
        return question
    try:
        record = DNSRecord.parse(data)
    except DNSError:
        question.wrong = FORMERR
        return question
    asked = record.q
    question.labels = tuple(asked.qname.label)
    question.name = text(question.labels)
    question.type = asked.qtype
    length = sum(len(label) + 1 for label in question.labels) + 1
    wire = data[HEADER.size : HEADER.size + length + 4]
    if wire != _question(question.labels, asked.qtype, asked.qclass):
        # RFC 9267 2: compression in the only name there is has nothing to point to.
        question.wrong = FORMERR
        return question
    question.wire = wire
    options = [found for found in record.ar if found.rtype == _OPT]
    if len(options) > 1:
        # RFC 6891 6.1.1.
        question.wrong = FORMERR
    elif options:
        question.edns = max(options[0].rclass, PLAIN_UDP)
        question.dnssec = bool(options[0].ttl & _DO)
        if options[0].ttl >> 16 & 0xFF:
            question.wrong = BADVERS
    if not question.wrong and (asked.qclass != _IN or asked.qtype in _TRANSFERS):
        question.wrong = REFUSED
    elif not question.wrong and asked.qtype == _OPT:
        question.wrong = FORMERR
    return question


def text(labels: Sequence[bytes]) -> str:
    """A name as rules and logs see it."""
    return ".".join("".join(map(_shown, label)) for label in labels).lower()


def _shown(byte: int) -> str:
    if byte in b".\\":
        return "\\" + chr(byte)
    return chr(byte) if 0x21 <= byte <= 0x7E else f"\\{byte:03d}"


def _question(labels: Sequence[bytes], kind: int, klass: int) -> bytes:
    name = b"".join(bytes([len(label)]) + label for label in labels)
    return name + b"\0" + struct.pack("!HH", kind, klass)


# replies


def reply(
    question: Question,
    rcode: int,
    answers: Sequence[RR] = (),
    authority: Sequence[RR] = (),
    *,
    udp: bool,
    authoritative: bool = True,
) -> bytes:
    """A reply of our own, as short as it must be."""
    flags = QR | RA | question.flags & (RD | CD) | (AA if authoritative and rcode in (NOERROR, NXDOMAIN) else 0)
    if not question.wire:
        # What couldn't be read isn't repeated.
        return HEADER.pack(question.id, flags | question.flags & 0x7800 | rcode & 15, 0, 0, 0, 0)
    record = DNSRecord(
        DNSHeader(id=question.id, bitmap=flags | rcode & 15), q=DNSQuestion(question.labels, question.type, _IN)
    )
    record.add_answer(*answers)
    record.add_auth(*authority)
    if question.edns:
        option = EDNS0(udp_len=LARGEST_UDP, ext_rcode=rcode >> 4, flags="do" if question.dnssec else "")
        record.add_ar(option)
    data = bytes(record.pack())
    # The name as it was written, not as dnslib would write it: some clients vary its case to know their own question again.
    data = data[: HEADER.size] + question.wire + data[HEADER.size + len(question.wire) :]
    return data if len(data) <= question.limit(udp=udp) else truncated(question, flags | rcode & 15)


def truncated(question: Question, flags: int) -> bytes:
    """The reply that says: ask again by TCP."""
    option = b""
    if question.edns:
        option = b"\0" + struct.pack("!HHIH", _OPT, LARGEST_UDP, _DO if question.dnssec else 0, 0)
    return HEADER.pack(question.id, flags | QR | TC, 1, 0, 0, bool(option)) + question.wire + option


# other resolvers


def forwarded(question: Question, identity: int, labels: Sequence[bytes] | None = None) -> bytes:
    """The question for another resolver, of the client's name or another one."""
    wire = question.wire if labels is None else _question(labels, question.type, _IN)
    option = b""
    if question.edns:
        option = b"\0" + struct.pack("!HHIH", _OPT, LARGEST_UDP, _DO if question.dnssec else 0, 0)
    flags = RD | question.flags & (CD | AD)
    return HEADER.pack(identity, flags, 1, 0, 0, bool(option)) + wire + option


def fits(asked: bytes, response: bytes) -> bool:
    """Whether a message answers what was asked: id, question, and that it is a reply at all. Whoever guesses must guess all of that."""
    if len(response) < HEADER.size:
        return False
    identity, flags, questions, *_ = HEADER.unpack_from(response)
    if identity != int.from_bytes(asked[:2], "big") or not flags & QR or flags & 0x7800:
        return False
    if not questions:
        # A server that can't read a question doesn't repeat it.
        return flags & 15 in (FORMERR, SERVFAIL, NOTIMP, REFUSED)
    end = HEADER.size + _name_bytes(asked) + 4
    return questions == 1 and response[HEADER.size : end].lower() == asked[HEADER.size : end].lower()


def _name_bytes(data: bytes) -> int:
    """Bytes of the uncompressed name behind the header of a message that was made here."""
    at = HEADER.size
    while data[at]:
        at += data[at] + 1
    return at + 1 - HEADER.size


def cut_short(response: bytes) -> bool:
    """Whether a reply says that there is more by TCP."""
    return bool(response[2] & TC >> 8)


def code(response: bytes) -> int:
    """A reply's response code, without EDNS's part."""
    return response[3] & 15


def answer_count(response: bytes) -> int:
    """Records in a reply's answer section."""
    return int.from_bytes(response[6:8], "big")


def passed_on(question: Question, response: bytes, *, udp: bool) -> bytes:
    """Another resolver's reply as the client's: under its id, with its own spelling of the name, and no longer than it takes."""
    flags = int.from_bytes(response[2:4], "big") & ~TC | RA | question.flags & RD
    if not int.from_bytes(response[4:6], "big"):
        return reply(question, flags & 15, udp=udp, authoritative=False)
    if len(response) > question.limit(udp=udp):
        return truncated(question, flags)
    head = question.id.to_bytes(2, "big") + flags.to_bytes(2, "big") + response[4 : HEADER.size]
    return head + question.wire + response[HEADER.size + len(question.wire) :]


def joined(question: Question, prefix: Sequence[RR], response: bytes, *, udp: bool) -> bytes:
    """A reply to an alias whose name another resolver knows: our records, then its own. SERVFAIL where it can't be read."""
    try:
        record = DNSRecord.parse(response)
    except DNSError:
        return reply(question, SERVFAIL, udp=udp)
    return reply(
        question,
        record.header.rcode,
        [*prefix, *record.rr],
        [found for found in record.auth if found.rtype == QTYPE.SOA],
        udp=udp,
        authoritative=False,
    )
