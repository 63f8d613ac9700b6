"""What a trained model sees in an image: asked of the command `train predict`, since this stage knows nothing of nets."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from labels.errors import UserError


@dataclass(frozen=True)
class Predicted:
    """`checkpoint`: its name; `tokens`: id and probability, the likeliest first."""

    checkpoint: str
    tokens: list[tuple[int, float]]


def predict(run: Path, image: bytes, top: int, *, vocabulary: int, tokenizer: str, out: Path) -> Predicted:
    """The likeliest tokens of one image.

    Args:
        run: RUN of `train run`, or one of its checkpoints.
        image: an image file's bytes.
        top: how many tokens.
        vocabulary, tokenizer: number of classes and tokenizer's fingerprint of `out`, which the run has to share.
        out: OUT, for messages.

    Raises:
        UserError: `train predict` fails, or the run was trained on other classes.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.jpg"
        file.write_bytes(image)
        # -P: a folder named `train` where the user stands is not the command.
        command = [sys.executable, "-P", "-m", "train", "predict", str(run), str(file), "--top", str(top)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["it ended without a word"]
        if lines[-1].startswith("ModuleNotFoundError"):
            raise UserError(f"--checkpoint needs the trainer: {lines[-1]}", mend="pip install 'superclass-lean[train]'")
        told = ended.stderr.strip().removeprefix("error: ") if ended.returncode == 2 else lines[-1]
        raise UserError(f"--checkpoint {run}: {told}")
    answer = json.loads(ended.stdout)
    if (answer["vocabulary"], answer["tokenizer_fingerprint"]) != (vocabulary, tokenizer):
        raise UserError(
            f"{run} was trained on other classes: {answer['vocabulary']:,} of tokenizer {answer['tokenizer_fingerprint']}, "
            f"{out} has {vocabulary:,} of {tokenizer}",
            mend="give the OUT whose labels the run was trained on",
        )
    tokens = [(int(row["token_id"]), float(row["probability"])) for row in answer["images"][0]["tokens"]]
    return Predicted(answer["checkpoint"], tokens)
