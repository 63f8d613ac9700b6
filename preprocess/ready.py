"""What the server of worker processes imports and does once, before they are forked from it (see workers.py): nothing for others.

Loading compiled code costs a second, half of it for numba's own tables; CLIP's tokenizer is the one that most builds take.
"""

import numpy as np
from numba.core.event import TimingListener, install_listener

from labels.settings import Labels
from labels.tokenizers.kinds.clip import ClipTokenizer
from labels.tokenizers.tokenizer import make_tokenizer
from preprocess import beton_job, label_job  # noqa: F401 - to have them imported
from preprocess.label_pages import put_lists, put_numbers, room_for
from preprocess.workers import one_core

one_core()
_tokenizer = make_tokenizer(Labels())
assert isinstance(_tokenizer, ClipTokenizer)
compiling = TimingListener()
"""Its `done`: whether there was something to compile; else kept code was loaded."""
with install_listener("numba:compile", compiling):
    _ids, _offsets, *_ = _tokenizer.encode_rows(["a caption"], 1)
    put_numbers(_ids, np.empty(room_for(0, 1), np.uint8))
    _ids.flags.writeable = False  # as LabelFile has them
    put_lists(_ids, _offsets, np.empty(room_for(1, 1), np.uint8))
