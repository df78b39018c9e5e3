"""The peers, in the order of the table."""

from tests.bench.peers.peer import Peer
from tests.bench.peers.who.fathom import Fathom
from tests.bench.peers.who.in_process import InProcess
from tests.bench.peers.who.llama_server import LlamaServer
from tests.bench.peers.who.openvino import OpenVino
from tests.bench.peers.who.ort import Ort
from tests.bench.peers.who.ray_serve import RayServe
from tests.bench.peers.who.transformers_serve import TransformersServe
from tests.bench.peers.who.vllm import Vllm

_ALL: tuple[Peer, ...] = (
    Fathom(),
    Vllm(),
    LlamaServer(),
    OpenVino(),
    Ort(),
    RayServe(),
    TransformersServe(),
    InProcess("peft", "PEFT (in process)", has_adapters=True),
    InProcess("generate", "transformers `generate` (in process)", has_adapters=False),
)
PEERS: dict[str, Peer] = {peer.name: peer for peer in _ALL}
