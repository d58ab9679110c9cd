"""NodeService: nodes as resources, and how a node makes itself known."""

from __future__ import annotations

from typing import Any

import grpc

from falkirk.api.registry.v1 import node_service_pb2 as pb
from falkirk.decide.callers import Role
from falkirk.registry import engine
from falkirk.registry.engine import Engine
from falkirk.registry.kinds import BY_NAME
from falkirk.registry.service import Desk, ResourceService, reached
from falkirk.runtime import callers
from falkirk.runtime.errors import FalkirkError


class NodeService(ResourceService):
    """Create, Get, List, Update, Delete, Watch, and Announce."""

    def __init__(self, desk: Desk) -> None:
        super().__init__(BY_NAME["node"], desk)

    async def Announce(self, request: pb.NodeServiceAnnounceRequest, context: Any) -> pb.NodeServiceAnnounceResponse:
        """See the proto."""
        check_own(request.node.metadata.name)
        node, revision = await self._desk.write(lambda work: (announce(work, request.node), reached(work)))
        return pb.NodeServiceAnnounceResponse(node=node, revision=self._desk.revision(revision))


def check_own(node: str) -> None:
    """Refuse a node that speaks for another one. By unix sockets the directory is all there is to know. Raises FalkirkError."""
    caller = callers.current.get()
    if caller is not None and caller.role is Role.NODE and caller.name != node:
        raise FalkirkError(
            grpc.StatusCode.PERMISSION_DENIED, "NODE_FORBIDDEN", f"{caller} may not speak for node {node!r}", node=node
        )


def announce(work: Engine, given: pb.Node) -> pb.Node:
    """Make a node or bring it up to date; whatever an administrator has labelled it with stays. Raises `Refused`."""
    kind = BY_NAME["node"]
    stored = engine.find(work.connection, kind, "", given.metadata.name)
    node = pb.Node(public_key=given.public_key, endpoints=given.endpoints, mtu=given.mtu, version=given.version)
    node.metadata.name = given.metadata.name
    if stored is not None:
        node.metadata.name = stored.metadata.name
        node.metadata.labels.update(stored.metadata.labels)
    made, _ = work.put(kind, node, stored)
    assert isinstance(made, pb.Node)
    return made
