"""Checkpoints on disk for tests: both layouts of experts, one file or several."""

from pathlib import Path

from safetensors.torch import load_file, save_file

FILE = "model.safetensors"


def save(model, folder: Path, packed=False, sharded=False) -> Path:
    """Save a model; transformers itself writes experts as separate tensors."""
    model.save_pretrained(folder, max_shard_size="60KB" if sharded else "1GB")
    if packed:
        assert not sharded
        tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            tensors.pop("lm_head.weight")
        save_file(tensors, folder / FILE, {"format": "pt"})
    return folder


def edit(folder: Path, **changes) -> None:
    """Change tensors of a checkpoint of one file; None removes one."""
    tensors = load_file(folder / FILE)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / FILE, {"format": "pt"})
