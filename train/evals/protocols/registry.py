"""All protocols by name."""

from train.caption.protocol import Captioning
from train.evals.protocols.fewshot import FewShot
from train.evals.protocols.finetune import FineTune
from train.evals.protocols.knn import NearestNeighbours
from train.evals.protocols.probe import LinearProbe
from train.evals.protocols.protocol import Evaluation
from train.evals.protocols.retrieval import Recall
from train.evals.protocols.zeroshot import ZeroShot

_ALL: tuple[Evaluation, ...] = (LinearProbe(), FewShot(), NearestNeighbours(), ZeroShot(), FineTune(), Recall(), Captioning())
PROTOCOLS: dict[str, Evaluation] = {protocol.name: protocol for protocol in _ALL}
