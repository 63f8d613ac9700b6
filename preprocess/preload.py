"""What the server of worker processes imports and does once, before they are forked from it (see workers.py): nothing
for others.

Loading compiled code costs a second, half of it for numba's own tables; CLIP's tokenizer is the one that most builds
take.
"""

from numba.core.event import TimingListener, install_listener

from labels.settings import Labels
from labels.tokenizers.kinds.clip import ClipTokenizer
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess import shard  # noqa: F401 - to have them imported
from preprocess.engine import one_core

one_core()
_tokenizer = make_tokenizer(Labels())
assert isinstance(_tokenizer, ClipTokenizer)
compiling = TimingListener()
"""Its `done`: whether there was something to compile; else kept code was loaded."""
with install_listener("numba:compile", compiling):
    _tokenizer.encode_rows(["a caption"], 1)
