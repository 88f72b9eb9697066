"""Allow-list scan of torch's .pt files: what a pickle would import, found without opening it.

DeepSpeed loads its shards with `weights_only=False`, which runs whatever a pickle names.
"""

import pickletools
import zipfile
from pathlib import Path

from data_pipeline.errors import InputError

_STORAGES = "Double Float Half BFloat16 Long Int Short Char Byte Bool".split()  # noqa: SIM905
_DTYPES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905

ALLOWED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch._tensor _rebuild_from_type_v2",
        "torch Tensor",
        "torch Size",
        "torch device",
        "torch.nn.parameter Parameter",
        "numpy._core.multiarray _reconstruct",
        "numpy._core.multiarray scalar",
        "numpy.core.multiarray _reconstruct",
        "numpy.core.multiarray scalar",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
        "deepspeed.runtime.zero.config ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler LossScaler",
        "deepspeed.runtime.fp16.loss_scaler DynamicLossScaler",
        *(f"torch {name}Storage" for name in _STORAGES),
        *(f"torch {name}" for name in _DTYPES),
    }
)
# Ways to name a global that torch's pickles (protocol 2) never use.
_FORBIDDEN = frozenset({"INST", "OBJ", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"})


def scan_pickle(path: Path) -> None:
    """Check that a .pt file names nothing but tensors, containers and DeepSpeed's own records.

    Raises:
        InputError: naming the file and the global that is not on the allow-list, or what is wrong
            with a file that is not exactly a zip archive as torch writes it.
    """
    try:
        data = _read_pickle(path)
        for opcode, argument, _ in pickletools.genops(data):
            # GLOBAL's argument is "module name"; nothing else that is left can import.
            if opcode.name in _FORBIDDEN:
                raise InputError(f"{path}: its pickle uses {opcode.name}, which torch never does")
            if opcode.name == "GLOBAL" and argument not in ALLOWED:
                name = str(argument).replace(" ", ".")
                raise InputError(
                    f"{path}: its pickle names {name}, which no checkpoint of this trainer does "
                    "and which would run when opened; do not open it, and find out who wrote it"
                )
    except InputError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable torch archive: {error}") from error


def _read_pickle(path: Path) -> bytes:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        # torch falls back to older formats, which need another scan, where the zip does not
        # begin at byte 0; and two readers may disagree on names that occur twice.
        file.seek(0)
        if file.read(4) != b"PK\x03\x04":
            raise InputError(f"{path}: not a zip archive as torch writes it")
        names = [name.lower() for name in archive.namelist()]
        pickles = [name for name in archive.namelist() if name.lower().endswith(".pkl")]
        if len(set(names)) < len(names) or len(pickles) != 1 or pickles[0].count("/") != 1:
            raise InputError(f"{path}: expected one data.pkl, found {pickles or 'none'}")
        if not pickles[0].endswith("/data.pkl") or archive.comment:
            raise InputError(f"{path}: not an archive as torch writes it: {pickles[0]}")
        return archive.read(pickles[0])
