"""Checkpoints whose weights are quantized: which those are, and how they are refused."""


def find_quantization(config) -> dict | None:
    """Return the ``quantization_config`` of a transformers config as a dictionary, or None.

    Args:
        config: A config; one with parts (text, vision) may say it in the text part.
    """
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            return found if isinstance(found, dict) else found.to_dict()
    return None


def float8_block_size(found: dict) -> tuple[int, int] | None:
    """Return the ``(rows, columns)`` of weights that share a scale, if it is float8 as we read it.

    Args:
        found: From :func:`find_quantization`.
    """
    block_size = found.get("weight_block_size")
    readable = (
        found.get("quant_method") == "fp8"
        and found.get("fmt", "e4m3") == "e4m3"
        and isinstance(block_size, list | tuple)
        and len(block_size) == 2
        and all(type(n) is int and n >= 1 for n in block_size)
    )
    return tuple(block_size) if readable else None


def describe_quantization(config) -> str | None:
    """Return a config's quantization format in words, such as ``"gptq, 4 bits"``, or None.

    Args:
        config: See :func:`find_quantization`.
    """
    quantization = find_quantization(config)
    if quantization is None:
        return None
    bits = quantization.get("bits") or quantization.get("w_bit")
    for size in (4, 8):  # bitsandbytes, which older checkpoints do not name
        if quantization.get(f"load_in_{size}bit"):
            bits = size
            quantization = {"quant_method": "bitsandbytes"} | quantization
    method = quantization.get("quant_method") or "an unnamed format"
    words = [str(getattr(method, "value", method))]
    words += [str(quantization[key]) for key in ("format", "fmt") if quantization.get(key)]
    if bits:
        words.append(f"{bits} bits")
    return ", ".join(words)


def refuse_quantized(config, bf16_bytes: int, convertible: bool = False) -> None:
    """Refuse a checkpoint if it is quantized.

    Args:
        config: Its transformers config.
        bf16_bytes: What all of the model's weights take in bfloat16.
        convertible: Whether ``moe_gpu.load`` could convert it.

    Raises:
        ValueError: It is; names the format and the size.
    """
    found = describe_quantization(config)
    if found is None:
        return
    advice = "; load(..., dequantize=True) converts this one while reading" if convertible else ""
    raise ValueError(
        f"the checkpoint is quantized ({found}), which is not supported: use the "
        f"model's bfloat16 checkpoint, whose weights take {bf16_bytes:,} bytes "
        f"({bf16_bytes / 2**30:.1f} GiB){advice}"
    )
