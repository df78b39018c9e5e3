"""Linears that read one tensor as columns of one dense product: the same numbers, in one operator."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import products
from server.model.loader import probe_attention
from server.model.products import ProductLinear
from server.model.replay.tape import TapeWriter
from server.model.siblings import find_siblings
from tests.parity.zoo import BY_NAME, save_model
from tests.tiny import load_tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = (40, 16, 8)


class MatrixProducts(TorchDispatchMode):
    """Counts torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func.overloadpacket.__name__ in ("mm", "addmm", "linear")
        return func(*args, **(kwargs or {}))


def linears(*, bias: bool = True) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(24, width, bias=bias, device=DEVICE) for width in WIDTHS]


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_siblings_are_one_operator(bias: bool) -> None:
    plain = linears(bias=bias)
    model = nn.ModuleList(copy.deepcopy(plain))
    members = list(model)
    assert products.share(model, [members]) == 1
    assert model.state_dict().keys() == ({f"{i}.bias" for i in range(3)} if bias else set())
    x = torch.randn(1, 9, 24, device=DEVICE)
    with MatrixProducts() as counted:
        outputs = [module(x) for module in members]
    assert counted.num == 1
    for module, linear, output in zip(members, plain, outputs, strict=True):
        torch.testing.assert_close(output, linear(x))
        assert torch.equal(module.weight, linear.weight)
        assert type(module.weight) is Tensor
    storages = {module.weight.untyped_storage().data_ptr() for module in members}
    assert len(storages) == 1  # views, whoever asks
    rows = outputs[1].view(9, -1)
    whole = members[1].whole(rows)
    torch.testing.assert_close(whole, torch.cat([linear(x) for linear in plain], -1)[0])
    rows.fill_(7)
    assert whole[:, 40:56].eq(7).all()


@torch.inference_mode()
def test_a_tape_sees_an_ordinary_operator() -> None:
    model = nn.ModuleList(linears())
    products.share(model, [list(model)])
    x = torch.randn(1, 2, 24, device=DEVICE)
    with TapeWriter() as writer:
        for module in model:
            module(x)
    assert [call.function.__name__ for call in writer.tape.calls] == ["linear.default"]


def test_members_own_weights_are_let_go() -> None:
    model = nn.ModuleList(linears())
    weights = [weakref.ref(module.weight) for module in model]
    products.share(model, [list(model)])
    gc.collect()
    assert [weight() for weight in weights] == [None] * 3


def test_what_has_no_weight_of_its_own_stays() -> None:
    first, second, third = linears()
    tied = nn.Linear(24, 40, device=DEVICE)
    tied.weight = first.weight
    model = nn.ModuleList([first, second, third, tied])
    assert products.share(model, [[first, second]]) == 0  # which leaves the other alone
    assert products.share(model, [[first, second, third]]) == 1
    assert type(first) is nn.Linear
    assert isinstance(second, ProductLinear)
    assert second.product is third.product
    assert products.shared_product(first) is None


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_a_models_logits_are_the_same(name: str, tmp_path) -> None:
    save_model(BY_NAME[name], tmp_path)
    plain, shared = (load_tiny(tmp_path, tmp_path).base.model for _ in range(2))
    siblings = find_siblings(shared, lambda: probe_attention(shared))
    num = products.share(shared, siblings)
    num_layers = shared.config.num_hidden_layers
    assert num == num_layers * {"llama": 2, "qwen2": 2}.get(name, 0)
    for model in (plain, shared):
        model.set_attn_implementation("eager")
    token_ids = torch.arange(3, 20).unsqueeze(0)
    with torch.inference_mode():
        logits = [model(input_ids=token_ids, use_cache=False).logits for model in (plain, shared)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
