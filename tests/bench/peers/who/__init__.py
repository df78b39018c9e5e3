"""The peers, in the order of the table."""

from tests.bench.peers.peer import Peer
from tests.bench.peers.who.fathom import Fathom
from tests.bench.peers.who.llama_server import LlamaServer
from tests.bench.peers.who.openvino import OpenVino
from tests.bench.peers.who.vllm import Vllm

_ALL: tuple[Peer, ...] = (Fathom(), Vllm(), LlamaServer(), OpenVino())
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
