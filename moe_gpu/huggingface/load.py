"""Load a checkpoint that is larger than the GPU, and larger than host memory if need be."""

import functools
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ..offload import ExpertStore
from ..offload.disk import DiskExperts
from ..offload.residency import Residency
from ..offload.shards import Shards
from ..offload.tiers import Tier, available_memory, host_budget, place
from ..policies import Policy, QualityBudget
from .attach import make_gates, warn_of_few_slots
from .attached import AttachedMoE
from .blocks import MoEBlock, find_blocks
from .budget import parse_bytes
from .checkpoint import (
    add_weights,
    check_quantization,
    config_dtype,
    load_generation_config,
    meta_model,
    read_config,
    resolve,
    stored_dtype,
)
from .loading import load_dense
from .options import Options, refuse_unknown
from .origins import locate_experts
from .part import DevicePart
from .weights import ExpertWeights, ResidentWeights, common_layout

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    path_or_id: str | Path,
    *,
    slots: int | None = None,
    resident: float | int | None = None,
    gpu_memory: int | str | None = None,
    policy: Policy = QualityBudget(0.05),  # noqa: B008 - frozen dataclass
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    host_memory: int | str | None = None,
    dequantize: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    progress: bool | None = None,
    **options,
) -> tuple[PreTrainedModel, AttachedMoE]:
    """Load a model with its dense weights on the device and its experts wherever they fit.

    Never needs the whole model on the GPU, nor in host memory: expert weights go straight from
    the safetensors files to their home, which is page-locked memory, pageable memory, or the
    files themselves. Experts may be packed or separate tensors.

    Args:
        path_or_id: A local folder, or an id on the Hugging Face hub.
        slots: Experts per layer on the device, in [1, E]. Exactly one of this and the next two is
            needed.
        resident: The same as a share of E in (0, 1], rounded down, or as an int.
        gpu_memory: Bytes, or text such as ``"20GiB"``, for all that is on the device.
        policy: How far routing may move towards resident experts.
        device: Where the model computes. Default: CUDA where there is one.
        dtype: Of the weights: a torch dtype, its name, or ``"auto"``, the checkpoint's own.
        host_memory: Bytes, or text such as ``"64GiB"``, for expert weights in host memory, the
            page-locked part (``pinned_memory``) included; the rest stays on disk. Default: all of
            them, but at most 80 % of what is available. Nothing where every expert has a slot.
        dequantize: Convert a checkpoint of block-scaled float8 to ``dtype`` while it is read.
        revision: Branch, tag or commit on the hub.
        cache_dir: Where downloads are kept; see ``huggingface_hub``.
        token: Access token for the hub; see ``huggingface_hub``.
        progress: Show a bar. Default: where stderr is a terminal.
        **options: The other keyword arguments of :func:`moe_gpu.attach`, which describes all.

    Returns:
        The model, attached, in eval mode; and the handle, whose ``close()`` frees the experts for
        good and whose ``detach()`` makes an ordinary model in host memory.

    Raises:
        TypeError: An argument of the wrong type, or one that does not exist.
        ValueError: An argument outside its bounds, an unknown family, a quantized checkpoint.
        FileNotFoundError: No such folder, and the hub cannot be reached.
        CheckpointError: Files that are damaged, incomplete or not of this model.
        MemoryError: The slots do not fit on the device.

    Example:
        >>> model, moe = moe_gpu.load("mistralai/Mixtral-8x7B-v0.1", gpu_memory="20GiB")
        >>> model.generate(**inputs)
        >>> moe.metrics().loads_by_tier
    """
    refuse_unknown(load, options)
    options = Options(
        slots=slots, resident=resident, gpu_memory=gpu_memory, policy=policy, **options
    )
    if host_memory is not None:
        host_memory = parse_bytes("host_memory", host_memory, minimum=0)
    dtype, device = _check_dtype(dtype), _check_device(device)
    kept = None if options.residency is None else Residency.load(options.residency)

    # whatever can be refused is refused before weights are downloaded
    hub = {"cache_dir": cache_dir, "token": token}
    folder = resolve(path_or_id, revision=revision, **hub)
    config = read_config(folder)
    block_size = check_quantization(config, dequantize)
    # tensors made in inference mode could not be written outside it
    with ExitStack() as undo, torch.inference_mode(False), torch.no_grad():

        @functools.cache
        def weights() -> Shards:
            return undo.enter_context(Shards(add_weights(folder, path_or_id, **hub)))

        model = meta_model(config, dtype or config_dtype(config) or stored_dtype(weights()))
        blocks = find_blocks(model)
        layout, E = common_layout(blocks, on_meta=True)
        L = len(blocks)
        choice = options.choose_slots(model, blocks, layout, E)
        if kept is not None:
            kept.check(L, E)
        cuda = device.type == "cuda"
        pinned, host = host_budget(
            host_memory, options.pinned_bytes, L * E * layout.expert_bytes,
            cuda=cuda, available=available_memory(),
        )  # fmt: skip
        all_resident = options.is_all_resident(choice, E)
        tiers_LE = [[]] * L  # no home but the device
        if not all_resident:
            tiers_LE = place(
                L, E, layout.expert_bytes, pinned if cuda else 0, host, on_disk=True,
                heat=None if kept is None else kept.heat(),
            )  # fmt: skip
        shards = weights()
        files = DiskExperts(layout, shards, locate_experts(model, blocks, shards), block_size)

        gates = make_gates(blocks, E, options, device, range(L))
        device = gates[0].state.slot_of_LE.device  # with its index
        store = ExpertStore(layout, L, E, device, tiers_LE=tiers_LE, files=files)
        undo.callback(store.close)
        hidden = not (sys.stderr.isatty() if progress is None else progress)
        owner = (ResidentWeights if all_resident else ExpertWeights)(model, blocks, store, True)
        total = _bytes_to_load(model, blocks, store)
        if all_resident:
            total += L * E * layout.expert_bytes
        with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=hidden) as bar:
            load_dense(model, blocks, shards, device, block_size=block_size, progress=bar.update)
            owner.read(bar.update)
        load_generation_config(model, folder)
        part = DevicePart(range(L), blocks, gates, owner, choice)
        moe = AttachedMoE(model, [part], torch.device("cpu"))
        moe._attach(options, kept)
        undo.pop_all()  # all is well: files and store are the model's now
    warn_of_few_slots(choice, blocks)
    return model, moe


def _bytes_to_load(model: PreTrainedModel, blocks: list[MoEBlock], store: ExpertStore) -> int:
    """Return the bytes of dense weights, and of the experts that do not stay on disk."""
    experts = {id(p) for block in blocks for p in block.experts.parameters()}
    dense = sum(p.nbytes for p in model.parameters() if id(p) not in experts)  # tied ones once
    homes = store.home_bytes()
    return dense + homes[Tier.PINNED.value] + homes[Tier.PAGEABLE.value]


def _check_dtype(dtype: torch.dtype | str) -> torch.dtype | None:
    """Return the dtype that is asked for, None for the checkpoint's own."""
    if dtype == "auto":
        return None
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        known = ", ".join(map(repr, ["auto", *DTYPES]))
        raise ValueError(f"dtype must be one of {known} or such a torch dtype, got {dtype!r}")
    return found


def _check_device(device: torch.device | str | None) -> torch.device:
    """Return the device that is asked for, if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except RuntimeError as error:  # lists the types that torch has ever heard of
        raise ValueError(f"device must be a CPU or CUDA device, got {device!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a CPU or CUDA device, got {device!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={str(device)!r} is not there: this PyTorch sees "
            f"{torch.cuda.device_count()} CUDA devices"
        )
    return found
