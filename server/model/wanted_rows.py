"""Rows of a step that nobody reads any more once attention has mixed its rows for the last time.

Of a prompt only the last token's logits are wanted, yet a transformers model computes its last layer for all
of them, as its modules know no rows. Keys and values of all have to be written; what comes behind the last
attention is of use in the wanted rows alone: of 12 layers x 768 a sixteenth of the prompt's products.
"""

from collections.abc import Callable

from torch import Tensor

from server.errors import ModelError


class WantedRows:
    """Those of one step of `[1, num_rows]` tokens."""

    def __init__(self, rows: Tensor, num_rows: int, num_layers: int) -> None:
        """rows: int64 `[num_wanted]`, none twice. num_layers: each attends once, see `probe_attention`."""
        self._rows = rows
        self._num_rows = num_rows
        self._num_left = num_layers

    def attended(self) -> None:
        """One layer's attention was computed.

        Raises ModelError for one more than there are layers, which may have read what was left out.
        """
        if not self._num_left:
            raise ModelError("a layer called attention twice in one step")
        self._num_left -= 1

    def multiply(self, product: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
        """`product(input)`; where only the wanted rows are read, of these, with zeros in the others.

        input `[1, num_rows, in_features]` is the step's rows in their order; of any other shape it may be
        something else, such as the rows that one expert has, and is multiplied whole.
        """
        if self._num_left or input.shape[:-1] != (1, self._num_rows):
            return product(input)
        wanted = product(input.index_select(1, self._rows))
        output = wanted.new_zeros(1, self._num_rows, wanted.shape[-1])
        return output.index_copy_(1, self._rows, wanted)
