"""Run in llama.cpp's environment: gives a model directory a sentencepiece vocabulary of plain words.

llama.cpp's converter knows no tokenizer of whole words. Requests carry token ids and answers too, so
that only the number of tokens matters; no piece is a byte or a control token, which the server would
hold back or leave out of a stream.
"""

import sys
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as proto


def write(directory: Path, vocab_size: int) -> None:
    """Write `tokenizer.model` with token `i` as the word `wi`; token 0 is the unknown one."""
    model = proto.ModelProto()
    kinds = proto.ModelProto.SentencePiece
    for token_id in range(vocab_size):
        kind = kinds.UNKNOWN if token_id == 0 else kinds.NORMAL
        model.pieces.add(piece=f"\u2581w{token_id}", score=-float(token_id), type=kind)
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
