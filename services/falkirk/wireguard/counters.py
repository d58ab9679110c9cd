"""Why a datagram or a packet came to nothing: a closed set, so that each reason has a counter before the first bad datagram comes."""

from __future__ import annotations

from typing import Final, Literal, get_args

Reason = Literal[
    "bad_length",
    "bad_type",
    "bad_mac1",
    "bad_mac2",
    "no_cookie",
    "handshake_rate",
    "bad_static",
    "unknown_key",
    "bad_timestamp",
    "old_timestamp",
    "early_initiation",
    "low_order_point",
    "unknown_handshake",
    "bad_response",
    "bad_cookie_reply",
    "unknown_index",
    "session_expired",
    "bad_packet",
    "replayed",
    "counter_limit",
    "bad_inner",
    "source_not_allowed",
    "queue_full",
    "queue_given_up",
    "no_endpoint",
    "packet_too_long",
]
REASONS: Final[tuple[Reason, ...]] = get_args(Reason)
"""All reasons, in a fixed order (names of counters)."""

EXPLANATIONS: Final[dict[Reason, str]] = {
    "bad_length": "a datagram that no message of the protocol can be",
    "bad_type": "a datagram whose type is none of the protocol's four, or whose reserved bytes aren't zero",
    "bad_mac1": "a handshake message from somebody who doesn't know this node's public key",
    "bad_mac2": "a handshake message under load whose cookie is wrong or too old; answered by a cookie reply",
    "no_cookie": "a handshake message under load without a cookie; answered by a cookie reply",
    "handshake_rate": "handshake messages under load beyond what one address may send, or cookie replies beyond their rate",
    "bad_static": "an initiation whose encrypted key isn't authentic",
    "unknown_key": "an initiation of a key that is nobody's here, or no longer",
    "bad_timestamp": "an initiation whose sender doesn't hold the private key that it claims, or another preshared state",
    "old_timestamp": "an initiation that was seen before, or is older than one that was",
    "early_initiation": "an initiation within 20 ms of the same peer's last",
    "low_order_point": "a handshake message with a public key that gives no secret (RFC 7748 6.1)",
    "unknown_handshake": "a response or cookie reply to nothing that was asked",
    "bad_response": "a response that isn't authentic: wrong key or wrong preshared key",
    "bad_cookie_reply": "a cookie reply that isn't authentic",
    "unknown_index": "a data message of a session that isn't here",
    "session_expired": "a data message of a session older than 180 s",
    "bad_packet": "a data message that isn't authentic",
    "replayed": "a data message whose counter was seen before, or is too old to know",
    "counter_limit": "a data message whose counter is beyond what a session may use",
    "bad_inner": "an authentic data message that holds no whole IP packet",
    "source_not_allowed": "an authentic packet from an inner address that isn't this peer's",
    "queue_full": "a packet for a peer without a session, beyond what is kept for it",
    "queue_given_up": "a packet that was kept for a peer which didn't answer",
    "no_endpoint": "a packet for a peer whose address isn't known",
    "packet_too_long": "a packet to send that is longer than 65,455 bytes",
}
"""What each means, for metrics and people."""
