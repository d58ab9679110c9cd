"""The upgrader: packets become streams here, in a TCP stack that belongs to Falkirk alone.

    flow worker                    private namespace                 upgrader worker                     the world
    SYN rewritten to slot  ──TUN──▶ kernel TCP ─▶ listener ─accept─▶ relay ◀──────connected before──────▶ server
         ▲                                                            │ the SYN was let in
         └──────────── Prepare / Connected / DialFailed / Closed ─────┘ (SEQPACKET pair, one a worker)

A namespace helper (`falkirk.linux.namespace_helper`) makes a user and a network namespace with two TUN devices and two
listeners a worker, and hands all of them to the parent. A second one makes the namespace where streams are lowered to devices: there are no listeners but
client sockets, made when a worker asks (`lowering`); an upstream that is a device is dialled through one of those. The parent serves gRPC, keeps copies of every descriptor (so a
worker or the helper can be replaced without losing what it was given) and starts the workers. A worker gives its
flow worker the TUN descriptors, dials what it is told to prepare, accepts the clients' streams, pairs the two by slot
(the peer's address) and relays.

Faithfulness: FIN, half-close and RST pass each way, each as what it is. Both sockets of a stream carry SO_LINGER
{1,0} until both FINs have passed, so whatever kills a worker makes the kernel send RST both ways: a truncated download
never looks complete.

Modules, in the order in which a stream meets them: `pairing` (the pair to flow), `dial` and `lowering`, `worker` (accept, pair up), `callers` and
`errands` (streams that the parent has in hand),
`sessions` (sockets of UDP and echo, which are flow's from then on), `resolver` (the same, and streams, to this mesh's resolver), `relay`, `stream` and `deadlines` (the rules, pure), `control` (worker and parent), `namespace` and `parent` (who owns
the descriptors), `service` (gRPC), `settings`.

Limits: streams of TCP only; treatment "l4" only; a worker holds at most (RLIMIT_NOFILE - 64) / 2 streams and refuses more with
EMFILE; a worker's death costs its streams.
"""
