"""Models of transformers from a local folder: every weight there, and no code and no pickle of the folder run."""

from pathlib import Path
from typing import Any

from labels.errors import UserError

_SHOWN = 4
_POINTER = b"version https://git-lfs"
_WEIGHTS = ("*.safetensors", "*.bin")


def import_transformers() -> Any:
    """The library, without progress bars and warnings of missing weights: those are errors here.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed", mend="pip install 'superclass-lean[evals]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def load_folder(auto: str, folder: Path, what: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and what transformers tells of its loading; see check_whole.

    Args:
        auto: the class of transformers that loads it.
        what: the folder holds, for messages: "a vision model".
        options: of its from_pretrained.

    Raises:
        UserError: transformers cannot load it, by tensors alone.
    """
    safe: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "weights_only": True, "output_loading_info": True}
    try:
        return getattr(import_transformers(), auto).from_pretrained(folder, **safe, **options)
    except Exception as error:  # transformers raises what it likes; the folder is the user's
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        raise UserError(
            f"{folder} cannot be loaded by transformers: {reason}",
            allowed=f"a folder of {what}, whole, without code of its own",
            mend=_mend(folder, reason),
        ) from None


def check_whole(folder: Path, info: dict[str, Any]) -> None:
    """Refuse a model of which weights would be random.

    Raises:
        UserError: naming the first that are missing or of another shape.
    """
    faults = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if faults:
        shown = ", ".join(faults[:_SHOWN])
        raise UserError(f"{folder}: {len(faults)} weights are missing or of another shape, the first: {shown}", mend="download it again")


def _mend(folder: Path, reason: str) -> str:
    for file in sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        with open(file, "rb") as opened:
            if opened.read(len(_POINTER)) == _POINTER:
                return f"git lfs pull: {file.name} is a pointer to the weights, not the weights"
    if "Weights only load failed" in reason:
        return "take its weights as safetensors: the .bin files hold more than tensors, and are not unpickled"
    return "download it again"
