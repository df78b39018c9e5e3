"""What is counted is what is alive at once."""

import torch

from server.bench.allocation import peak_bytes


def test_the_peak_is_of_what_is_alive_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(1 << 18)

    def together() -> None:
        kept = [torch.zeros(1 << 18) for _ in range(5)]
        del kept

    assert peak_bytes(one_after_the_other) == 1 << 20
    assert peak_bytes(together) == 5 << 20
